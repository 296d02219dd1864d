"""Loading rewards: for a script, and for a job on several processes."""

from pathlib import Path
from typing import Any

import torch

from hafrm_ds.errors import ModelError
from hafrm_ds.hardware.devices import refuse_untried
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.rewards.composition import open_reward
from hafrm_ds.rewards.model import ModelReward, OpenedModel
from hafrm_ds.rewards.reward import Loader, OpenedReward, Reward
from hafrm_ds.saved.opening import Judge
from hafrm_ds.saved.scorer import DEFAULT_MAX_TOKENS
from hafrm_ds.saved.sharded import load_for_job


def load_reward(
    name: str | Path,
    judge: Judge | None = None,
    *,
    reference: str | None = None,
    device: torch.device | str | None = None,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    **loading: Any,
) -> Reward:
    """Load any reward: a model, a function FILE.py:NAME or the YAML file of a composition. Arguments and errors as for
    `open_reward`, and

    Args:
        device: default: the GPU if there is one.
        max_tokens: of one forward pass.
    """
    opened = open_reward(name, judge=judge, reference=reference, **loading)
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    refuse_untried(chosen)
    return Loader(chosen, max_tokens).load(opened)


def load_reward_for_job(opened: OpenedReward, deepspeed: Path | None, max_tokens: int, processes: Processes) -> Reward:
    """Load a reward; all processes call this together.

    Args:
        deepspeed: a DeepSpeed JSON, if a model is sharded.

    Raises:
        ModelError: it cannot be loaded, or cannot be sharded.
    """
    if isinstance(opened, OpenedModel):
        return ModelReward(load_for_job(opened.saved, deepspeed, max_tokens, processes), opened.head)
    if deepspeed is not None:
        raise ModelError("--deepspeed shards one model, not a composition or a function; leave it out")
    processes.use_device()
    return Loader(processes.device, max_tokens).load(opened)
