"""Causal LMs without a reward head: policies of DPO trainings and exports, and the start weights as the reference."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hafrm_ds.config import ModelConfig
from hafrm_ds.data.formatting import PROBE, ChatFormatter
from hafrm_ds.data.packing import PackedBatch, PromptWithResponses, lay_out
from hafrm_ds.data.pairs import assistant
from hafrm_ds.data.tokenization import tokenize_conversation
from hafrm_ds.model.attention import UnsupportedAttention
from hafrm_ds.model.hybrid import HybridModel, layout_difference, lm_head_difference, tolerance_of
from hafrm_ds.model.loading import load_hybrid_model, load_model_config, load_tokenizer
from hafrm_ds.model.saved import ANY_DAY, dtype_of_weights
from hafrm_ds.model.scorer import Scorer
from hafrm_ds.objective import ResponseScores


@dataclass(frozen=True)
class SavedPolicy:
    """A folder with a causal LM. Build it with `open`.

    folder: where it lies. config: how it is loaded. metadata: {} but for an export of ours.
    chat_template: name or file of a template for a tokenizer without one.
    """

    folder: Path
    config: ModelConfig
    metadata: dict[str, Any]
    chat_template: str | None

    heads = ("logprob",)

    @classmethod
    def open(
        cls, folder: Path, options: dict[str, Any], dtype: str | None, metadata: dict, chat_template: str | None
    ) -> "SavedPolicy":
        """Look at a folder without loading its weights.

        Args:
            options: fields of ModelConfig that say how it is loaded.

        Raises:
            ModelError: its weights are of a type that needs a choice.
        """
        config = load_model_config(ModelConfig(**options))
        dtype = dtype_of_weights(folder, dtype or str(config.dtype or "").removeprefix("torch."))
        return cls(folder, ModelConfig(**options, dtype=dtype), metadata, chat_template)

    def formatter(self) -> ChatFormatter:
        return ChatFormatter.create(load_tokenizer(self.config), self.chat_template, ANY_DAY)

    def hybrid_model(self, device: torch.device) -> HybridModel:
        """The causal LM, in eval mode, on the CPU, with a reward head that nobody asks. As `SavedModel.hybrid_model`.

        Its layout is that of the training it comes from; of another model, the one that `PolicyModel.load` finds.
        """
        model = load_hybrid_model(self.config, layout=self.metadata.get("layout", "auto"), seed=0, device=device)
        model.uses_stock_logits = self.metadata.get("uses_stock_logits", False)
        return model.eval().requires_grad_(False)


class PolicyModel(Scorer):
    """Log-probs of a causal LM."""

    heads = SavedPolicy.heads

    def __init__(self, model: HybridModel, formatter: ChatFormatter, *, max_tokens: int):
        super().__init__(formatter, model.causal_lm.config, layout=model.layout, max_tokens=max_tokens)
        self.model = model

    @classmethod
    def load(cls, saved: SavedPolicy, device: torch.device, max_tokens: int) -> "PolicyModel":
        model, formatter = saved.hybrid_model(device).to(device), saved.formatter()
        if "layout" not in saved.metadata:
            settle_layout(model, formatter, device)
        return cls(model, formatter, max_tokens=max_tokens)

    def forward(self, batch: PackedBatch, **heads: bool) -> ResponseScores:
        return self.model(batch.to(self.model.reward_head.weight.device), **heads)


def settle_layout(model: HybridModel, formatter: ChatFormatter, device: torch.device) -> None:
    """Go over to the padded layout and to the model's own logits where the faster ways change a value, as a training
    does at its start."""
    question = PROBE[:1]
    answers = [tokenize_conversation(formatter, [*question, assistant(text)]) for text in ("y", "No, not yet.")]
    items = [PromptWithResponses(prompt, (response,)) for prompt, response in answers]

    def forward(batch: PackedBatch, **heads: bool) -> ResponseScores:
        return model(batch.to(device), **heads)

    try:
        difference = layout_difference(model, forward, items, model.layout, with_logprob=True)
    except UnsupportedAttention:
        difference = float("inf")
    if not difference <= tolerance_of(model):
        model.use_layout("padded", "auto", device)
    batch = lay_out(items, model.layout).to(device)
    model.uses_stock_logits = not lm_head_difference(model, forward, batch) <= tolerance_of(model)
