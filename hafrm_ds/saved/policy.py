"""Causal LMs without a reward head: policies of DPO trainings and exports, and the start weights as the reference."""

from dataclasses import dataclass

import torch

from hafrm_ds.data.formatting import PROBE, ChatFormatter
from hafrm_ds.data.packing import PackedBatch, lay_out
from hafrm_ds.data.pairs import assistant
from hafrm_ds.data.tokenization import tokenize_conversation
from hafrm_ds.model.attention import UnsupportedAttention
from hafrm_ds.model.hybrid import HybridModel, layout_difference, lm_head_difference, tolerance_of
from hafrm_ds.model.loading import load_hybrid_model
from hafrm_ds.objective import ResponseScores
from hafrm_ds.saved.folder import SavedModel, SavedStockModel
from hafrm_ds.saved.scorer import Scorer


@dataclass(frozen=True)
class SavedPolicy(SavedStockModel):
    """A folder with a causal LM."""

    heads = ("logprob",)

    def hybrid_model(self, device: torch.device) -> HybridModel:
        """The causal LM, in eval mode, on the CPU, with a reward head that nobody asks. As `SavedModel.hybrid_model`.

        Its layout is that of the training it comes from; of another model, the one that `PolicyModel.load` finds.
        """
        model = load_hybrid_model(self.config, layout=self.metadata.get("layout", "auto"), seed=0, device=device)
        model.uses_stock_logits = self.metadata.get("uses_stock_logits", False)
        return model.eval().requires_grad_(False)


class PolicyModel(Scorer):
    """Log-probs of a causal LM, be it the body of a training."""

    heads = SavedPolicy.heads

    def __init__(self, model: HybridModel, formatter: ChatFormatter, *, max_tokens: int):
        super().__init__(formatter, model.causal_lm.config, layout=model.layout, max_tokens=max_tokens)
        self.model = model

    @classmethod
    def load(cls, saved: SavedModel | SavedPolicy, device: torch.device, max_tokens: int) -> "PolicyModel":
        model, formatter = saved.hybrid_model(device).to(device), saved.formatter()
        if "layout" not in saved.metadata:
            settle_layout(model, formatter, device)
        return cls(model, formatter, max_tokens=max_tokens)

    def forward(self, batch: PackedBatch, **heads: bool) -> ResponseScores:
        return self.model(batch.to(self.model.reward_head.weight.device), **heads)


def settle_layout(model: HybridModel, formatter: ChatFormatter, device: torch.device) -> None:
    """Choose the padded layout, and the model's own logits, where the faster ways change a value, as a training does at
    its start."""
    question = PROBE[:1]
    items = [tokenize_conversation(formatter, [*question, assistant(text)]) for text in ("y", "No, not yet.")]

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
