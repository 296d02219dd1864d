"""Adapters on disk: merged into the weights of final/, saved beside them as peft does, and merged again when loaded."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hafrm_ds.engine.shapes import full_shape
from hafrm_ds.errors import ModelError
from hafrm_ds.model.lora import ADAPTER, QUANTIZED, adapted_layers
from hafrm_ds.saved.tensor_files import Gather, TensorSource, tensors_of, write_tensors

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT_PREFIX = "base_model.model."
"""What names in ADAPTER_WEIGHTS begin with: peft's own wrapper around a causal LM."""


def dequantized_tensors(causal_lm: PreTrainedModel) -> dict[str, TensorSource]:
    """The weights that bitsandbytes has packed, unpacked one by one as they are opened."""
    dtype = causal_lm.get_input_embeddings().weight.dtype

    def unpacking(module: nn.Linear) -> Callable[[], AbstractContextManager[Tensor]]:
        from peft.utils.integrations import dequantize_module_weight

        return lambda: nullcontext(dequantize_module_weight(module).detach().to(dtype))

    return {
        f"{name}.weight": TensorSource((module.out_features, module.in_features), dtype, unpacking(module))
        for name, module in causal_lm.named_modules()
        if isinstance(module, nn.Linear) and type(module.weight).__name__ in QUANTIZED
    }


def merged(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, is_transposed: bool = False) -> Tensor:
    """W [O, I] + scale * B [O, R] @ A [R, I], in fp32, in the dtype of W. is_transposed: W is [I, O]."""
    update = lora_b.float() @ lora_a.float()
    return (weight.float() + scale * (update.T if is_transposed else update)).to(weight.dtype)


def merged_tensors(causal_lm: PreTrainedModel, gathered: Gather) -> dict[str, TensorSource]:
    """What a folder holds of a causal LM, adapters merged into their layers one by one as they are opened.

    Args:
        gathered: context in which given parameters are whole on every rank.
    """
    layers = adapted_layers(causal_lm)

    def merging(layer, source: TensorSource) -> Callable[[], AbstractContextManager[Tensor]]:
        lora_a, lora_b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight

        @contextmanager
        def opened() -> Iterator[Tensor]:
            with source.open() as weight, gathered([lora_a, lora_b]):
                is_transposed = isinstance(layer.base_layer, Conv1D)
                yield merged(weight, lora_a.detach(), lora_b.detach(), layer.scaling[ADAPTER], is_transposed)

        return opened

    tensors = {}
    for name, source in (tensors_of(causal_lm, gathered) | dequantized_tensors(causal_lm)).items():
        owner, is_inside, leaf = name.partition(".base_layer.")
        if owner.partition(".lora_")[0] in layers and not is_inside:
            continue
        if is_inside and leaf == "weight":
            source = TensorSource(source.shape, source.dtype, merging(layers[owner], source))
        tensors[f"{owner}.{leaf}" if is_inside else name] = source
    return tensors


def save_adapter(causal_lm: PreTrainedModel, folder: Path, *, gathered: Gather, is_writer: bool) -> None:
    """Write the adapters as peft saves them. All ranks call this together; `folder` is there.

    Raises:
        ModelError: what is read back from the disk is not what was written.
    """
    tensors = {
        f"{PEFT_PREFIX}{owner}.{name.replace(f'.{ADAPTER}', '')}": source
        for owner, layer in adapted_layers(causal_lm).items()
        for name, source in tensors_of(layer, gathered).items()
        if name.startswith("lora_")
    }
    write_tensors(tensors, folder / ADAPTER_WEIGHTS, is_writer)
    if is_writer:
        config: Any = causal_lm.peft_config  # peft hangs it there
        config[ADAPTER].save_pretrained(folder)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Content of an adapter's config. Raises ModelError when it cannot be read or lacks what is needed of it."""
    file = folder / ADAPTER_CONFIG
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"the adapter's {file} cannot be read: {error}") from error
    if missing := [key for key in ("base_model_name_or_path", "lora_alpha", "r") if not config.get(key)]:
        raise ModelError(f"the adapter's {file} lacks {', '.join(missing)}")
    return config


def merge_adapter(causal_lm: PreTrainedModel, folder: Path) -> None:
    """Merge a saved adapter into its base, which then has the weights of the merged model. peft is not needed.

    Raises:
        ModelError: the files cannot be read, or the adapter does not belong to this model.
    """
    config = read_adapter_config(folder)
    try:
        tensors = load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"the adapter {folder / ADAPTER_WEIGHTS} cannot be read: {error}") from error
    layers = dict(causal_lm.named_modules())
    for name in sorted(tensors):
        owner, is_a, _ = name.removeprefix(PEFT_PREFIX).partition(".lora_A.")
        if not is_a:
            continue
        lora_a, lora_b = tensors[name], tensors[name.replace(".lora_A.", ".lora_B.")]
        layer = layers.get(owner)
        if layer is None or set(full_shape(layer.weight)) != {len(lora_b), lora_a.shape[1]}:
            raise ModelError(
                f"{folder}: the adapter of {owner} does not fit {type(causal_lm).__name__} from "
                f"{config['base_model_name_or_path']}: it was made for another model"
            )
        if layer.weight.shape != full_shape(layer.weight):
            raise ModelError(f"{folder} is an adapter, which cannot be merged into sharded weights: export the policy")
        weight, scale = layer.weight.data, config["lora_alpha"] / config["r"]
        weight.copy_(merged(weight, lora_a, lora_b, scale, isinstance(layer, Conv1D)))
