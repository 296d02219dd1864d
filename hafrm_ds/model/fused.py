"""The small operations between a layer's matrix products as one kernel each: norms, rotary embeddings, gates of MLPs.

transformers computes an RMSNorm by 8 kernels, rotary embeddings by 10 and a gate by 2, and keeps what lies between them
for backward. Liger's Triton kernels, or torch.compile, take one each. They are put into the modules of one model, never
into transformers' classes, so that two models of a process may differ.

A module is known by the code of its forward: transformers copies that of a few families into all others. What has
another code stays as it is, and is named (`FusedLayers`). torch's own LayerNorm is one kernel already.

Legend: T tokens, Q and G query and key-value heads, D head dimension, R rotated dimensions of it, H hidden.
"""

import dis
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from types import FunctionType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.phi3 import modeling_phi3

from hafrm_ds.errors import ModelError
from hafrm_ds.model.attention import import_problem
from hafrm_ds.model.experts import expert_layers

ROTATE = "apply_rotary_pos_emb"
"""The name under which transformers' attention layers call their rotary embedding."""
MOST_GRAPHS = 64
"""Of a compiled layer: kinds of layers, with and without gradients, layouts. torch would stop compiling after 8."""


@dataclass(frozen=True)
class RMSForm:
    """What families do differently in x / rms(x) * (offset + weight).

    in_fp32: the weight is multiplied in fp32, and the product rounded, instead of both being rounded before.
    """

    offset: float
    in_fp32: bool


RMS_FORMS = {
    modeling_llama.LlamaRMSNorm: RMSForm(0.0, in_fp32=False),
    Gemma2RMSNorm: RMSForm(1.0, in_fp32=True),
    Olmo2RMSNorm: RMSForm(0.0, in_fp32=True),
}
Rotation = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(query [1, Q, T, D], key [1, G, T, D], cos [1, T, R], sin [1, T, R]) -> both, rotated in R."""
Gate = Callable[[Tensor, Tensor], Tensor]
"""(gate, up) -> activation(gate) * up."""


class Functions(Protocol):
    """Where the fused functions come from. name: as model.fused has it."""

    @property
    def name(self) -> str: ...

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float, form: RMSForm) -> Tensor:
        """[..., H] -> [..., H]"""

    def rotation(self, stock: Callable) -> Rotation | None:
        """One that does what the function of a family does; None if there is none."""

    def gate(self, activation: nn.Module) -> Gate | None: ...


@dataclass(frozen=True)
class LigerFunctions:
    """Those of the package liger-kernel.

    ops: its module liger_kernel.ops, or what has the same functions.
    """

    ops: Any
    name: str = "liger"

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float, form: RMSForm) -> Tensor:
        casting, in_place, row_mode = "gemma" if form.in_fp32 else "llama", False, None
        # Not in place: behind some norms the gradient is the residual's as well.
        return self.ops.LigerRMSNormFunction.apply(x, weight, epsilon, form.offset, casting, in_place, row_mode)

    def rotation(self, stock: Callable) -> Rotation | None:
        known = (modeling_llama.apply_rotary_pos_emb, modeling_phi3.apply_rotary_pos_emb)
        is_known = any(same_code(stock, each) for each in (*known, modeling_gpt_neox.apply_rotary_pos_emb))
        in_halves = is_known and same_code(stock.__globals__["rotate_half"], modeling_llama.rotate_half)
        return self.rotate if in_halves else None

    def rotate(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        # It rotates in place. A product that is kept instead of being computed again in backward would come out rotated
        # twice.
        return self.ops.LigerRopeFunction.apply(query.clone(), key.clone(), cos, sin)

    def gate(self, activation: nn.Module) -> Gate | None:
        known = {"silu": "LigerSiLUMulFunction", "gelu_pytorch_tanh": "LigerGELUMulFunction"}
        found = (known[name] for name in known if isinstance(activation, type(ACT2FN[name])))
        return next((getattr(self.ops, name).apply for name in found), None)


class CompiledFunctions:
    """Those of torch.compile, for tensors of any length. Their first call takes seconds."""

    name = "compile"

    def __init__(self) -> None:
        self.rms_norm = torch.compile(rms_norm, **for_any_length())

    def rotation(self, stock: Callable) -> Rotation | None:
        return torch.compile(stock, **for_any_length())

    def gate(self, activation: nn.Module) -> Gate | None:
        return torch.compile(partial(gated, activation.forward), **for_any_length())


def for_any_length() -> dict[str, Any]:
    """Arguments of torch.compile, of which older versions of torch lack the second."""
    has_limit = "recompile_limit" in inspect.signature(torch.compile).parameters
    return {"dynamic": True, **({"recompile_limit": MOST_GRAPHS} if has_limit else {})}


def liger_functions() -> LigerFunctions:
    from liger_kernel import ops

    return LigerFunctions(ops)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, form: RMSForm) -> Tensor:
    """As transformers' classes, step by step. A function of tensors alone, so that no hook of ZeRO-3 is in a graph."""
    states = x.float()
    states = states * torch.rsqrt(states.square().mean(-1, keepdim=True) + epsilon)
    if form.in_fp32:
        return (states * (form.offset + weight.float())).to(x.dtype)
    return weight * states.to(x.dtype)


