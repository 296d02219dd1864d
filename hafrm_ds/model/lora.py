"""Low-rank adapters (LoRA) on a causal LM, by peft: adding them, taking them out of the forward, and merging.

peft puts its layers into the model and leaves its class alone, so all else sees the causal LM that it knows. Only plain
linear layers are adapted; neither the LM head nor an embedding ever is.

    final/            W + alpha / rank * B A, an ordinary model
    final/adapter/    B and A, as peft saves them

Merging is one sum in fp32, rounded once to the dtype of W, when final/ is written as when an adapter is loaded: on the
same kind of device both give the same weights, bit for bit. The live model adds two rounded products instead, which
moves the last bits of a score.

Legend: O outputs and I inputs of a layer, R rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hafrm_ds.config import LoraOptions, ModelConfig
from hafrm_ds.errors import ModelError
from hafrm_ds.hardware.flops import holds_experts
from hafrm_ds.model.attention import import_problem

ADAPTER = "default"
"""peft's name of an adapter that has none."""
LINEAR = (nn.Linear, Conv1D)
"""GPT-2's Conv1D is a linear layer whose weight lies transposed."""
QUANTIZED = ("Params4bit", "Int8Params")
"""Classes of bitsandbytes' weights."""
INSTALL = "pip install -e '.[{}]' in the checkout of hafrm_ds"


class TrainingDropout(nn.Dropout):
    """Dropout where gradients are computed. The reference, evaluations and checks run without them, in train mode."""

    def forward(self, inputs: Tensor) -> Tensor:
        return F.dropout(inputs, self.p, training=torch.is_grad_enabled())


def check_packages(options: LoraOptions) -> None:
    """Raise ModelError, before anything is loaded, for a package that the options need and that is not there."""
    if options.rank and import_problem("peft"):
        raise ModelError(f"model.lora.rank {options.rank} needs the package peft: {INSTALL.format('lora')}")
    if options.quantize != "none" and import_problem("bitsandbytes"):
        raise ModelError(
            f"model.lora.quantize {options.quantize} needs the package bitsandbytes: {INSTALL.format('qlora')}"
        )


# ---- adding --------------------------------------------------------------------------------------------------------


def add_adapters(causal_lm: PreTrainedModel, model: ModelConfig, seed: int) -> None:
    """Freeze a causal LM and give it adapters, which change nothing yet: B is 0.

    They are made before the model is put under DeepSpeed, whole, and are the same on every rank that gives the same
    seed.

    Args:
        model: what the causal LM was loaded by.

    Raises:
        ModelError: peft is missing, or a target names no linear layer of the body, or all are asked for of a model that
            has experts.
    """
    from peft import LoraConfig, inject_adapter_in_model

    options = model.lora
    check_targets(causal_lm, options.targets)
    is_local = Path(model.name_or_path).is_dir()
    dtype = causal_lm.get_input_embeddings().weight.dtype
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=options.targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(Path(model.name_or_path).resolve()) if is_local else model.name_or_path,
        revision=model.revision,
    )
    causal_lm.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, causal_lm)
    for layer in adapted_layers(causal_lm).values():
        for adapter in (layer.lora_A, layer.lora_B):
            adapter.to(dtype).requires_grad_(True)
        if options.dropout:
            layer.lora_dropout[ADAPTER] = TrainingDropout(options.dropout)


def check_targets(causal_lm: PreTrainedModel, targets: list[str] | str) -> None:
    """Raise ModelError unless every target names linear layers of the body, and nothing else.

    Experts are no linear layers but stacks of weights. All linear layers of a model that has them would be its
    attention alone, a small part of what was asked for, so they must be named there.
    """
    modules = dict(causal_lm.named_modules())
    head = causal_lm.get_output_embeddings()
    linear = {name for name, module in modules.items() if isinstance(module, LINEAR) and module is not head}
    known = ", ".join(sorted({name.split(".")[-1] for name in linear}))
    experts = {
        name: parameter
        for name, module in modules.items()
        if holds_experts(module)
        for name, parameter in module.named_parameters(recurse=False)
    }
    if targets == "all-linear":
        if experts:
            raise ModelError(
                f"model.lora.targets is all-linear, but the experts of {type(causal_lm).__name__} are no linear layers "
                f"and cannot have adapters: name the layers that get some; it has {known}"
            )
        return
    for target in targets:
        named = [name for name in modules if name == target or name.endswith(f".{target}")]
        if target in experts and not named:
            raise ModelError(
                f"model.lora.targets: {target!r} names weights of the experts of {type(causal_lm).__name__}, which "
                f"cannot have adapters; it has {known}"
            )
        if not named or not linear.issuperset(named):
            found = f"names {named[0]}, which is no linear layer of the body" if named else "names no layer"
            raise ModelError(f"model.lora.targets: {target!r} {found} of {type(causal_lm).__name__}; it has {known}")


def adapted_layers(causal_lm: nn.Module) -> dict[str, Any]:
    """Name -> peft's layer, for each layer that has an adapter; empty without peft or without adapters."""
    return {name: module for name, module in causal_lm.named_modules() if hasattr(module, "lora_A")}


@contextmanager
def adapters_off(causal_lm: nn.Module) -> Iterator[None]:
    """Inside, the model computes what its base computes.

    Adapters are scaled by 0 instead of passed over: ZeRO-3 fetches ahead by the order in which modules ran before.
    """
    layers = adapted_layers(causal_lm).values()
    for layer in layers:
        layer.set_scale(ADAPTER, 0)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_scale(ADAPTER, 1)


# ---- quantised weights ---------------------------------------------------------------------------------------------


def quantization(options: LoraOptions, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """How from_pretrained stores the weights of linear layers; None: as they are."""
    if options.quantize == "none":
        return None
    if options.quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
