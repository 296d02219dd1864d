"""A trained model for whoever uses it: conversations in, rewards and log-probs out."""

from collections.abc import Sequence
from pathlib import Path

import torch

from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.packing import PackedBatch
from hafrm_ds.data.tokenization import PromptWithResponses
from hafrm_ds.errors import DataError
from hafrm_ds.hardware.devices import refuse_untried
from hafrm_ds.model.hybrid import HybridModel
from hafrm_ds.objective import ResponseScores
from hafrm_ds.saved.folder import SavedModel
from hafrm_ds.saved.scorer import DEFAULT_MAX_TOKENS, Conversation, Scorer, as_conversations


class HybridRewardModel(Scorer):
    """A trained `HybridModel` with the formatter it was trained with. Build it with `from_pretrained`.

    Conversations go through in micro-batches of at most `max_tokens` tokens. Those with the same prompt (everything
    before the last message) share its computation, so N answers to one question are scored for little more than their
    own tokens; a value does not depend on what it was computed beside.

    Attributes:
        model: the network. formatter: messages -> token ids.
    """

    def __init__(
        self,
        model: HybridModel,
        formatter: ChatFormatter,
        *,
        max_tokens: int,
        heads: tuple[str, ...] = ("reward", "logprob"),
        attributes: tuple[str, ...] = (),
    ):
        super().__init__(formatter, model.causal_lm.config, layout=model.layout, max_tokens=max_tokens)
        self.model, self.heads, self.attributes = model, heads, attributes

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
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        refuse_untried(chosen)
        return cls.load(saved, chosen, max_tokens)

    @classmethod
    def load(cls, saved: SavedModel, device: torch.device, max_tokens: int) -> "HybridRewardModel":
        model, said = saved.hybrid_model(device).to(device), {"heads": saved.heads, "attributes": saved.attributes}
        return cls(model, saved.formatter(), max_tokens=max_tokens, **said)

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

        def ask(groups: list[PromptWithResponses]) -> list:
            return self.token_logprobs(groups) if per_token else self.values(groups, ("logprob",))[:, 0].tolist()

        values = self.of_conversations(map(self.encode, conversations), ask)
        return values[0] if is_one else values

    def forward(self, batch: PackedBatch, **heads: bool) -> ResponseScores:
        weight = self.model.reward_head.weight
        # Kernels that are compiled at their first call run on the current GPU, and pinned memory is that GPU's.
        with torch.cuda.device_of(weight):
            return self.model(batch.to(weight.device), **heads)
