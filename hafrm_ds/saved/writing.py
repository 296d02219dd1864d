"""Saving a hybrid model as a Hugging Face folder, one shard at a time.

Each parameter is gathered alone, copied by rank 0 and dropped by the others; rank 0 holds a shard (2 GiB of a larger
model), writes it, reads it back and compares every tensor by a checksum: a folder whose tensors are those of the live
model has its scores. Reopening the folder beside the live model would need room for a second one, and under ZeRO-3 a
rank may not even have room for the first. (`hafrm_ds.saved.export`, which has the model to itself,
does reopen what it writes and compares scores.)
"""

import copy
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

import hafrm_ds
from hafrm_ds.data.formatting import PROBE, ChatFormatter
from hafrm_ds.data.report import TemplateFacts
from hafrm_ds.durability import whole_folder
from hafrm_ds.model.hybrid import HybridModel
from hafrm_ds.model.lora import adapted_layers
from hafrm_ds.model.reward_start import ATTRIBUTE_HEAD_FILE, REWARD_HEAD_FILE
from hafrm_ds.saved.adapters import merged_tensors, save_adapter
from hafrm_ds.saved.card import model_card
from hafrm_ds.saved.tensor_files import Gather, publisher, tensors_of, write_sharded, write_tensors

METADATA_FILE = "hafrm.json"
CARD_FILE = "README.md"
ADAPTER_FOLDER = "adapter"


def save_hybrid_model(
    model: HybridModel,
    formatter: ChatFormatter,
    folder: Path,
    *,
    gathered: Gather,
    is_writer: bool,
    metadata: dict[str, Any],
) -> None:
    """Write the policy as a causal-LM folder, with reward_head.safetensors, hafrm.json and a model card beside it; of a
    model with attributes also attribute_head.safetensors.

    Adapters are merged into the policy, and written into adapter/ besides.

    The folder is there whole or not at all, and one of that name is replaced without a moment in which neither is.

    Args:
        formatter: that the model was trained with. Its tokenizer, template included, is saved.
        gathered: context in which given parameters are whole on every rank (`Engine.gathered`). All ranks call this
            function together.
        is_writer: True on the one rank that writes.
        metadata: further content of hafrm.json and of the card: base, attributes (their names), training, data,
            evaluation, config, each where known (`hafrm_ds.training.final.run_metadata`).

    Raises:
        ModelError: what is read back from the disk is not what was written.
    """
    with whole_folder(folder) if is_writer else nullcontext(folder) as draft:
        write_sharded(merged_tensors(model.causal_lm, gathered), draft, is_writer, publisher(model.causal_lm))
        write_tensors(tensors_of(model.reward_head, gathered), draft / REWARD_HEAD_FILE, is_writer)
        if model.attribute_head is not None:
            write_tensors(tensors_of(model.attribute_head, gathered), draft / ATTRIBUTE_HEAD_FILE, is_writer)
        if adapted_layers(model.causal_lm):
            if is_writer:
                (draft / ADAPTER_FOLDER).mkdir()
            save_adapter(model.causal_lm, draft / ADAPTER_FOLDER, gathered=gathered, is_writer=is_writer)
        if is_writer:
            metadata = {
                "hafrm_ds": hafrm_ds.__version__,
                "format": "hybrid",
                "layout": model.layout,
                "uses_stock_logits": model.uses_stock_logits,
                "template": template_facts(formatter),
                **metadata,
            }
            config = copy.deepcopy(model.causal_lm.config)
            if hasattr(config, "quantization_config"):  # what is written is not quantised
                del config.quantization_config
            config.architectures = [type(model.causal_lm).__name__]
            config.dtype = model.reward_head.weight.dtype
            write_beside_weights(draft, config, generation_config_of(model.causal_lm), formatter.tokenizer, metadata)


def template_facts(formatter: ChatFormatter) -> dict[str, Any]:
    """How conversations are rendered, and the ids of one of them, for whoever loads the folder to compare with."""
    return {**asdict(TemplateFacts.of(formatter)), "probe_ids": formatter.encode(PROBE)}


def generation_config_of(causal_lm: PreTrainedModel) -> GenerationConfig | None:
    return causal_lm.generation_config if causal_lm.can_generate() else None


def write_beside_weights(
    folder: Path,
    config: PretrainedConfig,
    generation_config: GenerationConfig | None,
    tokenizer: PreTrainedTokenizerBase,
    metadata: dict[str, Any],
) -> None:
    """Write everything of a model folder but its tensors."""
    config.save_pretrained(folder)
    rewrite_json(folder / "config.json", readable_by_transformers_4)
    if generation_config is not None:
        generation_config.save_pretrained(folder)
    write_tokenizer_and_card(folder, tokenizer, metadata)


def write_tokenizer_and_card(folder: Path, tokenizer: PreTrainedTokenizerBase, metadata: dict[str, Any]) -> None:
    """Write the tokenizer, template included, hafrm.json and the card."""
    tokenizer.save_pretrained(folder)
    rewrite_json(folder / "tokenizer_config.json", tokenizer_of_transformers_4)
    (folder / METADATA_FILE).write_text(json.dumps(metadata, indent=2, ensure_ascii=False) + "\n")
    (folder / CARD_FILE).write_text(model_card(metadata))


# ---- for readers with transformers 4 -------------------------------------------------------------------------------


def readable_by_transformers_4(config: dict[str, Any]) -> dict[str, Any]:
    """Name the rotary base also where transformers 4 looks for it: without it, it silently takes 10,000.

    transformers 5 knows both places. A model with several rotary embeddings has no place in version 4 that all of its
    families share, and is left as it is.
    """
    rotary = config.get("rope_parameters") or {}
    if "rope_theta" not in rotary:
        return config
    known = {"rope_theta": rotary["rope_theta"]}
    if "partial_rotary_factor" in rotary:
        known["partial_rotary_factor"] = rotary["partial_rotary_factor"]
    if rotary.get("rope_type", "default") != "default":
        known["rope_scaling"] = {key: value for key, value in rotary.items() if key not in known}
    return known | config


def tokenizer_of_transformers_4(config: dict[str, Any]) -> dict[str, Any]:
    """Name the generic fast tokenizer as versions 4 and 5 both know it, and what it returns as in version 5: version 4
    would add token types, which a decoder does not take.
    """
    if config.get("tokenizer_class") != "TokenizersBackend":
        return config
    inputs = {"model_input_names": ["input_ids", "attention_mask"]}
    return inputs | config | {"tokenizer_class": "PreTrainedTokenizerFast"}


def rewrite_json(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    content = change(json.loads(file.read_text()))
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n")
