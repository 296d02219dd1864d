"""What backward computes anew instead of finding it kept, by the values of model.gradient_checkpointing.

selective keeps of a layer what is dear to compute and small beside what is made of it: the outputs of its matrix
products and of its attention (Korthikanti et al. 2022, arXiv 2205.05198, section 5, recompute attention alone; with
FlashAttention it is the other way round). Norms, rotary embeddings, activations and additions are computed again.
"""

import math
from functools import cache
from typing import Any

from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from hafrm_ds.errors import ModelError

PRODUCTS = ("aten::mm", "aten::addmm", "aten::linear", "aten::_grouped_mm", "transformers::grouped_mm_fallback")
BATCHED_PRODUCTS = {"aten::bmm": 0, "aten::baddbmm": 1}
"""Name -> place of the first factor among the arguments."""
ATTENTION = ("aten::_scaled_dot_product_", "aten::_flash_attention_forward", "aten::_efficient_attention_forward")
ATTENTION_PACKAGES = ("torch_attn::", "flash_attn::", "flash_attn_3::", "hafrm_ds::")
"""How the names of operations begin: torch's variable-length attention, FlashAttention 2 and 3, and what stands for
them in a plan. FlashAttention 4 starts its kernels past torch, so it is computed again."""
EVERY = "every_"


def is_kept(operation: Any, arguments: tuple) -> bool:
    """Whether the output of an operation is kept under selective recomputation.

    Batched products are, unless the output is larger than both factors: such are the scores of attention, which a model
    without a kernel for it forms.
    """
    first = BATCHED_PRODUCTS.get(name_of(operation))
    if first is not None:
        left, right = arguments[first : first + 2]
        return left.shape[0] * left.shape[1] * right.shape[2] <= left.numel() + right.numel()
    return is_product_or_attention(operation)


@cache  # this and what follows is asked of every operation that a layer starts
def is_product_or_attention(operation: Any) -> bool:
    name = name_of(operation)
    return name in PRODUCTS or name.startswith(ATTENTION + ATTENTION_PACKAGES)


@cache
def name_of(operation: Any) -> str:
    """Its namespace and name; nothing for one of torch's higher order."""
    return operation._schema.name if isinstance(operation, OpOverload) else ""


@cache
def changes_in_place(operation: Any) -> bool:
    return isinstance(operation, OpOverload) and operation._schema.is_mutable


class KeptOperations(TorchDispatchMode):
    """Inside, another mode sees the operations that are kept, and no others.

    torch's own would want to see the same operations in recomputation as in forward. Under ZeRO-3 they are not the
    same: layers fetch their weights in between, in forward and backward in other portions.
    """

    def __init__(self, mode: TorchDispatchMode):
        super().__init__()
        self.mode = mode

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Of torch.compile, which from torch 2.13 on runs no compiled function inside of other modes."""
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if is_kept(func, args):
            return self.mode.__torch_dispatch__(func, types, args, kwargs or {})
        return func(*args, **(kwargs or {}))


class Keeping(KeptOperations):
    """In forward: also sees to it that what is kept stays as it is.

    Raises:
        ModelError: a layer changes it in place, and recomputation would find the changed value.
    """

    def __init__(self, mode: TorchDispatchMode):
        super().__init__(mode)
        self.kept: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if is_kept(func, args):
            result = self.mode.__torch_dispatch__(func, types, args, kwargs or {})
            self.kept.update(map(memory_of, tree_leaves(result)))
            return result
        if changes_in_place(func) and isinstance(args[0], Tensor) and memory_of(args[0]) in self.kept:
            raise ModelError(
                "model.gradient_checkpointing is selective, but a layer of this model changes a product in place "
                f"({name_of(func)}), which would then be lost; set it to true, every_2 or false"
            )
        return func(*args, **(kwargs or {}))


def memory_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def keep_products() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """The modes of one layer in forward, which keeps, and in recomputation, which finds what was kept."""
    forward, recomputation = create_selective_checkpoint_contexts(
        lambda context, operation, *args, **kwargs: CheckpointPolicy.MUST_SAVE
    )
    return Keeping(forward), KeptOperations(recomputation)


def set_gradient_checkpointing(causal_lm: PreTrainedModel, kind: bool | str) -> None:
    """Set what backward recomputes, by a value of model.gradient_checkpointing.

    Raises:
        ModelError: the model's layers can be recomputed as a whole or not at all.
    """
    # transformers 5.24 has new names for the methods, and warns at the old ones.
    stem = "activation" if hasattr(causal_lm, "activation_checkpointing_enable") else "gradient"
    if not kind:
        getattr(causal_lm, f"{stem}_checkpointing_disable")()
        return
    layers = [module for module in causal_lm.modules() if isinstance(module, GradientCheckpointingLayer)]
    if isinstance(kind, str) and not layers:
        raise ModelError(
            f"model.gradient_checkpointing is {kind}, but the layers of {type(causal_lm).__name__} are not built on "
            "transformers' GradientCheckpointingLayer; set it to true or false"
        )
    selection = {"context_fn": keep_products} if kind == "selective" else {}
    getattr(causal_lm, f"{stem}_checkpointing_enable")({"use_reentrant": False, **selection})
    for number, layer in enumerate(layers):
        # The last layer is better kept: all others are when it would be recomputed.
        layer.gradient_checkpointing = number % interval(kind) == 0


def interval(kind: bool | str) -> int:
    """N of every_N; else 1."""
    return int(kind.removeprefix(EVERY)) if isinstance(kind, str) and kind.startswith(EVERY) else 1


def recomputed_layers(kind: bool | str, num_layers: int) -> int:
    """How many layers are computed a second time as a whole, matrix products and all."""
    return math.ceil(num_layers / interval(kind)) if kind not in (False, "selective") else 0