def gated(activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    return activation(gate) * up


@dataclass
class FusedLayers:
    """What is fused in a model.

    kind: as model.fused, with auto decided. names: what has been fused; others: classes with what could not be.
    """

    kind: str
    names: set[str] = field(default_factory=set)
    others: set[str] = field(default_factory=set)
    forwards: list[tuple[nn.Module, Callable]] = field(default_factory=list)

    def __str__(self) -> str:
        others = f"; as they are: {', '.join(sorted(self.others))}" if self.others else ""
        return f"{', '.join(sorted(self.names)) or 'none'} by {self.kind}{others}"

    def put(self) -> None:
        for module, forward in self.forwards:
            module.forward = forward

    def take_away(self) -> None:
        for module, _ in self.forwards:
            del module.forward

    @contextmanager
    def taken_away(self) -> Iterator[None]:
        """Inside, the model computes by transformers' own code."""
        with ExitStack() as stack:
            if self.kind == "compile_layers":
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            self.take_away()
            stack.callback(self.put)
            yield


def fused_layers(causal_lm: PreTrainedModel, kind: str, device: torch.device) -> FusedLayers | None:
    """Fuse what can be, by the names of model.fused; None: nothing.

    Args:
        device: where the model will run.

    Raises:
        ModelError: it cannot run on `device`, or knows nothing in the model.
    """
    if kind == "off" or (kind == "auto" and (device.type != "cuda" or import_problem("liger_kernel.ops"))):
        return None
    if kind == "auto":
        fused = fuse(causal_lm, liger_functions())
        return fused if fused.names else None
    check_fused(kind, device)
    if kind == "compile_layers":
        return compile_layers(causal_lm)
    fused = fuse(causal_lm, liger_functions() if kind == "liger" else CompiledFunctions())
    if not fused.names:
        what = f"{type(causal_lm).__name__} has no RMSNorm, rotary embedding or gated MLP that it knows"
        raise ModelError(f"model.fused {kind} cannot be used: {what}. Set --model.fused off")
    return fused


def check_fused(kind: str, device: torch.device) -> None:
    """Raises ModelError if `kind`, a name of model.fused, can run no model on a device."""
    problem = None
    if kind == "liger":
        problem = import_problem("liger_kernel.ops")
        if not problem and device.type != "cuda" and not os.environ.get("TRITON_INTERPRET"):
            problem = f"it runs on GPUs, not on {device}"
    elif kind in ("compile", "compile_layers") and device.type == "cuda":
        problem = import_problem("triton")
    if problem is not None:
        raise ModelError(f"model.fused {kind} cannot be used: {problem}. Set --model.fused off")


def fuse(causal_lm: PreTrainedModel, functions: Functions) -> FusedLayers:
    """Put fused functions into the modules that are known. LayerNorms that are composed become torch's own."""
    fused = FusedLayers(functions.name)
    attention_forwards: dict[Callable, Callable] = {}
    for module in filter(has_small_operations, causal_lm.modules()):
        stock = inspect.unwrap(type(module).forward)
        name, forward = "", None
        if form := next((form for known, form in RMS_FORMS.items() if is_like(module, known)), None):
            epsilon = getattr(module, "variance_epsilon", None) or module.eps
            name, forward = "RMSNorm", partial(run_rms_norm, module, functions.rms_norm, epsilon, form)
        elif is_like(module, CohereLayerNorm):
            name, forward = "LayerNorm", partial(run_layer_norm, module)
        elif known := next((each for each in GATED_MLPS if is_like(module, each)), None):
            activation, run = GATED_MLPS[known]
            if gate := functions.gate(getattr(module, activation)):
                name, forward = "gated MLP", partial(run, module, gate)
        elif ROTATE in stock.__code__.co_names:
            if stock not in attention_forwards and (rotation := functions.rotation(stock.__globals__[ROTATE])):
                attention_forwards[stock] = in_namespace(stock, {ROTATE: rotation})
            if stock in attention_forwards:
                name, forward = "rotary embedding", partial(attention_forwards[stock], module)
        if forward is None:
            fused.others.add(type(module).__name__)
        else:
            fused.names.add(name)
            fused.forwards.append((module, forward))
    fused.put()
    return fused


def has_small_operations(module: nn.Module) -> bool:
    """Whether it is a norm of several kernels, or an MLP with an activation between products, or rotates."""
    if type(module) is nn.LayerNorm:
        return False
    is_norm, is_gated = type(module).__name__.endswith("Norm"), hasattr(module, "act_fn")
    is_gated |= is_like(module, modeling_phi3.Phi3MLP)
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return is_norm or is_gated or (code is not None and ROTATE in code.co_names)


def compile_layers(causal_lm: PreTrainedModel) -> FusedLayers:
    """Let torch.compile make kernels of each layer as a whole. Layers of one kind share their graphs.

    Raises:
        ModelError: the model's layers cannot be compiled.
    """
    layers = [module for module in causal_lm.modules() if isinstance(module, GradientCheckpointingLayer)]
    problem = None if layers else "has no layers that are known as such"
    if expert_layers(causal_lm):
        problem = "is a mixture of experts, of which other ones run for each batch"
    if problem:
        raise ModelError(
            f"model.fused compile_layers cannot be used: {type(causal_lm).__name__} {problem}. Set --model.fused off"
        )
    for layer in layers:
        layer.compile(**for_any_length())
    return FusedLayers("compile_layers", names={type(layer).__name__ for layer in layers})


# ---- forwards of modules -------------------------------------------------------------------------------------------


def run_rms_norm(module: Any, function: Callable, epsilon: float, form: RMSForm, x: Tensor) -> Tensor:
    return function(x, module.weight, epsilon, form)


def run_layer_norm(module: Any, x: Tensor) -> Tensor:
    weight, epsilon = module.weight, module.variance_epsilon
    if weight.dim() > 1:  # of each head its own
        return type(module).forward(module, x)
    return F.layer_norm(x, weight.shape, weight, None, epsilon)


def run_mlp(module: Any, gate: Gate, x: Tensor) -> Tensor:
    return module.down_proj(gate(module.gate_proj(x), module.up_proj(x)))


def run_packed_mlp(module: Any, gate: Gate, x: Tensor) -> Tensor:
    return module.down_proj(gate(*module.gate_up_proj(x).chunk(2, dim=-1)))


GATED_MLPS: dict[type[nn.Module], tuple[str, Callable]] = {
    modeling_llama.LlamaMLP: ("act_fn", run_mlp),
    modeling_phi3.Phi3MLP: ("activation_fn", run_packed_mlp),
}
"""Class -> the name of its activation, and its fused forward."""


def in_namespace(function: Callable, names: dict[str, Any]) -> Callable:
    """The same function, which finds something else under some global names."""
    assert isinstance(function, FunctionType)
    result = FunctionType(
        function.__code__,
        function.__globals__ | names,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    result.__kwdefaults__ = function.__kwdefaults__
    return result


def is_like(module: nn.Module, known: type[nn.Module]) -> bool:
    """Whether a module computes what one of a known class does."""
    methods = [name for name in ("forward", "_norm") if hasattr(known, name)]
    return all(
        hasattr(module, name) and same_code(getattr(type(module), name), getattr(known, name)) for name in methods
    )


@cache
def same_code(one: Callable, other: Callable) -> bool:
    """Whether two functions do the same, whatever their documentation, annotations and places are."""
    codes = [
        [(each.opname, each.argval) for each in dis.get_instructions(inspect.unwrap(function))]
        for function in (one, other)
    ]
    return codes[0] == codes[1]
