"""What every model that scores has in common: groups in, a value for each response out, in micro-batches.

Scoring of files, evaluation and best-of-N ask for nothing else, so they take any kind of model (`model.opening`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from transformers import PretrainedConfig

from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.packing import PackedBatch, share_prompts, split_groups
from hafrm_ds.data.pairs import Message
from hafrm_ds.data.tokenization import PromptWithResponses, tokenize_conversation
from hafrm_ds.engine.scoring import score_items
from hafrm_ds.errors import DataError, ModelError
from hafrm_ds.model.loading import known_positions
from hafrm_ds.objective import ResponseScores

Conversation = list[Message]
Read = Callable[[ResponseScores], list[Any]]
"""What a caller wants of the scores of a micro-batch: a value a response."""
DEFAULT_MAX_TOKENS = 8192
NO_REWARD = (
    "the model has no reward head, or was trained without a reward loss (objective.rm_weight 0). It has log-probs, and "
    "against a reference policy an implicit reward"
)


class Scorer(ABC):
    """A model with its formatter.

    Groups (a prompt with its responses) go through in micro-batches of at most `max_tokens` tokens. The responses of a
    group share the computation of its prompt where the layout allows it; a value does not depend on what it was
    computed beside.

    Attributes:
        formatter: messages -> token ids.
        layout: of the micro-batches.
        heads: what it can say of a conversation, of "reward" and "logprob".
        max_length: tokens of the longest conversation.
        rank, num_ranks: of the processes that share the work of one call; this one alone here.
    """

    heads: tuple[str, ...]
    rank, num_ranks = 0, 1

    def __init__(self, formatter: ChatFormatter, config: PretrainedConfig, *, layout: str, max_tokens: int):
        self.formatter, self.layout, self.max_tokens = formatter, layout, max_tokens
        self.max_length = min(max_tokens, known_positions(config))

    @abstractmethod
    def forward(self, batch: PackedBatch, *, with_reward: bool, with_logprob: bool) -> ResponseScores:
        """Scores of a micro-batch that lies on the CPU."""

    def encode(self, messages: Conversation) -> PromptWithResponses:
        """Messages -> token ids, a group of one response.

        Raises:
            DataError: a conversation that the template refuses, or that is longer than max_tokens or the model knows.
        """
        ids = tokenize_conversation(self.formatter, messages)
        length = ids.longest_conversation
        if length > self.max_length:
            what = "max_tokens" if self.max_length == self.max_tokens else "the positions that the model knows"
            raise DataError(f"the conversation has {length:,} tokens, more than {what} ({self.max_length:,})")
        return ids

    def score_ids(self, conversations: Iterable[PromptWithResponses]) -> list[float]:
        """Rewards of encoded conversations, in order. Raises ModelError if the model has none to give."""
        if "reward" not in self.heads:
            raise ModelError(NO_REWARD)
        return self.of_conversations(conversations, lambda scores: scores.of("reward").tolist(), ("reward",))

    def of_conversations(
        self, conversations: Iterable[PromptWithResponses], read: Read, heads: tuple[str, ...]
    ) -> list[Any]:
        """What `read` takes of free conversations, in their order. Prompts that they share are searched for."""
        groups, places = share_prompts(list(conversations))
        values = dict(zip(places, self.run(groups, read, heads), strict=True))
        return [values[position] for position in range(len(values))]

    def values(self, groups: Iterable[PromptWithResponses], heads: tuple[str, ...]) -> np.ndarray:
        """What `heads` say of the responses of groups: [responses, heads] fp32, in order."""

        def read(scores: ResponseScores) -> list:
            return list(zip(*(scores.of(head).tolist() for head in heads)))

        return np.array(self.run(groups, read, heads), dtype=np.float32).reshape(-1, len(heads))

    def run(self, groups: Iterable[PromptWithResponses], read: Read, heads: tuple[str, ...]) -> list[Any]:
        """What `read` takes from the scores of a micro-batch, a value a response, in the order of the responses."""
        items = split_groups(groups, self.layout, self.max_tokens)
        num_responses = np.array([len(item.responses) for item in items], dtype=np.int64)
        first = np.cumsum(num_responses) - num_responses  # place of an item's first response
        values: dict[int, Any] = {}

        def keep(batch: list[int], scores: ResponseScores) -> None:
            places = [first[number] + k for number in batch for k in range(num_responses[number])]
            values.update(zip(places, read(scores), strict=True))

        score_items(
            self.forward,
            items.__getitem__,
            np.array([len(prompt) + sum(map(len, responses)) for prompt, responses in items], dtype=np.int64),
            num_responses=num_responses,
            layout=self.layout,
            max_tokens=self.max_tokens,
            on_scores=keep,
            with_reward="reward" in heads,
            with_logprob="logprob" in heads,
            rank=self.rank,
            num_ranks=self.num_ranks,
        )
        values = self.of_all_ranks(values)
        return [values[place] for place in range(int(num_responses.sum()))]

    def of_all_ranks(self, values: dict[int, Any]) -> dict[int, Any]:
        """Values by position, those that other ranks have computed among them."""
        return values
