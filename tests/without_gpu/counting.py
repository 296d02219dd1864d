"""What operations on the meta device would start on a GPU: kernels, the bytes they move, the operations of products."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig

from hafrm_ds.capacity.working_memory import META, TRACED_OPS, TracedRotation
from hafrm_ds.data.packing import PackedBatch
from hafrm_ds.model.attention import KERNELS
from hafrm_ds.model.fused import LigerFunctions, fuse
from hafrm_ds.model.hybrid import HybridModel, RewardHead
from hafrm_ds.model.token_logprobs import Block
from tests.gpu.benchmark import SHAPES
from tests.tiny_models import pair_losses

STARTS_NOTHING = {
    *("view", "_unsafe_view", "t", "transpose", "permute", "unsqueeze", "squeeze", "expand", "slice", "select"),
    *("split", "split_with_sizes", "detach", "alias", "as_strided", "reshape", "_reshape_alias", "unbind", "chunk"),
    *("empty", "empty_like", "new_empty", "empty_strided", "lift_fresh", "is_same_size", "result_type"),
    "_has_compatible_shallow_copy_type",
}
LIGER_KERNELS = {"TracedNorm": (1, 4), "TracedRotation": (1, 1), "TracedGate": (1, 1)}
"""Of Liger's functions, forward and backward. A norm's backward clears its result, and adds up the gradients of the
weight that each multiprocessor has found, and rounds their sum."""


@dataclass
class Product:
    """[rows, inner] @ [inner, columns]"""

    rows: int
    inner: int
    columns: int
    num_bytes: int


@dataclass
class Counts:
    """kernels: by name, products among them. num_bytes: read and written by all other kernels."""

    kernels: Counter[str] = field(default_factory=Counter)
    products: list[Product] = field(default_factory=list)
    num_bytes: int = 0

    def add(self, name: str, tensors: Iterable[object], number: int = 1) -> None:
        self.kernels[name] += number
        self.num_bytes += bytes_of(tensors)


class Counting(TorchDispatchMode):
    """Inside, counts the operations that would start a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        if (name := func.overloadpacket.__name__) not in STARTS_NOTHING:
            tensors = [*tree_leaves((args, kwargs or {})), *tree_leaves(result)]
            if name in ("mm", "addmm", "addmm_"):
                left, right = args[:2] if name == "mm" else args[1:3]
                (rows, inner), columns = left.shape, right.shape[1]
                self.counts.kernels[name] += 1
                self.counts.products.append(Product(rows, inner, columns, bytes_of(tensors)))
            else:
                self.counts.add(name, tensors)
        return result


def bytes_of(tensors: Iterable[object]) -> int:
    """Of the elements that each tensor has of its own, so that one that is spread out counts once."""
    total = 0
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            own = [size for size, stride in zip(tensor.shape, tensor.stride()) if stride]
            total += tensor.element_size() * torch.Size(own).numel()
    return total


def counted_ops(counts: list[Counts]) -> SimpleNamespace:
    """Stand-ins of Liger's functions that add what theirs would start to counts[-1]."""

    def counted(function: Any) -> type[torch.autograd.Function]:
        forward_kernels, backward_kernels = LIGER_KERNELS[function.__name__]

        class Counted(function):
            @staticmethod
            def forward(ctx, *args):
                with no_dispatch():  # what the stand-in does is not what Liger's would
                    outputs = function.forward(ctx, *args)
                counts[-1].add(function.__name__, [*args, *tree_leaves(outputs)], forward_kernels)
                # Read again in backward; of a rotation only the angles. What is kept can be asked for once.
                ctx.kept_bytes = bytes_of(args[2:] if function is TracedRotation else args)
                return outputs

            @staticmethod
            def backward(ctx, *grads):
                outputs = function.backward(ctx, *grads)
                counts[-1].add(f"{function.__name__}.backward", [*grads, *outputs], backward_kernels)
                counts[-1].num_bytes += ctx.kept_bytes
                return outputs

        return Counted

    return SimpleNamespace(**{name: counted(function) for name, function in vars(TRACED_OPS).items()})


def model_of(name: str, num_layers: int | None = None) -> HybridModel:
    """A shape of tests/gpu/benchmark.py, of all its layers or of so many, as it would run on a GPU."""
    shape = SHAPES[name] if num_layers is None else replace(SHAPES[name], num_hidden_layers=num_layers)
    config = LlamaConfig(**asdict(shape), max_position_embeddings=4096)
    with META:
        causal_lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    causal_lm.set_attn_implementation(KERNELS["varlen"].implementation)
    head = RewardHead(config.hidden_size, 1, bias=False, device=META, dtype=torch.bfloat16)
    return HybridModel(causal_lm.train(), head)


def counted_step(
    model: HybridModel, batch: PackedBatch, fused: bool, with_logprob: bool = True, one_kernel_softmax: bool = False
) -> list[Counts]:
    """Of forward with loss, and of backward.

    Args:
        one_kernel_softmax: as model.log_probs triton.
    """
    found = [Counts()]
    layers = fuse(model.causal_lm, LigerFunctions(counted_ops(found))) if fused else None
    model.response_logprobs.softmax = OneKernel(found) if one_kernel_softmax else None
    with Counting() as counting:
        counting.counts = found[-1]
        scores = model(batch.to(META), with_logprob=with_logprob)
        reference = torch.zeros(scores.logprob.shape, device=META) if with_logprob else None
        loss = pair_losses(scores.reward, scores.logprob, reference).mean()
        counting.counts = Counts()
        found.append(counting.counts)
        loss.backward()
    assert all(parameter.grad is not None for parameter in model.causal_lm.get_decoder().parameters())
    model.zero_grad()
    if layers is not None:
        layers.take_away()
    return found


@dataclass(frozen=True)
class OneKernel:
    """As `TritonSoftmax`, which reads each logit once, and in backward writes it."""

    counts: list[Counts]
    whole_rows: bool = False

    def fold(self, block: Block, *arguments) -> None:
        self.counts[-1].add("fold", [block.products])

    def differentiate(self, block: Block, *arguments) -> None:
        self.counts[-1].add("differentiate", [block.products, block.products])
