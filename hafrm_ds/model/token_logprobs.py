"""Log-probs of given tokens without ever holding the [tokens, vocabulary] logits.

They are computed in blocks. On GPUs a block holds some columns of the vocabulary for all tokens. So each row of the
weight is read once in forward and twice in backward, however many tokens there are, and its gradient is one product,
summed over the tokens inside of it; blocks of tokens would read the weight, and a sum of its gradients in fp32, again
for each. The states' gradient is summed over the blocks in fp32, which the products of a CPU cannot give without
rounding each: there a block holds whole rows, and few are needed.

Legend: M tokens, H hidden, V vocabulary, R rows and B columns of a block.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

LOGPROB_VERSION = 1
"""Of what a log-prob means. Raised when values computed before must not be mixed with values computed after."""

BLOCK_BYTES = 256 * 2**20
"""The product of states and a block of the weight stays below this size, in the dtype of the weights."""
COLUMNS = 256
"""Blocks are whole multiples of so many columns: the widest tile of a matrix product on GPUs."""
TILE_BYTES = {"cpu": 16 * 2**20, "cuda": 512 * 2**20}
"""By kind of device, fp32 logits that are computed with at a time: what a CPU's caches hold, and what is worth starting
threads or a kernel for."""


@dataclass(frozen=True)
class HeadTransform:
    """What a model does to the product of state and weight: logits = cap(scale * (product + bias)).

    scale: Cohere's logit_scale, 1 / Granite's logits_scaling. softcap: c of Gemma's c * tanh(x / c).
    """

    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class Block:
    """Products of some states with some rows of the weight.

    products: [R, B] in the dtype of the weights. first: the token of the first column. targets: [R] tokens, of this
    block or of another.
    """

    products: Tensor
    first: int
    targets: Tensor
    transform: HeadTransform


class Softmax(Protocol):
    """Both passes over a block; all but its products is fp32.

    whole_rows: blocks hold whole rows of logits, of few tokens, instead of some columns for all tokens.
    """

    @property
    def whole_rows(self) -> bool: ...

    def fold(self, block: Block, sums: "Sums") -> None:
        """Take the logits of a block into the sums of its rows. The products may be overwritten."""

    def differentiate(self, block: Block, log_partition: Tensor, grad: Tensor, grad_bias: Tensor | None) -> None:
        """Turn a block of products into the gradient of the log-probs by it, times `grad` [R], in place.

        Args:
            log_partition: [R] log of the sum of all exponentiated logits.
            grad_bias: [B], to which the sum of that over the rows is added.
        """


@dataclass
class Sums:
    """A softmax over some columns: the largest logit, the sum of exp(logit - largest), and the targets' logits, if they
    were among them; [M] fp32 each."""

    largest: Tensor
    total: Tensor
    chosen: Tensor

    @classmethod
    def of_nothing(cls, targets: Tensor) -> "Sums":
        def full(value: float) -> Tensor:
            return torch.full(targets.shape, value, dtype=torch.float32, device=targets.device)

        return cls(full(-torch.inf), full(0.0), full(0.0))

    def of(self, rows: slice) -> "Sums":
        """Views of the sums of some rows."""
        return Sums(self.largest[rows], self.total[rows], self.chosen[rows])


@dataclass(frozen=True)
class TiledSoftmax:
    """In torch's operations, a tile of rows after another.

    tile_bytes: fp32 logits of a tile.
    """

    tile_bytes: int
    whole_rows: bool

    @classmethod
    def on(cls, device_type: str) -> "TiledSoftmax":
        """As a kind of device has it best. The meta device has shapes alone, and stands for a GPU."""
        is_cpu = device_type == "cpu"
        return cls(TILE_BYTES["cpu" if is_cpu else "cuda"], whole_rows=is_cpu)

    def tiles(self, block: Block) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """(rows of the tile, its logits, [rows, 1] column of each target, bounded by the block, [rows, 1] whether it is
        there)"""
        width = block.products.shape[1]
        count = max(1, self.tile_bytes // (4 * width))
        for start in range(0, len(block.targets), count):
            rows = slice(start, start + count)
            column = block.targets[rows, None] - block.first
            bounded = column.clamp(0, width - 1)
            yield rows, logits_of(block.products[rows], block.transform), bounded, column == bounded

    def fold(self, block: Block, sums: Sums) -> None:
        for rows, logits, column, is_here in self.tiles(block):
            chosen = torch.where(is_here, logits.gather(1, column), sums.chosen[rows, None])
            before = sums.largest[rows]
            largest = torch.maximum(before, logits.amax(1))
            total = logits.sub_(largest[:, None]).exp_().sum(1)
            sums.total[rows] = sums.total[rows] * (before - largest).exp() + total
            sums.largest[rows], sums.chosen[rows] = largest, chosen.squeeze(1)

    def differentiate(self, block: Block, log_partition: Tensor, grad: Tensor, grad_bias: Tensor | None) -> None:
        transform = block.transform
        for rows, logits, column, is_here in self.tiles(block):
            # d logprob / d logits = onehot - softmax; in place where nothing else needs the logits.
            slope = 1 - (logits / transform.softcap).square() if transform.softcap is not None else None
            grad_logits = logits.sub_(log_partition[rows, None]).exp_()
            grad_logits.scatter_add_(1, column, -is_here.to(grad_logits.dtype))
            grad_logits *= -transform.scale * grad[rows, None]
            if slope is not None:
                grad_logits *= slope
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)  # the bias joins before the scale
            block.products[rows] = grad_logits


def logits_of(products: Tensor, transform: HeadTransform) -> Tensor:
    """Products of states and weight, of any shape, to fp32 logits; products in fp32 may be overwritten."""
    logits = products.float()
    if transform.scale != 1.0:
        logits *= transform.scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    return logits


def block_shape(num_tokens: int, vocabulary: int, element_size: int, whole_rows: bool) -> tuple[int, int]:
    """(R, B) of the largest block whose products stay below BLOCK_BYTES."""
    if whole_rows:
        return max(1, BLOCK_BYTES // (element_size * vocabulary)), vocabulary
    most = BLOCK_BYTES // (element_size * max(1, num_tokens))
    return max(1, num_tokens), min(vocabulary, max(COLUMNS, most // COLUMNS * COLUMNS))


def product(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[R, H], [B, H], [B] -> [R, B] in the dtype of the weights, as in the stock model."""
    return hidden @ weight.t() if bias is None else torch.addmm(bias, hidden, weight.t())


