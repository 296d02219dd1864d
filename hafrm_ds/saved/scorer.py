"""What every model that scores has in common: groups in, a value for each response out, in micro-batches.

Scoring of files, evaluation and best-of-N ask for nothing else, so they take any kind of model (`saved.opening`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import numpy as np
import torch
from transformers import PretrainedConfig

from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.packing import PackedBatch, share_prompts, split_groups
from hafrm_ds.data.pairs import Message, assistant, in_words
from hafrm_ds.data.tokenization import PromptWithResponses, tokenize_conversation
from hafrm_ds.data.tool_calls import conversation_of
from hafrm_ds.engine.scoring import Items, score_items
from hafrm_ds.errors import DataError, ModelError
from hafrm_ds.model.sizes import ModelSizes
from hafrm_ds.objective import ResponseScores, attribute_heads

Conversation = list[Message]
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
        attributes: names of what it says beside a reward.
        ranks_on: the device of the process group if all its ranks share the work of each call; None: this one alone.
    """

    heads: tuple[str, ...]
    attributes: tuple[str, ...] = ()
    ranks_on: torch.device | None = None

    def __init__(self, formatter: ChatFormatter, config: PretrainedConfig, *, layout: str, max_tokens: int):
        self.formatter, self.layout, self.max_tokens = formatter, layout, max_tokens
        self.sizes = ModelSizes.of(config.name_or_path or "the model", config)

    @abstractmethod
    def forward(self, batch: PackedBatch, *, with_reward: bool, with_logprob: bool) -> ResponseScores:
        """Scores of a micro-batch that lies on the CPU."""

    def encode(self, messages: Conversation) -> PromptWithResponses:
        """Messages -> token ids, a group of one response. Raises DataError as `encode_for` does."""
        return encode_for(self.sizes, self.formatter, messages, self.max_tokens)

    def score_ids(self, conversations: Iterable[PromptWithResponses]) -> list[float]:
        """Rewards of encoded conversations, in order. Raises ModelError if the model has none to give."""
        return [reward for reward, *_ in self.rate_ids(conversations)]

    def rate_ids(self, conversations: Iterable[PromptWithResponses]) -> list[list[float]]:
        """Reward and attributes of encoded conversations, in order. Raises ModelError if the model has no reward."""
        if "reward" not in self.heads:
            raise ModelError(NO_REWARD)
        heads = ("reward", *attribute_heads(self.attributes))
        return self.of_conversations(conversations, lambda groups: self.values(groups, heads).tolist())

    def rate(
        self, messages: Conversation | Sequence[Conversation], responses: Sequence[str] | None = None
    ) -> dict[str, float] | list[dict[str, float]]:
        """Reward and attributes of a conversation, by name; {"reward": ...} alone of a model without attributes.
        Arguments, returns and errors as for `score`."""
        conversations, is_one = as_conversations(messages, responses)
        names = ("reward", *self.attributes)
        values = [dict(zip(names, each)) for each in self.rate_ids(map(self.encode, conversations))]
        return values[0] if is_one else values

    def score(
        self, messages: Conversation | Sequence[Conversation], responses: Sequence[str] | None = None
    ) -> float | list[float]:
        """The reward of a conversation, read at its last token.

        Args:
            messages: one conversation (a list of {"role": ..., "content": ...}) or a list of them.
            responses: answers of the assistant to the one conversation `messages`, each scored by itself.

        Returns:
            A reward for one conversation, else a list of rewards in the order given.

        Raises:
            DataError: what is no conversation, or one that the template refuses, or that is longer than max_tokens or
                the model knows.
            ModelError: the model was trained without a reward loss.
        """
        conversations, is_one = as_conversations(messages, responses)
        rewards = self.score_ids(map(self.encode, conversations))
        return rewards[0] if is_one else rewards

    def of_conversations(self, conversations: Iterable[PromptWithResponses], ask: Callable[[list], list]) -> list:
        """What `ask` finds of free conversations, in their order. Prompts that they share are searched for.

        Args:
            ask: groups -> a value for each of their responses, in order.
        """
        groups, places = share_prompts(list(conversations))
        values = dict(zip(places, ask(groups), strict=True))
        return [values[place] for place in range(len(values))]

    def values(self, groups: Iterable[PromptWithResponses], heads: Sequence[str]) -> np.ndarray:
        """What `heads` say of the responses of groups: [responses, heads] fp32, in order."""
        return self.run(split_groups(groups, self.layout, self.max_tokens), heads).reshape(-1, len(heads))

    def token_logprobs(self, groups: Iterable[PromptWithResponses]) -> list[list[float]]:
        """log pi of each token of the responses of groups, in order."""
        items = split_groups(groups, self.layout, self.max_tokens)
        lengths = [[len(response) for response in item.responses] for item in items]
        sizes = np.array([sum(own) for own in lengths], dtype=np.int64)
        values = self.run(items, ("logprob",), read=lambda scores: scores.of("token_logprobs"), sizes=sizes)
        ends = np.cumsum([length for own in lengths for length in own])
        return [part.tolist() for part in np.split(values, ends[:-1])]

    def run(self, items: list[PromptWithResponses], heads: Sequence[str], **read: Any) -> np.ndarray:
        """`engine.scoring.score_items` with this model."""
        num_responses = np.array([len(item.responses) for item in items], dtype=np.int64)
        costs = np.array([len(prompt) + sum(map(len, responses)) for prompt, responses in items], dtype=np.int64)
        values = score_items(
            self.forward,
            Items(items.__getitem__, num_responses, costs),
            heads,
            layout=self.layout,
            max_tokens=self.max_tokens,
            ranks_on=self.ranks_on,
            **read,
        )
        assert values is not None  # nothing interrupts it
        return values


