"""Log-probs of given tokens without ever holding the [tokens, vocabulary] logits.

Legend: M tokens, H hidden, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LOGPROB_VERSION = 1
"""Of what a log-prob means. Raised when values computed before must not be mixed with values computed after."""

CHUNK_BYTES = 128 * 2**20
"""fp32 logits of one chunk stay below this size."""


@dataclass(frozen=True)
class HeadTransform:
    """What a model does to the product of state and weight: logits = cap(scale * (product + bias)).

    scale: Cohere's logit_scale, 1 / Granite's logits_scaling. softcap: c of Gemma's c * tanh(x / c).
    """

    scale: float = 1.0
    softcap: float | None = None


def chunk_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: HeadTransform) -> Tensor:
    """[M, H] -> [M, V] fp32 logits; the product runs in the dtype of the weights, as in the stock model."""
    logits = (hidden @ weight.t() if bias is None else torch.addmm(bias, hidden, weight.t())).float()
    if transform.scale != 1.0:
        logits = logits * transform.scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    return logits


class TokenLogprobs(torch.autograd.Function):
    """log softmax(logits)[target] for each token, fp32, in chunks that backward computes anew."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, transform: HeadTransform):
        chunk = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
        logprobs, log_partition = (
            torch.empty(len(targets), dtype=torch.float32, device=hidden.device) for _ in range(2)
        )
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            logits = chunk_logits(hidden[part], weight, bias, transform)
            # One fused pass; the partition function then follows from any one entry.
            chosen = logits.gather(1, targets[part, None]).squeeze(1)
            logprobs[part] = -F.cross_entropy(logits, targets[part], reduction="none")
            log_partition[part] = chosen - logprobs[part]
        ctx.save_for_backward(hidden, weight, bias, targets, log_partition)
        ctx.transform, ctx.chunk = transform, chunk
        return logprobs

    @staticmethod
    def backward(ctx, grad_logprobs: Tensor):
        hidden, weight, bias, targets, log_partition = ctx.saved_tensors
        transform = ctx.transform
        grad_hidden = torch.empty_like(hidden)
        # Summed over chunks in fp32: a bf16 running sum would lose what late chunks add.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        for start in range(0, len(targets), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            logits = chunk_logits(hidden[part], weight, bias, transform)
            # d logprob / d logits = onehot - softmax; in place where nothing else needs the logits.
            slope = 1 - (logits / transform.softcap).square() if transform.softcap is not None else None
            grad_logits = logits.sub_(log_partition[part, None]).exp_()
            grad_logits.scatter_add_(1, targets[part, None], grad_logits.new_full((len(grad_logits), 1), -1.0))
            grad_logits *= -transform.scale * grad_logprobs[part, None]
            if slope is not None:
                grad_logits *= slope
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)  # the bias joins before the scale, as in chunk_logits
            grad_product = grad_logits.to(hidden.dtype)
            grad_hidden[part] = grad_product @ weight
            if grad_weight is not None:
                grad_weight += grad_product.t() @ hidden[part]
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
        )


def token_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, transform: HeadTransform
) -> Tensor:
    """log p(target) of each token.

    Args:
        hidden: [M, H] states that predict the targets.
        weight: [V, H], bias: [V] or None: the LM head.
        targets: [M] int64.

    Returns:
        [M] fp32.
    """
    return TokenLogprobs.apply(hidden, weight, bias, targets, transform)
