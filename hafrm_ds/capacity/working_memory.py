"""What a micro-batch takes beyond weights and optimizer: activations, temporaries, logits in blocks.

It is traced, not derived: the model runs forward and backward on torch's meta device, where tensors have shapes and no
content, and the storages that are alive are added up. So it holds for every architecture and layout, for frozen weights
and adapters, and counts what autograd really keeps. Korthikanti et al. 2022 (arXiv 2205.05198, equation 1) derive 34
bytes times the hidden size for a token and layer, dropout's masks among them, and attention scores, which
FlashAttention never holds; gated MLPs and norms in fp32 make it more.

Layers are alike, so two depths give the line for any, and two sizes of a micro-batch that for any number of tokens.

Legend: T tokens, Q and G query and key-value heads, D head dimension, K keys.
"""

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, PreTrainedModel

from hafrm_ds.data.packing import PackedBatch, lay_out
from hafrm_ds.data.tokenization import PromptWithResponses
from hafrm_ds.errors import ModelError
from hafrm_ds.model.attention import Kernel, segment_attention
from hafrm_ds.model.fused import LigerFunctions, fuse
from hafrm_ds.model.hybrid import HybridModel
from hafrm_ds.model.loading import first_line
from hafrm_ds.model.recomputation import interval, set_gradient_checkpointing
from hafrm_ds.model.token_logprobs import BLOCK_BYTES, TiledSoftmax

KINDS_OF_LAYERS = 2
"""That families alternate at most. The two traced models differ by so many layers."""
MOST_ANSWER_TOKENS = 2**16
"""Tokens of the answers in a micro-batch that is traced. Where a vocabulary is so small that more would be
needed to fill a block, logits take little."""
META = torch.device("meta")


class PeakOfStorages(TorchDispatchMode):
    """Inside, adds up the storages of all tensors that operations give, as long as each lives.

    Attributes:
        peak: most bytes that lived at a time.
    """

    def __init__(self, known: Sequence[Tensor]):
        """known: tensors that do not count, as weights."""
        super().__init__()
        self.live = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def forget(self, identity: int, num_bytes: int) -> None:
        self.known.discard(identity)
        self.live -= num_bytes


class BytesMoved(TorchDispatchMode):
    """Inside, adds up what operations read and write, each in a kernel of its own.

    Attributes:
        total: bytes.
    """

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        schema = func._schema
        is_view = not schema.is_mutable and any(each.alias_info is not None for each in schema.returns)
        if not is_view and "empty" not in schema.name:
            tensors = (each for each in tree_leaves((args, kwargs, result)) if isinstance(each, Tensor))
            self.total += sum(tensor.nbytes for tensor in tensors)
        return result


