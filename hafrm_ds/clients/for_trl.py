"""Rewards for TRL's GRPO, RLOO and online DPO.

    from hafrm_ds.clients.for_trl import beside, served, served_async

    GRPOTrainer(reward_funcs=served(), ...)                        # asks launch/serve.py
    GRPOTrainer(reward_funcs=[served_async(), other], ...)         # the same, while other functions run
    GRPOTrainer(reward_funcs=beside("helpful.yaml"), ...)          # without a server: a process beside each rank

An answer that cannot be scored has the reward None, which TRL leaves out of the sample.
"""

import atexit
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from hafrm_ds.clients.client import RewardClient

Texts = Sequence[str | list[dict]]


def rows_of(prompts: Texts, completions: Texts) -> list[dict[str, Any]]:
    """Prompts and completions, texts or messages, -> rows of launch/score.py."""
    return [{"prompt": prompt, "response": completion} for prompt, completion in zip(prompts, completions, strict=True)]


def served(url: str | None = None, key: str | None = None) -> Callable[..., list[float | None]]:
    """A reward function that asks a server."""
    client = RewardClient.of(url, key)

    def hafrm_reward(prompts: Texts, completions: Texts, **columns: Any) -> list[float | None]:
        return client.scores_or_none(rows_of(prompts, completions))

    return hafrm_reward


def served_async(url: str | None = None, key: str | None = None) -> Callable[..., Awaitable[list[float | None]]]:
    """As `served`, a coroutine function, which TRL runs beside others."""
    client = RewardClient.of(url, key)

    async def hafrm_reward(prompts: Texts, completions: Texts, **columns: Any) -> list[float | None]:
        return await client.scores_or_none_async(rows_of(prompts, completions))

    return hafrm_reward


def beside(model: str | Path, **options: Any) -> Callable[..., list[float | None]]:
    """A reward function with a process of its own beside each rank, on the rank's GPU. Nothing of the trainer reaches
    it: ZeRO-3, which partitions whatever a rank loads, does not partition the reward.

    Args:
        model: whatever launch/serve.py takes as --model. options: further ones of `serving.options`, as judge.

    Raises:
        ConfigError, ModelError: it cannot be used.
    """
    # Here, as the other functions need none of torch and transformers.
    from hafrm_ds.serving.dispatcher import Worker
    from hafrm_ds.serving.options import ServingOptions
    from hafrm_ds.serving.protocols import score
    from hafrm_ds.serving.worker import Question

    chosen = ServingOptions(model=Path(model), timeout=3600.0, **options)
    worker = Worker(int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1)), chosen)
    worker.start()
    atexit.register(worker.stop)

    def hafrm_reward(prompts: Texts, completions: Texts, **columns: Any) -> list[float | None]:
        asked = score(rows_of(prompts, completions), chosen)
        written, faults = asked.response(worker.ask([Question("score", item) for item in asked.items]))
        for fault in faults.values():
            logging.getLogger(__name__).warning("no reward: %s", fault)
        return [row["score"] for row in written["rows"]]

    return hafrm_reward
