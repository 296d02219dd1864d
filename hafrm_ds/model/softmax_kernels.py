"""Both passes over a block of logits as Triton kernels, which read and write each logit once.

torch's operations (`token_logprobs.TiledSoftmax`) do the same by about ten kernels over fp32 copies. Importing this
needs the package triton, which comes with torch's builds for GPUs; with TRITON_INTERPRET=1 it computes on CPUs, for
tests.

Legend: R rows and B columns of a block.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hafrm_ds.model.token_logprobs import Block, Sums

COLUMNS = 4096
"""Logits that a program has in its registers at a time."""
WARPS = 8


@triton.jit
def logits_at(block, row, stride, columns, width, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Logits of a row in fp32; -inf beyond its end. tanh(x) = 2 sigmoid(2 x) - 1."""
    inside = columns < width
    logits = tl.load(block + row * stride + columns, mask=inside, other=0.0).to(tl.float32) * scale
    if HAS_SOFTCAP:
        logits = softcap * (2 * tl.sigmoid(2 * logits / softcap) - 1)
    return tl.where(inside, logits, float("-inf"))


@triton.jit
def fold_kernel(
    block, stride, width, first, targets, largest, total, chosen, scale, softcap,
    HAS_SOFTCAP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program takes a row: the running maximum and sum of Milakov and Gimelshein 2018 (arXiv 1805.02867)."""
    row = tl.program_id(0).to(tl.int64)
    top, sum_of_exp = tl.load(largest + row), tl.load(total + row)
    for start in range(0, width, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        logits = logits_at(block, row, stride, columns, width, scale, softcap, HAS_SOFTCAP)
        higher = tl.maximum(top, tl.max(logits, 0))
        sum_of_exp = sum_of_exp * tl.exp(top - higher) + tl.sum(tl.exp(logits - higher), 0)
        top = higher
    tl.store(largest + row, top)
    tl.store(total + row, sum_of_exp)
    column = tl.load(targets + row) - first
    if (column >= 0) & (column < width):
        tl.store(chosen + row, logits_at(block, row, stride, column, width, scale, softcap, HAS_SOFTCAP))


@triton.jit
def gradient_kernel(
    block, stride, width, first, targets, log_partition, grad, scale, softcap,
    HAS_SOFTCAP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program takes some columns of a row. d logprob / d logits = onehot - softmax."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    logits = logits_at(block, row, stride, columns, width, scale, softcap, HAS_SOFTCAP)
    target = tl.load(targets + row) - first
    slope = tl.where(columns == target, 1.0, 0.0) - tl.exp(logits - tl.load(log_partition + row))
    slope *= scale * tl.load(grad + row)
    if HAS_SOFTCAP:
        slope *= 1 - (logits / softcap) * (logits / softcap)
    tl.store(block + row * stride + columns, slope.to(block.dtype.element_ty), mask=columns < width)


@dataclass(frozen=True)
class TritonSoftmax:
    """As `TiledSoftmax`, but the gradient of a bias is summed from gradients of logits that are already rounded."""

    whole_rows: bool = False

    def fold(self, block: Block, sums: Sums) -> None:
        rows, _ = block.products.shape
        if rows:
            run(fold_kernel, (rows,), block, sums.largest, sums.total, sums.chosen)

    def differentiate(self, block: Block, log_partition: Tensor, grad: Tensor, grad_bias: Tensor | None) -> None:
        rows, width = block.products.shape
        if rows:
            run(gradient_kernel, (rows, triton.cdiv(width, COLUMNS)), block, log_partition, grad.contiguous())
            if grad_bias is not None:
                grad_bias += block.products.sum(0, dtype=torch.float32)


def run(kernel: Any, grid: tuple[int, ...], block: Block, *columns: Tensor) -> None:
    """Run a kernel on a block with columns [R], in a grid of programs."""
    products, transform = block.products, block.transform
    kernel[grid](
        products, products.stride(0), products.shape[1], block.first, block.targets, *columns,
        transform.scale, transform.softcap or 1.0, transform.softcap is not None, COLUMNS, num_warps=WARPS,
    )  # fmt: skip
