"""Whole shapes of parameters that ZeRO-3 has sharded: the one place that reads them from DeepSpeed's marks."""

import numpy as np
from torch import nn


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of a parameter, also of one that ZeRO-3 has sharded (whose own shape is empty) or bitsandbytes packed."""
    if (packed := getattr(parameter, "quant_state", None)) is not None:
        return tuple(packed.shape)
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def full_numel(parameter: nn.Parameter) -> int:
    return int(np.prod(full_shape(parameter)))


def trained_share(model: nn.Module) -> str:
    """How much of a model is trained, in words."""
    parameters = list(model.parameters())
    trained, total = (sum(map(full_numel, part)) for part in ([p for p in parameters if p.requires_grad], parameters))
    return f"{trained:,} of {total:,} parameters are trained ({trained / total:.2%})"
