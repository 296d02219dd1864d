"""A folder that `save_hybrid_model` has written, or an export of its adapter, opened: its model and the formatter that
it was trained with."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PretrainedConfig

from hafrm_ds.config import ModelConfig
from hafrm_ds.data.formatting import PROBE, ChatFormatter
from hafrm_ds.errors import ModelError
from hafrm_ds.model.hybrid import HybridModel
from hafrm_ds.model.loading import (
    DTYPES,
    first_line,
    load_hybrid_model,
    load_model_config,
    load_tokenizer,
    local_folder,
)
from hafrm_ds.model.reward_start import ATTRIBUTE_HEAD_FILE, REWARD_HEAD_FILE
from hafrm_ds.saved.adapters import merge_adapter, read_adapter_config
from hafrm_ds.saved.writing import METADATA_FILE

ANY_DAY = "2024-07-26"
"""For a template whose dates were frozen when it was saved: there is none left that a day could stand for."""
STOCK_LAYERS = {"fused": "off"}
"""Of a model that scores: fused layers are compared with its own at the start of a run, and nowhere else."""
WEIGHTS_FILE = "model.safetensors"
NEEDED = ("layout", "uses_stock_logits", "template")


@dataclass(frozen=True)
class SavedModel:
    """A trained model on disk, looked at but not loaded. Build it with `open`.

    folder: where it lies, tokenizer included. config: how the causal LM is loaded, which for an adapter is its base.
    metadata: content of hafrm.json. head: tensors of the reward head. attribute_head: of that of attributes, or {}.
    """

    folder: Path
    config: ModelConfig
    metadata: dict[str, Any]
    head: dict[str, Tensor]
    attribute_head: dict[str, Tensor]

    @property
    def attributes(self) -> tuple[str, ...]:
        """Names of what the model can say of a conversation besides."""
        return tuple(self.metadata.get("attributes", ()))

    @property
    def heads(self) -> tuple[str, ...]:
        """What the model can say of a conversation. A reward head that no reward loss has trained says nothing."""
        objective = self.metadata.get("config", {}).get("objective", {})
        return ("logprob",) if objective.get("rm_weight") == 0 else ("reward", "logprob")

    @classmethod
    def open(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        dtype: str | None = None,
        trust_remote_code: bool = False,
        trust_pickle: bool = False,
    ) -> "SavedModel":
        """Look at a folder, or fetch it from the hub, without loading the weights of its body.

        Args: as `HybridRewardModel.from_pretrained`.

        Raises:
            ModelError: the folder is none that a training has left, or holds its weights as pickles.
        """
        options: dict[str, Any] = {
            "name_or_path": str(name_or_path),
            "revision": revision,
            "trust_remote_code": trust_remote_code,
        }
        folder = local_folder(ModelConfig(**options))
        metadata, head = read_metadata(folder), read_head(folder, REWARD_HEAD_FILE)
        attribute_head = read_head(folder, ATTRIBUTE_HEAD_FILE) if metadata.get("attributes") else {}
        options["name_or_path"], weights = str(folder), folder
        if metadata["format"] == "adapter":
            base = read_adapter_config(folder)
            options |= {"name_or_path": base["base_model_name_or_path"], "revision": base.get("revision")}
            weights = local_folder(ModelConfig(**options))
        refuse_pickles(weights, trust_pickle)
        # The head has the dtype of the body.
        dtype = dtype_of_weights(folder, dtype or str(head["weight"].dtype).removeprefix("torch."))
        options |= STOCK_LAYERS | {"dtype": dtype, "reward_head_bias": "bias" in head}
        config = ModelConfig.model_validate(options | {"attributes": metadata.get("attributes", [])})
        return cls(folder, config, metadata, head, attribute_head)

    def formatter(self) -> ChatFormatter:
        """The formatter of the training.

        Raises:
            ModelError: the tokenizer or its template has changed since the training, so the scores would change too.
        """
        tokenizer = load_tokenizer(self.config.model_copy(update={"name_or_path": str(self.folder), "revision": None}))
        formatter = ChatFormatter.create(tokenizer, None, ANY_DAY)
        trained = self.metadata["template"]
        if formatter.template != trained["text"] or formatter.encode(PROBE) != trained["probe_ids"]:
            raise ModelError(
                f"{self.folder}: the tokenizer or its chat template is not the one that the model was "
                f"trained with (recorded in {METADATA_FILE}), so it would score other tokens; restore them"
            )
        return formatter

    def hybrid_model(self, device: torch.device) -> HybridModel:
        """The trained model, in eval mode, on the CPU; `device` is where it will run (see `load_hybrid_model`).

        Inside `engine.engine.sharded_loading` its body is partitioned.
        """
        model = load_hybrid_model(self.config, layout=self.metadata["layout"], seed=0, device=device)
        files = {REWARD_HEAD_FILE: self.head, ATTRIBUTE_HEAD_FILE: self.attribute_head}
        for head, (file, tensors) in zip(model.score_heads, files.items()):
            try:
                head.load_state_dict(tensors)
            except RuntimeError as error:
                raise ModelError(f"{self.folder / file} does not fit the model: {first_line(error)}") from error
        if self.metadata["format"] == "adapter":
            merge_adapter(model.causal_lm, self.folder)
        model.uses_stock_logits = self.metadata["uses_stock_logits"]
        return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class SavedStockModel:
    """A folder that transformers loads without code of ours. Build one of its kinds with `open`.

    folder: where it lies. config: how it is loaded. metadata: {} but for an export of ours.
    chat_template: name or file of a template for a tokenizer without one. reasoning: as for `ChatFormatter.create`.
    attributes: names of those that an export of ours gives.
    """

    folder: Path
    config: ModelConfig
    metadata: dict[str, Any]
    chat_template: str | None
    reasoning: str | None = None
    attributes: tuple[str, ...] = ()

    @classmethod
    def open(
        cls,
        folder: Path,
        options: dict[str, Any],
        dtype: str | None,
        metadata: dict[str, Any],
        chat_template: str | None,
        reasoning: str | None,
    ) -> Self:
        """Look at a folder without loading its weights.

        Args:
            options: fields of ModelConfig that say how it is loaded.

        Raises:
            ModelError: it gives no scores, or its weights are of a type that needs a choice.
        """
        stock = load_model_config(ModelConfig(**options))
        cls.check(folder, stock)
        dtype = dtype_of_weights(folder, dtype or str(stock.dtype or "").removeprefix("torch."))
        config = ModelConfig.model_validate(options | STOCK_LAYERS | {"dtype": dtype})
        return cls(folder, config, metadata, chat_template, reasoning, cls.attributes_of(stock))

    @classmethod
    def check(cls, folder: Path, config: PretrainedConfig) -> None:
        """Raises ModelError for a model of this kind that gives no scores."""

    @classmethod
    def attributes_of(cls, config: PretrainedConfig) -> tuple[str, ...]:
        """Names of the attributes that a model of this kind gives."""
        return ()

    def formatter(self) -> ChatFormatter:
        return ChatFormatter.create(load_tokenizer(self.config), self.chat_template, ANY_DAY, self.reasoning)


def refuse_run_folder(folder: Path) -> None:
    """Raises ModelError for the folder of a run, whose model lies in it."""
    if (folder / "final" / METADATA_FILE).exists():
        raise ModelError(f"{folder} is the folder of a run; its model is {folder / 'final'}")


def read_metadata(folder: Path) -> dict[str, Any]:
    file = folder / METADATA_FILE
    try:
        metadata = json.loads(file.read_text())
    except FileNotFoundError:
        refuse_run_folder(folder)
        raise ModelError(
            f"{folder} has no {METADATA_FILE}: it is no final/ folder of a training with hafrm_ds (launch/export.py "
            "--format hybrid makes one of a checkpoint)"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error
    if metadata.get("format") not in ("hybrid", "adapter"):
        raise ModelError(
            f"{folder} is an export ({metadata.get('format')}), which transformers loads by itself; "
            "give the final/ folder it was made from"
        )
    if missing := [key for key in NEEDED if key not in metadata]:
        raise ModelError(f"{file} lacks {', '.join(missing)}")
    return metadata


def dtype_of_weights(folder: Path, dtype: str) -> str:
    """Raises ModelError for a type that nothing here computes in."""
    if dtype not in DTYPES:
        raise ModelError(f"{folder}: the weights are {dtype or 'of no stated type'}; give dtype {' or '.join(DTYPES)}")
    return dtype


def read_head(folder: Path, name: str) -> dict[str, Tensor]:
    file, head = folder / name, name.removesuffix(".safetensors").replace("_", " ")
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"the {head} {file} cannot be read: {first_line(error)}") from error


def refuse_pickles(folder: Path, trust_pickle: bool) -> None:
    """Raise ModelError for a folder of which transformers would read pickles, which may run code when they are read.

    It takes model.safetensors, else the files that an index names, whatever they are, else pickles.
    """
    if trust_pickle or (folder / WEIGHTS_FILE).is_file():
        return
    index = folder / f"{WEIGHTS_FILE}.index.json"
    try:
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except FileNotFoundError:
        files = [file.name for file in sorted(folder.glob("*.bin"))]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index} cannot be read: {error}") from error
    if pickles := [name for name in files if not str(name).endswith(".safetensors")]:
        raise ModelError(
            f"{folder} holds its weights as pickles ({pickles[0]}), which may run code when they are read. "
            "Give a folder with safetensors, or trust_pickle if you trust whoever wrote it"
        )