def attention_shapes(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """query [T, Q, D], key and value [K, G, D] -> output [T, Q, D] and a number [T, Q] of each query and head: what a
    FlashAttention call gives."""
    output = query.new_empty(*query.shape[:2], value.shape[-1])
    return output, query.new_empty(query.shape[:2], dtype=torch.float32)


@torch.library.custom_op("hafrm_ds::traced_attention", mutates_args=())
def traced_attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """As `attention_shapes`, by an operation: it is kept where those of kernels are (`model.recomputation`)."""
    return attention_shapes(query, key, value)


traced_attention.register_fake(attention_shapes)


def keep_attention(ctx, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    """Keep what a FlashAttention call keeps for its backward."""
    ctx.save_for_backward(*inputs, *output)


def attention_gradients(ctx, *gradients: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


traced_attention.register_autograd(attention_gradients, setup_context=keep_attention)


class TracedNorm(torch.autograd.Function):
    """Shapes of a fused RMSNorm: kept for backward are its input and a number a row."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, *how) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return x.clone()

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight), *[None] * (len(ctx.needs_input_grad) - 2)


class TracedRotation(torch.autograd.Function):
    """Shapes of a fused rotary embedding: nothing is kept but the angles, which all layers share."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return query.clone(), key.clone()

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return *(torch.empty_like(grad) for grad in grads), None, None


class TracedGate(torch.autograd.Function):
    """Shapes of a fused activation and product: kept for backward are its inputs."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return gate * up

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors)


TRACED_OPS = SimpleNamespace(
    LigerRMSNormFunction=TracedNorm,
    LigerRopeFunction=TracedRotation,
    LigerSiLUMulFunction=TracedGate,
    LigerGELUMulFunction=TracedGate,
)
"""In place of liger_kernel.ops. What torch.compile keeps is taken for the same."""


def run_traced(query: Tensor, key: Tensor, value: Tensor, segments, rule) -> Tensor:
    """As the kernels for GPUs: in the dtype of the model."""
    return traced_attention(query, key, value)[0]


def run_traced_on_cpu(query: Tensor, key: Tensor, value: Tensor, segments, rule) -> Tensor:
    """As `segmented` on the CPU, which computes in fp32."""
    return traced_attention(query.float(), key.float(), value.float())[0].to(query.dtype)


TRACED = {
    device: Kernel(f"traced_{device}", run, "torch", (), True)
    for device, run in (("cuda", run_traced), ("cpu", run_traced_on_cpu))
}
ANY_WINDOW = 2**31
"""Shapes do not depend on the sliding window, nor on attention sinks (s_aux), and a model may have its window in the
mask alone."""
for kernel in TRACED.values():
    AttentionInterface.register(
        kernel.implementation,
        lambda *arguments, kernel=kernel, s_aux=None, **options: segment_attention(
            kernel, *arguments, **options | {"sliding_window": options.get("sliding_window") or ANY_WINDOW}
        ),
    )


@dataclass(frozen=True)
class Pass:
    """How micro-batches go through a model: the arguments of its forward, and whether backward follows.

    device_type: "cuda", or "cpu", where attention computes in fp32. log_probs: as model.log_probs. fused: whether
        norms, rotary embeddings and gates are (model.fused). recomputation: as model.gradient_checkpointing.
    """

    layout: str
    device_type: str
    with_reward: bool
    with_logprob: bool
    with_gradients: bool = True
    log_probs: str = "torch"
    fused: bool = False
    recomputation: bool | str = False

    @property
    def softmax(self) -> TiledSoftmax:
        """The softmax whose memory is counted for that of the run. Triton's kernels take nothing beside a block, and
        a CPU next to nothing."""
        on_cpu = TiledSoftmax.on("cpu")
        if self.device_type == "cpu":
            return on_cpu
        return replace(on_cpu, whole_rows=False) if self.log_probs == "triton" else TiledSoftmax.on("cuda")


@dataclass(frozen=True)
class WorkingMemory:
    """Bytes of a micro-batch as a line: fixed + per_token * tokens that the body computes."""

    fixed: float
    per_token: float

    @classmethod
    def of(cls, model: HybridModel, items: Sequence[PromptWithResponses], how: Pass) -> "WorkingMemory":
        """From two micro-batches of such items, whose logits fill a block: more of them make no larger one.

        Args:
            model, how: as `working_bytes` takes them.
        """
        head = model.lm_head.weight
        block = min(MOST_ANSWER_TOKENS, BLOCK_BYTES // (head.element_size() * head.shape[0]))
        answers = sum(len(response) for item in items for response in item.responses)
        times = math.ceil(block / answers)
        sizes = [sum(len(item.prompt) + sum(map(len, item.responses)) for item in items) * times * k for k in (1, 2)]
        small, large = (working_bytes(model, [*items] * times * k, how) for k in (1, 2))
        per_token = (large - small) / (sizes[1] - sizes[0])
        return cls(fixed=small - per_token * sizes[0], per_token=per_token)

    def largest_budget(self, room: float) -> int:
        """Tokens of the largest micro-batch that fits into `room` bytes; 0 or less: none."""
        return int((room - self.fixed) // self.per_token)


def working_bytes(model: HybridModel, items: Sequence[PromptWithResponses], how: Pass) -> float:
    """Bytes that a micro-batch takes at its highest, beyond weights and their gradients.

    Args:
        model: on the meta device, trained weights set as in the run. Its attention and its log-probs are changed.

    Raises:
        ModelError: the model's code asks for values, which the meta device does not have.
    """
    return of_all_layers(model, items, how, peak_of)


def recomputed_bytes(model: HybridModel, items: Sequence[PromptWithResponses], how: Pass) -> float:
    """Bytes that recomputation reads and writes besides, for each token of such items.

    Args:
        model, how: as `working_bytes` takes them.
    """
    with_it, without = (of_all_layers(model, items, way, moved_by) for way in (how, replace(how, recomputation=False)))
    return (with_it - without) / sum(len(item.prompt) + sum(map(len, item.responses)) for item in items)


def of_all_layers(
    model: HybridModel,
    items: Sequence[PromptWithResponses],
    how: Pass,
    measure: Callable[[HybridModel, PackedBatch, Pass], int],
) -> float:
    """Measure a micro-batch with two small depths of the model, and continue the line through both to its own
    depth."""
    causal_lm = model.causal_lm
    # Padding is computed like any token, and the stock attention of padded rows keeps what a kernel keeps.
    batch = lay_out(items, "packed" if how.layout == "padded" else how.layout).to(META)
    depth = causal_lm.config.get_text_config().num_hidden_layers
    period = math.lcm(KINDS_OF_LAYERS, interval(how.recomputation))
    rest = depth % period
    depths = (rest + period, rest + 2 * period) if depth > rest + 2 * period else (depth,)
    set_gradient_checkpointing(causal_lm, how.recomputation)
    try:
        causal_lm.set_attn_implementation(TRACED[how.device_type].implementation)
        model.response_logprobs.softmax = how.softmax
        found = []
        for each in depths:
            with first_layers(causal_lm, each):
                found.append(measure(model, batch, how))
    except (RuntimeError, ValueError) as error:
        raise ModelError(
            f"{type(causal_lm).__name__} cannot be planned, as its code asks for more than shapes: {first_line(error)}"
        ) from error
    finally:
        set_gradient_checkpointing(causal_lm, False)
    slope = (found[-1] - found[0]) / max(1, depths[-1] - depths[0])
    return found[0] + slope * (depth - depths[0])


def peak_of(model: HybridModel, batch: PackedBatch, how: Pass) -> int:
    """Most bytes that live at a time in forward and backward, where a weight's gradient is dropped as soon as it is
    whole: what becomes of it is a matter of the ZeRO stage."""
    known = [*model.parameters(), *model.buffers()]
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda trained: setattr(trained, "grad", None))
        for parameter in model.parameters()
        if parameter.requires_grad
    ]
    try:
        with PeakOfStorages(known) as storages:
            run_pass(model, batch, how)
        return storages.peak
    finally:
        for hook in hooks:
            hook.remove()


def moved_by(model: HybridModel, batch: PackedBatch, how: Pass) -> int:
    """Bytes that forward and backward read and write."""
    try:
        with BytesMoved() as moved:
            run_pass(model, batch, how)
        return moved.total
    finally:
        model.zero_grad()


def run_pass(model: HybridModel, batch: PackedBatch, how: Pass) -> None:
    fused = fuse(model.causal_lm, LigerFunctions(TRACED_OPS)) if how.fused else None
    try:
        with torch.set_grad_enabled(how.with_gradients):
            scores = model(batch, with_reward=how.with_reward, with_logprob=how.with_logprob)
            if how.with_gradients:
                sum(part.sum() for part in (scores.reward, scores.logprob) if part is not None).backward()
    finally:
        if fused is not None:
            fused.take_away()


@contextmanager
def first_layers(causal_lm: PreTrainedModel, depth: int) -> Iterator[None]:
    """Inside, the body has its first `depth` layers alone."""
    layers = causal_lm.config.get_text_config().num_hidden_layers
    found = [
        (module, name)
        for module in causal_lm.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == layers
    ]
    if len(found) != 1:
        raise ModelError(f"{type(causal_lm).__name__} cannot be planned: it has no single list of {layers} layers")
    ((owner, name),) = found
    whole = getattr(owner, name)
    setattr(owner, name, whole[:depth])
    try:
        yield
    finally:
        setattr(owner, name, whole)
