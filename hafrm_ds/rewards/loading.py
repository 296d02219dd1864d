"""Loading rewards: for a script, and for a job on several processes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hafrm_ds.data.tool_calls import conversation_of
from hafrm_ds.errors import DataError, ModelError
from hafrm_ds.hardware.devices import refuse_untried
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.rewards.composition import open_reward
from hafrm_ds.rewards.model import ModelReward, OpenedModel
from hafrm_ds.rewards.reward import Loader, OpenedReward, Reward, Score
from hafrm_ds.saved.opening import Judge
from hafrm_ds.saved.scorer import DEFAULT_MAX_TOKENS, Conversation
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
    return FromPython(Loader(chosen, max_tokens).load(opened))


@dataclass(frozen=True)
class FromPython:
    """A loaded reward that reads conversations as rows of files are read, so that their scores are those of files."""

    reward: Reward

    def scores(self, conversations: Sequence[Conversation]) -> list[Score]:
        read = [self.read(conversation) for conversation in conversations]
        known = iter(self.reward.scores([each for each in read if not isinstance(each, str)]))
        return [Score.none(each) if isinstance(each, str) else next(known) for each in read]

    @staticmethod
    def read(conversation: Conversation) -> Conversation | str:
        """Its messages, or what is wrong with them."""
        try:
            return conversation_of(conversation, "the conversation")
        except DataError as error:
            return str(error)


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
