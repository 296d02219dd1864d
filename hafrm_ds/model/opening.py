"""Any model that scores: what lies in a folder, and the scorer for it."""

import json
from pathlib import Path
from typing import Any

import torch

from hafrm_ds.config import ModelConfig
from hafrm_ds.errors import ModelError
from hafrm_ds.model.classifier import ClassifierModel, SavedClassifier
from hafrm_ds.model.loading import local_folder
from hafrm_ds.model.policy import PolicyModel, SavedPolicy
from hafrm_ds.model.reward_model import HybridRewardModel
from hafrm_ds.model.saved import SavedModel, refuse_pickles
from hafrm_ds.model.saving import METADATA_FILE
from hafrm_ds.model.scorer import Scorer

Saved = SavedModel | SavedClassifier | SavedPolicy
SCORERS: dict[type, type[Scorer]] = {
    SavedModel: HybridRewardModel,
    SavedClassifier: ClassifierModel,
    SavedPolicy: PolicyModel,
}


def open_model(
    name_or_path: str | Path,
    *,
    dtype: str | None = None,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
    trust_pickle: bool = False,
) -> Saved:
    """Look at a model without loading its weights: the final/ folder of a training or an export of its adapter, a
    sequence-classification model with one label, or a causal LM.

    Args:
        name_or_path: a folder or a hub id.
        dtype: "bfloat16" or "float32". Default: that of the saved weights.
        chat_template: name or file of a template for a tokenizer without one; a training's own model has one.

    Raises:
        ModelError: it is none of these, or cannot be used.
    """
    trust = {"trust_remote_code": trust_remote_code}
    folder = local_folder(ModelConfig(name_or_path=str(name_or_path), **trust))
    metadata = read_json(folder / METADATA_FILE)
    if metadata.get("format") in ("hybrid", "adapter"):
        return SavedModel.open(folder, dtype=dtype, trust_pickle=trust_pickle, **trust)
    architectures = read_json(folder / "config.json").get("architectures") or [""]
    for ending, kind in (("ForSequenceClassification", SavedClassifier), ("ForCausalLM", SavedPolicy)):
        if architectures[0].endswith(ending):
            refuse_pickles(folder, trust_pickle)
            return kind.open(folder, {"name_or_path": str(folder), **trust}, dtype, metadata, chat_template)
    raise ModelError(
        f"{folder} is no model that scores: it is neither the final/ folder of a training ({METADATA_FILE}) nor does "
        f"its config.json name a ...ForSequenceClassification or ...ForCausalLM (it names {architectures[0] or 'none'})"
    )


def load_scorer(saved: Saved, device: torch.device, max_tokens: int) -> Scorer:
    """Load what `open_model` has looked at."""
    return SCORERS[type(saved)].load(saved, device, max_tokens)


def read_json(file: Path) -> dict[str, Any]:
    """Content of a JSON object; {} where there is no such file."""
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error
