"""Liger's fused head and cross-entropy with the signature of our log-probs, for comparison."""

import torch
from torch import Tensor

from hafrm_ds.model.attention import import_problem
from hafrm_ds.model.token_logprobs import HeadTransform
from tests.gpu.environment import IS_GPU

IS_AVAILABLE = IS_GPU and import_problem("liger_kernel") is None


def liger_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, transform: HeadTransform
) -> Tensor:
    """As `token_logprobs`; of the transform it knows the soft cap."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    assert transform.scale == 1.0
    loss = liger_fused_linear_cross_entropy(
        hidden, weight, targets, bias, reduction="none", softcap=transform.softcap, accum_dtype=torch.float32
    )
    return -loss