def encode_for(
    sizes: ModelSizes, formatter: ChatFormatter, messages: Conversation, max_tokens: int
) -> PromptWithResponses:
    """Messages -> token ids, a group of one response, for a model of these sizes, which need not be loaded.

    Raises:
        DataError: a conversation that the template refuses, is longer than max_tokens or the model knows, or holds
            tokens that the model has no embedding for.
    """
    return check_fits(sizes, formatter, tokenize_conversation(formatter, messages), max_tokens)


def check_fits(
    sizes: ModelSizes, formatter: ChatFormatter, ids: PromptWithResponses, max_tokens: int
) -> PromptWithResponses:
    """The ids themselves. Raises DataError as `encode_for` does of what is too long or has no embedding."""
    length, max_length = ids.longest_conversation, min(max_tokens, sizes.positions)
    if length > max_length:
        what = "max_tokens" if max_length == max_tokens else "the positions that the model knows"
        raise DataError(f"the conversation has {length:,} tokens, more than {what} ({max_length:,})")
    sizes.check_ids((ids.prompt, *ids.responses), formatter.tokenizer)
    return ids


def as_conversations(
    messages: Conversation | Sequence[Conversation], responses: Sequence[str] | None
) -> tuple[list[Conversation], bool]:
    """Tell the conversations that `messages` and `responses` stand for, and whether a single one was meant.

    They are read as rows of files are, so that a conversation has the same score there.

    Raises:
        DataError: they are no conversations.
    """
    if isinstance(messages, str | dict):
        raise DataError(f"`messages` is {in_words(messages)}, expected a list of messages, or a list of such lists")
    is_one = bool(messages) and isinstance(messages[0], dict)
    if responses is None:
        given = cast(list[Conversation], [messages] if is_one else list(messages))
    elif not is_one:
        raise DataError("responses belong to one conversation, but `messages` is a list of conversations")
    elif isinstance(responses, str):
        raise DataError(f"`responses` is {in_words(responses)}, expected a list of answers")
    else:
        given = [[*cast(Conversation, messages), assistant(response)] for response in responses]
    names = [f"conversation {number}" if len(given) > 1 else "the conversation" for number in range(1, len(given) + 1)]
    # Of no message at all `tokenize_conversation` says so.
    read = [conversation_of(each, name) if each else [] for each, name in zip(given, names)]
    return read, is_one and responses is None
