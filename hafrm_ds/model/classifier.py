"""Reward models as transformers' AutoModelForSequenceClassification with one label: our exports, and other people's."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from hafrm_ds.config import ModelConfig
from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.packing import PackedBatch
from hafrm_ds.errors import ModelError
from hafrm_ds.model.loading import DTYPES, first_line, load_model_config, load_tokenizer, origin
from hafrm_ds.model.saved import ANY_DAY, dtype_of_weights
from hafrm_ds.model.scorer import Scorer
from hafrm_ds.objective import ResponseScores


@dataclass(frozen=True)
class SavedClassifier:
    """A folder with a sequence-classification model. Build it with `open`.

    folder: where it lies. config: how it is loaded. metadata: {} but for an export of ours.
    chat_template: name or file of a template for a tokenizer without one.
    """

    folder: Path
    config: ModelConfig
    metadata: dict[str, Any]
    chat_template: str | None

    heads = ("reward",)

    @classmethod
    def open(
        cls, folder: Path, options: dict[str, Any], dtype: str | None, metadata: dict, chat_template: str | None
    ) -> "SavedClassifier":
        """Look at a folder without loading its weights.

        Args:
            options: fields of ModelConfig that say how it is loaded.

        Raises:
            ModelError: it has several labels, or weights of a type that needs a choice.
        """
        config = load_model_config(ModelConfig(**options))
        if config.num_labels != 1:
            raise ModelError(
                f"{folder}: the model has {config.num_labels} labels; a reward model has one, whose logit is the reward"
            )
        dtype = dtype_of_weights(folder, dtype or str(config.dtype or "").removeprefix("torch."))
        return cls(folder, ModelConfig(**options, dtype=dtype), metadata, chat_template)

    def formatter(self) -> ChatFormatter:
        return ChatFormatter.create(load_tokenizer(self.config), self.chat_template, ANY_DAY)


class ClassifierModel(Scorer):
    """The logit of a sequence-classification model, as its own forward reads it: where that is, is its own affair."""

    heads = SavedClassifier.heads

    def __init__(self, model: PreTrainedModel, formatter: ChatFormatter, *, max_tokens: int):
        super().__init__(formatter, model.config, layout="padded", max_tokens=max_tokens)
        self.model = model

    @classmethod
    def load(cls, saved: SavedClassifier, device: torch.device, max_tokens: int) -> "ClassifierModel":
        """Raises ModelError if the weights cannot be loaded, or lack the score."""
        try:
            model, report = AutoModelForSequenceClassification.from_pretrained(
                **origin(saved.config), dtype=DTYPES[saved.config.dtype], output_loading_info=True
            )
        except (OSError, ValueError, ImportError, SafetensorError) as error:
            raise ModelError(f"{saved.folder} cannot be loaded: {first_line(error)}") from error
        if missing := sorted(report["missing_keys"]):  # transformers only warns, and goes on with random values
            raise ModelError(
                f"{saved.folder}: the weight files lack {', '.join(missing[:5])}, so the scores would be random"
            )
        return cls(model.eval().requires_grad_(False).to(device), saved.formatter(), max_tokens=max_tokens)

    def forward(self, batch: PackedBatch, *, with_reward: bool, with_logprob: bool) -> ResponseScores:
        batch = batch.to(next(self.model.parameters()).device)
        pad = self.model.config.get_text_config().pad_token_id
        if pad is None:  # the stock class then takes single rows alone
            rows = [ids[mask.bool()][None] for ids, mask in zip(batch.input_ids, batch.attention_mask)]
            logits = torch.cat([self.model(ids, use_cache=False).logits for ids in rows])
        else:
            ids = torch.where(batch.attention_mask.bool(), batch.input_ids, pad)
            logits = self.model(ids, attention_mask=batch.attention_mask, use_cache=False).logits
        return ResponseScores(logits[:, 0].float(), None, batch.num_tokens)