class ProductSum:
    """A sum of products, in fp32 where it has several: a running sum in bf16 would lose what late ones add.

    Args:
        like: the tensor whose shape and, in the end, dtype it has.
    """

    def __init__(self, like: Tensor, has_several: bool):
        self.dtype = like.dtype
        self.has_several = has_several
        self.total = torch.zeros_like(like, dtype=torch.float32) if has_several else torch.empty_like(like)

    def add(self, rows: slice, left: Tensor, right: Tensor) -> None:
        total = self.total[rows]
        if not self.has_several:
            torch.mm(left, right, out=total)
        elif left.dtype == total.dtype:
            total.addmm_(left, right)
        elif left.device.type == "cpu":  # which has no product with a result in another dtype
            total += left @ right
        else:
            total += torch.mm(left, right, out_dtype=total.dtype)

    def result(self) -> Tensor:
        return self.total.to(self.dtype)


class TokenLogprobs(torch.autograd.Function):
    """log softmax(logits)[target] for each token, fp32, in blocks of logits that backward computes anew."""

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: HeadTransform,
        softmax: Softmax,
    ):
        shape = block_shape(len(targets), len(weight), weight.element_size(), softmax.whole_rows)
        sums = Sums.of_nothing(targets)
        for rows, columns in blocks(len(targets), len(weight), shape):
            part = hidden[rows], weight[columns], None if bias is None else bias[columns]
            block = Block(product(*part), columns.start, targets[rows], transform)
            softmax.fold(block, sums.of(rows))
            del block  # before the next is made
        log_total = sums.total.log()
        ctx.save_for_backward(hidden, weight, bias, targets, sums.largest + log_total)
        ctx.transform, ctx.softmax, ctx.shape = transform, softmax, shape
        return sums.chosen - sums.largest - log_total

    @staticmethod
    def backward(ctx, grad_logprobs: Tensor):
        hidden, weight, bias, targets, log_partition = ctx.saved_tensors
        grad_hidden = ProductSum(hidden, has_several=ctx.shape[1] < len(weight))
        grad_weight = ProductSum(weight, has_several=ctx.shape[0] < len(hidden)) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        for rows, columns in blocks(len(targets), len(weight), ctx.shape):
            part = hidden[rows], weight[columns], None if bias is None else bias[columns]
            block = Block(product(*part), columns.start, targets[rows], ctx.transform)
            of_bias = None if grad_bias is None else grad_bias[columns]
            ctx.softmax.differentiate(block, log_partition[rows], grad_logprobs[rows], of_bias)
            grad_hidden.add(rows, block.products, weight[columns])
            if grad_weight is not None:
                grad_weight.add(columns, block.products.t(), hidden[rows])
            del block
        return (
            grad_hidden.result(),
            None if grad_weight is None else grad_weight.result(),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def blocks(num_tokens: int, vocabulary: int, shape: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    """(rows, columns) of each block; of no token there is one, so that every gradient is written."""
    for row in range(0, max(1, num_tokens), shape[0]):
        for column in range(0, vocabulary, shape[1]):
            yield slice(row, row + shape[0]), slice(column, column + shape[1])


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: HeadTransform,
    softmax: Softmax | None = None,
) -> Tensor:
    """log p(target) of each token.

    Args:
        hidden: [M, H] states that predict the targets.
        weight: [V, H], bias: [V] or None: the LM head.
        targets: [M] int64.
        softmax: what computes with a block of logits; None: torch, in tiles that suit the device.

    Returns:
        [M] fp32.
    """
    softmax = softmax or TiledSoftmax.on(hidden.device.type)
    return TokenLogprobs.apply(hidden, weight, bias, targets, transform, softmax)
