"""What everything that turns conversations into numbers has in common: values, or the reason why there is none.

A reward is opened first, without weights (`OpenedReward`): what is wrong with it is said then, and its identity is
known. Then it is loaded (`Loader`) and asked (`Reward`). Kinds: `model`, `function`, `ensemble`, `hierarchy`.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from hafrm_ds.saved.scorer import Conversation


@dataclass(frozen=True)
class Score:
    """What a reward says of a conversation.

    value: None where it could not be computed. error: why, else "".
    attributes: what a model says beside its reward, in the order of its names for them; () of all else.
    spans: the values of parts of the answer, as of its sentences, of which `value` is the mean; () of a reward that
        gives one value alone.
    """

    value: float | None
    error: str = ""
    spans: tuple[float, ...] = ()
    attributes: tuple[float, ...] = ()

    @classmethod
    def none(cls, error: str) -> "Score":
        return cls(None, error)


class Reward(Protocol):
    """A loaded reward. One thread at a time asks it."""

    def scores(self, conversations: Sequence[Conversation]) -> list[Score]:
        """The score of each conversation, in order. A conversation's own fault is its score's error, never a 0.

        Raises:
            NoRoomError: the device has no room for so many.
        """


class OpenedReward(Protocol):
    """A reward whose weights are not loaded and whose functions do not run yet."""

    def identity(self) -> dict[str, Any]:
        """What the scores depend on, JSON-serialisable: hashes or stamps of the parts, and all settings."""

    def load(self, loader: "Loader") -> Reward:
        """Load it. Raises ModelError if it cannot be loaded."""


@dataclass
class Loader:
    """Loads rewards onto one device; equal parts of a composition are loaded once.

    max_tokens: of one forward pass. loaded: fingerprint -> reward.
    """

    device: torch.device
    max_tokens: int
    loaded: dict[str, Reward] = field(default_factory=dict)

    def load(self, opened: OpenedReward) -> Reward:
        key = fingerprint_of(opened)
        if key not in self.loaded:
            self.loaded[key] = opened.load(self)
        return self.loaded[key]


def fingerprint_of(opened: OpenedReward) -> str:
    """SHA-256 of a reward's identity, hexadecimal: it changes where a score could."""
    return hashlib.sha256(json.dumps(opened.identity(), sort_keys=True).encode()).hexdigest()


# ---- in units of its deviation ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OpenedNormalised:
    """A reward, to be given as (value - mean) / deviation."""

    reward: OpenedReward
    mean: float
    deviation: float

    def identity(self) -> dict[str, Any]:
        return {"normalised": self.reward.identity(), "mean": self.mean, "deviation": self.deviation}

    def load(self, loader: Loader) -> "Normalised":
        return Normalised(loader.load(self.reward), self.mean, self.deviation)


@dataclass(frozen=True)
class Normalised:
    """A loaded reward as (value - mean) / deviation, its spans alike."""

    reward: Reward
    mean: float
    deviation: float

    def scores(self, conversations: Sequence[Conversation]) -> list[Score]:
        return [self.of(score) for score in self.reward.scores(conversations)]

    def of(self, score: Score) -> Score:
        if score.value is None:
            return score
        value, *spans = ((each - self.mean) / self.deviation for each in (score.value, *score.spans))
        return Score(value, spans=tuple(spans))
