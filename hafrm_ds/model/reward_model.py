"""A trained model for whoever uses it: conversations in, rewards and log-probs out."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.packing import PackedBatch, share_prompts
from hafrm_ds.data.pairs import Message, assistant
from hafrm_ds.data.tokenization import ConversationIds, tokenize_conversation
from hafrm_ds.errors import DataError
from hafrm_ds.model.batched_scoring import score_items
from hafrm_ds.model.hybrid import HybridModel
from hafrm_ds.model.saved import SavedModel
from hafrm_ds.objective import ResponseScores

Conversation = list[Message]
DEFAULT_MAX_TOKENS = 8192


class HybridRewardModel:
    """A trained `HybridModel` with the formatter it was trained with. Build it with `from_pretrained`.

    Conversations go through in micro-batches of at most `max_tokens` tokens. Those with the same prompt (everything
    before the last message) share its computation, so N answers to one question are scored for little more than their
    own tokens; a value does not depend on what it was computed beside.

    Attributes:
        model: the network. formatter: messages -> token ids.
        rank, num_ranks: of the processes that share the work of one call; this one alone here.
    """

    rank, num_ranks = 0, 1

    def __init__(self, model: HybridModel, formatter: ChatFormatter, *, max_tokens: int):
        self.model, self.formatter, self.max_tokens = model, formatter, max_tokens
        positions = getattr(model.causal_lm.config.get_text_config(), "max_position_embeddings", None)
        self.max_length = min(max_tokens, positions or max_tokens)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        dtype: str | None = None,
        device: torch.device | str | None = None,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        trust_remote_code: bool = False,
        trust_pickle: bool = False,
    ) -> "HybridRewardModel":
        """Load the final/ folder of a training, an export of its adapter, or a copy of one of these on the hub.

        An adapter is merged into its base, which is loaded from where adapter_config.json names it. Neither DeepSpeed
        nor peft is needed.

        Args:
            revision: branch, tag or commit on the hub.
            dtype: "bfloat16" or "float32". Default: that of the saved weights.
            device: default: the GPU if there is one.
            max_tokens: of one forward pass. More is faster until memory runs out.
            trust_remote_code: run modelling code that comes with the folder.
            trust_pickle: read weights that are not in safetensors; reading a pickle may run code.

        Raises:
            ModelError: the folder cannot be used; the message says why.
        """
        saved = SavedModel.open(
            name_or_path,
            revision=revision,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            trust_pickle=trust_pickle,
        )
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(saved.hybrid_model(device).to(device), saved.formatter(), max_tokens=max_tokens)

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
            DataError: a conversation that the template refuses, or that is longer than max_tokens or the model knows.
        """
        conversations, is_one = as_conversations(messages, responses)
        rewards = self.score_ids(map(self.encode, conversations))
        return rewards[0] if is_one else rewards

    def log_probs(
        self,
        messages: Conversation | Sequence[Conversation],
        responses: Sequence[str] | None = None,
        *,
        per_token: bool = False,
    ) -> float | list[float] | list[list[float]]:
        """log pi(last message | everything before it) of the policy, summed over the message's tokens.

        The template's end of the message counts, as in training. Arguments and errors as for `score`; a conversation of
        one message has no prompt and is refused.

        Args:
            per_token: the log-prob of each token instead of their sum.
        """
        conversations, is_one = as_conversations(messages, responses)
        if any(len(conversation) < 2 for conversation in conversations):
            raise DataError("a log-prob needs a prompt and an answer: a conversation of two messages at least")
        values = self.log_prob_ids(map(self.encode, conversations), per_token=per_token)
        return values[0] if is_one else values

    def encode(self, messages: Conversation) -> ConversationIds:
        """Messages -> token ids. Raises DataError as `score` does."""
        ids = tokenize_conversation(self.formatter, messages)
        length = len(ids.prompt) + len(ids.response)
        if length > self.max_length:
            what = "max_tokens" if self.max_length == self.max_tokens else "the positions that the model knows"
            raise DataError(f"the conversation has {length:,} tokens, more than {what} ({self.max_length:,})")
        return ids

    def score_ids(self, conversations: Iterable[ConversationIds]) -> list[float]:
        """Rewards of encoded conversations, in order."""
        return self.run(conversations, lambda scores: scores.reward.tolist(), with_logprob=False)

    def log_prob_ids(
        self, conversations: Iterable[ConversationIds], *, per_token: bool = False
    ) -> list[float] | list[list[float]]:
        """Log-probs of the responses of encoded conversations, in order."""

        def read(scores: ResponseScores) -> list:
            if not per_token:
                return scores.logprob.tolist()
            return [part.tolist() for part in scores.token_logprobs.split(scores.num_tokens.tolist())]

        return self.run(conversations, read, with_reward=False)

    def run(
        self, conversations: Iterable[ConversationIds], read: Callable[[ResponseScores], list], **heads: bool
    ) -> list:
        """What `read` takes from the scores of a micro-batch, a value a response, put in the conversations' order."""
        conversations = list(conversations)
        items, places, costs = share_prompts(conversations, self.model.layout, self.max_tokens)
        values: dict[int, Any] = {}

        def keep(batch: list[int], scores: ResponseScores) -> None:
            positions = [position for number in batch for position in places[number]]
            values.update(zip(positions, read(scores), strict=True))

        score_items(
            self.forward,
            items.__getitem__,
            costs,
            layout=self.model.layout,
            max_tokens=self.max_tokens,
            on_scores=keep,
            rank=self.rank,
            num_ranks=self.num_ranks,
            **heads,
        )
        values = self.of_all_ranks(values)
        return [values[position] for position in range(len(conversations))]

    def forward(self, batch: PackedBatch, **heads: bool) -> ResponseScores:
        return self.model(batch.to(self.model.reward_head.weight.device), **heads)

    def of_all_ranks(self, values: dict[int, Any]) -> dict[int, Any]:
        """Values by position, those that other ranks have computed among them."""
        return values


def as_conversations(
    messages: Conversation | Sequence[Conversation], responses: Sequence[str] | None
) -> tuple[list[Conversation], bool]:
    """-> (conversations, whether a single one was meant)."""
    is_one = bool(messages) and isinstance(messages[0], dict)
    if responses is not None:
        if not is_one:
            raise DataError("responses belong to one conversation, but `messages` is a list of conversations")
        return [[*messages, assistant(response)] for response in responses], False
    return ([messages] if is_one else list(messages)), is_one
