"""Reward models as transformers' AutoModelForSequenceClassification: our exports, and other people's with one label."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.packing import PackedBatch
from hafrm_ds.errors import ModelError
from hafrm_ds.model.loading import DTYPES, first_line, origin
from hafrm_ds.objective import ResponseScores
from hafrm_ds.saved.folder import SavedStockModel
from hafrm_ds.saved.scorer import Scorer

REWARD_LABEL, LABEL_OFFSETS = "reward", "label_offsets"
"""The first label of an export with attributes, and the key of its config.json that says what is to be added to each
logit: `score` has no bias."""


@dataclass(frozen=True)
class SavedClassifier(SavedStockModel):
    """A folder with a sequence-classification model."""

    heads = ("reward",)

    @classmethod
    def check(cls, folder: Path, config: PretrainedConfig) -> None:
        if config.num_labels != 1 and not cls.attributes_of(config):
            raise ModelError(
                f"{folder}: the model has {config.num_labels} labels; a reward model has one, whose logit is the reward"
            )

    @classmethod
    def attributes_of(cls, config: PretrainedConfig) -> tuple[str, ...]:
        """The labels of an export of ours behind the first, which is the reward."""
        names = [config.id2label[place] for place in range(config.num_labels)]
        return tuple(names[1:]) if hasattr(config, LABEL_OFFSETS) and names[0] == REWARD_LABEL else ()


class ClassifierModel(Scorer):
    """The logits of a sequence-classification model, as its own forward reads them: where, is its own affair."""

    heads = SavedClassifier.heads

    def __init__(
        self, model: PreTrainedModel, formatter: ChatFormatter, *, max_tokens: int, attributes: tuple[str, ...] = ()
    ):
        super().__init__(formatter, model.config, layout="padded", max_tokens=max_tokens)
        self.model, self.attributes = model, attributes

    @classmethod
    def load(cls, saved: SavedClassifier, device: torch.device, max_tokens: int) -> "ClassifierModel":
        """Raises ModelError if the weights cannot be loaded, or lack the score."""
        try:
            model, report = AutoModelForSequenceClassification.from_pretrained(
                **origin(saved.config), dtype=DTYPES[saved.config.dtype], output_loading_info=True
            )
        except (OSError, ValueError, ImportError, SafetensorError) as error:
            raise ModelError(f"{saved.folder} cannot be loaded: {first_line(error)}") from error
        if missing := sorted(report["missing_keys"]):  # transformers only warns, and takes random values
            raise ModelError(
                f"{saved.folder}: the weight files lack {', '.join(missing[:5])}, so the scores would be random"
            )
        model = model.eval().requires_grad_(False).to(device)
        return cls(model, saved.formatter(), max_tokens=max_tokens, attributes=saved.attributes)

    def forward(self, batch: PackedBatch, *, with_reward: bool, with_logprob: bool) -> ResponseScores:
        batch = batch.to(next(self.model.parameters()).device)
        mask = batch.attention_mask
        assert mask is not None  # its layout is padded
        mask = mask.bool()
        pad = self.model.config.get_text_config().pad_token_id
        if pad is None:  # the stock class then takes single rows alone
            rows = [ids[own][None] for ids, own in zip(batch.input_ids, mask)]
            logits = torch.cat([self.model(ids, use_cache=False).logits for ids in rows])
        else:
            ids = torch.where(mask, batch.input_ids, pad)
            logits = self.model(ids, attention_mask=batch.attention_mask, use_cache=False).logits
        logits, attributes = logits.float(), None
        if self.attributes:
            attributes = (logits + logits.new_tensor(getattr(self.model.config, LABEL_OFFSETS)))[:, 1:]
        return ResponseScores(logits[:, 0], None, batch.num_tokens, attributes=attributes)
