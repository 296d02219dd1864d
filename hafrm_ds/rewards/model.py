"""A saved model as a reward, by any of its judges."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hafrm_ds.data.tokenization import PromptWithResponses
from hafrm_ds.errors import DataError
from hafrm_ds.objective import attribute_heads
from hafrm_ds.rewards.reward import Loader, Score
from hafrm_ds.saved.opening import SavedScorer, identity_of_model, load_scorer
from hafrm_ds.saved.scorer import Conversation, Scorer

NOT_FINITE = "the score is not finite"


@dataclass(frozen=True)
class OpenedModel:
    """A model that gives a reward. head: what is read of it, "reward" or "logprob" (the summed log-prob)."""

    saved: SavedScorer
    head: str = "reward"

    def identity(self) -> dict[str, Any]:
        head = {} if self.head == "reward" else {"head": self.head}
        return identity_of_model(self.saved) | head | {"template": self.saved.formatter().fingerprint}

    def load(self, loader: Loader) -> "ModelReward":
        return ModelReward(load_scorer(self.saved, loader.device, loader.max_tokens), self.head)


@dataclass(frozen=True)
class ModelReward:
    """A loaded model. Conversations with the same prompt share its computation."""

    scorer: Scorer
    head: str = "reward"

    def scores(self, conversations: Sequence[Conversation]) -> list[Score]:
        """Raises NoRoomError if the device has no room for a micro-batch."""
        return self.of_encoded([self.encode(conversation) for conversation in conversations])

    def of_encoded(self, encoded: Sequence[PromptWithResponses | str]) -> list[Score]:
        """As `scores`, of token ids, or of what is wrong with a conversation."""
        known = [each for each in encoded if not isinstance(each, str)]
        values = iter(self.scorer.of_conversations(known, self.ask) if known else ())
        return [Score.none(each) if isinstance(each, str) else as_score(*next(values)) for each in encoded]

    @property
    def attributes(self) -> tuple[str, ...]:
        """Names of what the model says beside its reward."""
        return self.scorer.attributes if self.head == "reward" else ()

    def ask(self, groups: list[PromptWithResponses]) -> list[list[float]]:
        """What is read of it, and its attributes."""
        return self.scorer.values(groups, (self.head, *attribute_heads(self.attributes))).tolist()

    def encode(self, conversation: Conversation) -> PromptWithResponses | str:
        """Its token ids, or what is wrong with it."""
        if self.head == "logprob" and len(conversation) < 2:
            return "a log-prob needs a prompt and an answer: a conversation of two messages at least"
        try:
            return self.scorer.encode(conversation)
        except DataError as error:
            return str(error)


def as_score(value: float, *attributes: float) -> Score:
    is_finite = all(map(math.isfinite, (value, *attributes)))
    return Score(value, attributes=attributes) if is_finite else Score.none(NOT_FINITE)
