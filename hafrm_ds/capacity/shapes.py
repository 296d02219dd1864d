"""A run's model without its weights: on the meta device, from config.json alone."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hafrm_ds.capacity.zero import Parameters
from hafrm_ds.config import TrainConfig
from hafrm_ds.errors import ModelError
from hafrm_ds.model.experts import expert_layers
from hafrm_ds.model.hybrid import HybridModel, disable_dropout, freeze_unused_heads, make_reward_head
from hafrm_ds.model.loading import DTYPES, first_line, load_model_config
from hafrm_ds.model.lora import add_adapters, check_packages

QUANTIZED_BYTES = {"4bit": 0.5 + 4 / 64, "8bit": 1.0}
"""Bytes of a weight in bitsandbytes: NF4 with an fp32 scale for 64 weights; int8, without its scale for each row."""


def model_of_shapes(config: TrainConfig) -> HybridModel:
    """The model of a run as training has it: adapters, frozen parts, train mode; no tensor has content.

    Raises:
        ModelError: its configuration cannot be read, or asks for code that does not come with transformers.
    """
    check_packages(config.model.lora)
    model_config, dtype = load_model_config(config.model), DTYPES[config.model.dtype]
    try:
        with torch.device("meta"):
            causal_lm = AutoModelForCausalLM.from_config(
                model_config, dtype=dtype, trust_remote_code=config.model.trust_remote_code
            )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"model.name_or_path {config.model.name_or_path!r}: {first_line(error)}") from error
    disable_dropout(causal_lm)
    causal_lm.train()
    hidden = model_config.get_text_config().hidden_size
    head = make_reward_head(hidden, bias=config.model.reward_head_bias, init="zero", dtype=dtype, seed=0).to("meta")
    model = HybridModel(causal_lm, head)
    if config.model.lora.rank:
        with torch.device("meta"):
            add_adapters(causal_lm, config.model, config.seed)
    freeze_unused_heads(model, config.objective)
    return model


def count_parameters(model: HybridModel, quantize: str) -> Parameters:
    """What the parameters of a model amount to.

    Args:
        quantize: as model.lora.quantize: frozen weights of linear layers but the LM head are stored in fewer bits.
    """
    size = model.reward_head.weight.element_size()
    packed = set()
    if quantize != "none":
        head = model.lm_head
        packed = {module.weight for module in model.modules() if isinstance(module, nn.Linear) and module is not head}
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    return Parameters(
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        frozen=sum(p.numel() for p in frozen),
        frozen_bytes=sum(p.numel() * (QUANTIZED_BYTES[quantize] if p in packed else size) for p in frozen),
        sizes=tuple(p.numel() for p in model.parameters()),
        weight_bytes=size,
        largest=max(
            *(p.numel() for p in model.parameters()),
            *(sum(p.numel() for p in layer.parameters()) for layer in expert_layers(model.causal_lm)),
        ),
    )
