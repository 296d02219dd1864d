"""Attention over the segments of a micro-batch, registered with transformers' AttentionInterface.

A model whose attention implementation is that of a `Kernel` calls `segment_attention` in every layer; the segments
travel as the keyword argument `segments` of the model's forward, so there is no global state and no forked modelling
code. Under a registered name without a mask function transformers builds no mask at all, which is what segments need. A
window or a chunk that a model puts into its mask alone is lost with it: such a model is refused (`masked_type`).

Which kernel runs is part of the registered name (`hafrm_fa2`, `hafrm_varlen`, ...), so a model says what it uses.

Legend: T tokens (queries), K keys, Q and G query and key-value heads, D head dimension.
"""

import importlib
import inspect
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from hafrm_ds.data.packing import AttentionSegments
from hafrm_ds.errors import ModelError

HARMLESS = ("position_ids", "cache_position")
"""Tensors that some models pass to their attention function and that change nothing in it."""
UNRESTRICTED = ("full_attention", "attention")
"""Layer types whose mask is causal and nothing else. The second is an older name of the first."""
SPANS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
"""Layer type -> the configuration's name for the number of tokens that one sees."""


class UnsupportedAttention(ModelError):
    """A model asks something of its attention that segments or a kernel cannot give."""


@dataclass(frozen=True)
class ScoreRule:
    """What a model does to its attention scores: scale (None: D ** -0.5), window of visible keys, soft cap."""

    scale: float | None
    window: int | None
    softcap: float | None


@dataclass(frozen=True)
class Kernel:
    """One implementation of segment attention.

    run: (query [T, Q, D], key [K, G, D], value [K, G, D], segments, rule) -> [T, Q, D].
    package: the module it comes from, which must be installed.
    capabilities: major compute capabilities of NVIDIA GPUs that it was written for; empty: any device, CPU included.
    has_softcap: takes a soft cap, forward and backward.
    largest_heads: major compute capability -> dimensions of a head that it takes there, in multiples of 8; where it
        says nothing, 256.
    deterministic_heads: dimensions of the largest head whose backward can add in one order.
    """

    name: str
    run: Callable[[Tensor, Tensor, Tensor, AttentionSegments, ScoreRule], Tensor]
    package: str
    capabilities: tuple[int, ...]
    has_softcap: bool
    largest_heads: Mapping[int, int] = field(default_factory=dict)
    deterministic_heads: int = 256

    @property
    def implementation(self) -> str:
        """Its name in transformers' AttentionInterface. Never with "flash" or "sdpa" in it: transformers would take it
        for its own, and check whether the model supports that."""
        return f"hafrm_{self.name}"

    def obstacle(self, device: torch.device, dtype: torch.dtype, config: PretrainedConfig) -> str | None:
        """Why it cannot run a model on a device; None when it can."""
        if (unfit := self.unfit_device(device)) is not None:
            return unfit
        if self.capabilities:
            major = torch.cuda.get_device_capability(device)[0]
            if dtype != torch.bfloat16:
                return f"it has no {str(dtype).removeprefix('torch.')}"
            largest = self.largest_heads.get(major, 256)
            if (size := head_dimension(config)) > largest or size % 8:
                return f"it takes heads of up to {largest} dimensions in multiples of 8, not {size}"
            if size > self.deterministic_heads and torch.are_deterministic_algorithms_enabled():
                return f"deterministic is true, and its backward for heads of {size} dimensions is not"
            if getattr(config, "v_head_dim", size) != size:
                return "it takes keys and values of one size, and this model has two"
        if not self.has_softcap and getattr(config, "attn_logit_softcapping", None):
            return "it has no soft cap for attention scores, which this model uses"
        return import_problem(self.package)  # last: importing a kernel can take seconds, or fail

    def unfit_device(self, device: torch.device) -> str | None:
        """Why it can run no model on a device; None when it was made for such."""
        if not self.capabilities:
            return None
        if device.type != "cuda":
            return f"it needs an NVIDIA GPU, not {device.type}"
        if torch.version.hip:
            return "it needs an NVIDIA GPU, not one of AMD"  # whose major capabilities are other GPUs'
        if (major := torch.cuda.get_device_capability(device)[0]) not in self.capabilities:
            return f"it is not made for GPUs of compute capability {major}"
        return None


def import_problem(package: str) -> str | None:
    """Why a package cannot be imported; None when it can. A build for another torch is found by trying alone, and what
    such a build raises is not always an ImportError."""
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        missing = error.name or package
        if package == missing or package.startswith(f"{missing}."):
            return f"the package {missing} is not installed"
        return f"the package {package} cannot be imported: it needs {missing}, which is not installed"
    except Exception as error:
        return f"the package {package} cannot be imported: {str(error) or type(error).__name__}"
    return None


def head_dimension(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def segment_attention(
    kernel: Kernel,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: AttentionSegments,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention function for AttentionInterface.

    Args:
        query: [1, Q, T, D]; key, value: [1, G, T, D].
        attention_mask: must be None: the segments are the mask.
        sliding_window: tokens that a query sees, itself among them; None: all.

    Returns:
        ([1, T, Q, D], None)

    Raises:
        UnsupportedAttention: the model passes a tensor that is not known here, as attention sinks or position biases,
            or a mask of its own, or a soft cap that the kernel has not; or its mask would have held a window or chunks
            that it does not pass. Each would change the scores, so it is not ignored.
    """
    if attention_mask is not None:
        raise UnsupportedAttention(
            f"{type(module).__name__} makes an attention mask of its own, which the layouts shared_prefix and packed "
            "have no place for; set --batch.layout padded"
        )
    if sliding_window is None and (kind := masked_type(module, segments.max_k)):
        raise UnsupportedAttention(
            f"{type(module).__name__} is {kind} by its attention mask alone, and the layouts shared_prefix and packed "
            "have no mask; set --batch.layout padded"
        )
    if unknown := [name for name, value in kwargs.items() if isinstance(value, Tensor) and name not in HARMLESS]:
        raise UnsupportedAttention(
            f"{type(module).__name__} gives {', '.join(unknown)} to its attention, which the layouts shared_prefix and "
            "packed do not know; set --batch.layout padded"
        )
    if softcap and not kernel.has_softcap:
        raise UnsupportedAttention(
            f"{type(module).__name__} caps its attention scores, which {kernel.name} cannot; "
            "set --model.attention segmented"
        )
    # Not tensor[0], whose gradient is a copy into zeros.
    query, key, value = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    if segments.key_index is not None:
        key, value = key.index_select(0, segments.key_index), value.index_select(0, segments.key_index)
    output = kernel.run(query, key, value, segments, ScoreRule(scaling, sliding_window, softcap or None))
    return output[None], None


def masked_type(module: nn.Module, length: int) -> str | None:
    """The layer type of an attention layer whose mask hides more than later tokens, by the model's configuration; None
    where it hides nothing more.

    transformers makes its masks from the same fields. A span that holds all positions the model knows hides nothing.

    Args:
        module: the layer, with the configuration of its text model, as AttentionInterface asks for.
        length: tokens of the longest sequence of the batch, which may be more than the positions that the model knows.
    """
    fields = vars(module.config)  # every layer asks, and getattr is slow for what a configuration has not
    if layer_types := fields.get("layer_types"):
        # torch.compile makes a graph for each value of an integer, and there are two kinds of layers at most.
        kind = getattr(module, "layer_type", None) or layer_types[module.layer_idx]
    elif fields.get("sliding_window") and fields.get("use_sliding_window", True):
        kind = "sliding_attention"
    elif fields.get("attention_chunk_size"):
        kind = "chunked_attention"
    else:
        return None
    if kind in UNRESTRICTED:
        return None
    span = fields.get(SPANS[kind]) if kind in SPANS else None
    longest = max(getattr(module.config, "max_position_embeddings", None) or math.inf, length)
    return kind if span is None or span < longest else None


# ---- kernels -------------------------------------------------------------------------------------------------------


def run_segmented(query: Tensor, key: Tensor, value: Tensor, segments: AttentionSegments, rule: ScoreRule) -> Tensor:
    """torch's scaled_dot_product_attention, one call a segment: any device, any dtype, windows and soft caps.

    On CPU it computes in fp32: for segments of up to a few hundred tokens its backward is then up to twice as fast as
    in bfloat16, and the result is more exact.
    """
    dtype = query.dtype
    if query.device.type == "cpu":
        query, key, value = query.float(), key.float(), value.float()
    outputs = [
        segment_sdpa(q, k, v, rule)
        for q, k, v in zip(
            query.transpose(0, 1)[None].split(segments.q_lengths, dim=2),
            key.transpose(0, 1)[None].split(segments.k_lengths, dim=2),
            value.transpose(0, 1)[None].split(segments.k_lengths, dim=2),
            strict=True,
        )
    ]
    return torch.cat(outputs, dim=2)[0].transpose(0, 1).to(dtype)


def segment_sdpa(query: Tensor, key: Tensor, value: Tensor, rule: ScoreRule) -> Tensor:
    """Attention of one segment, causal from the bottom right: query i of q sees keys up to k - q + i.

    query [1, Q, q, D], key and value [1, G, k, D] -> [1, Q, q, D]
    """
    q_length, k_length = query.shape[2], key.shape[2]
    window = rule.window if rule.window is not None and rule.window < k_length else None
    visible: Tensor | None = None  # the mask, where is_causal does not say it
    if window is not None or q_length != k_length or rule.softcap is not None:
        query_position = torch.arange(k_length - q_length, k_length, device=query.device)[:, None]
        key_position = torch.arange(k_length, device=query.device)[None]
        visible = key_position <= query_position
        if window is not None:
            visible &= key_position > query_position - window
    if rule.softcap is None:
        # On CUDA grouped heads with a mask, or in fp32, run in no fused kernel of torch: the scores would be held.
        if query.is_cuda and (visible is not None or query.dtype == torch.float32):
            key, value = repeat_groups(key, query.shape[1], dim=1), repeat_groups(value, query.shape[1], dim=1)
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=visible,
            is_causal=visible is None,
            scale=rule.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )

    # No fused kernel of torch has the soft cap of Gemma 2, so its scores are formed, in fp32 for the softmax.
    key, value = repeat_groups(key, query.shape[1], dim=1), repeat_groups(value, query.shape[1], dim=1)
    scores = query @ key.transpose(2, 3) * (rule.scale if rule.scale is not None else query.shape[-1] ** -0.5)
    scores = rule.softcap * torch.tanh(scores / rule.softcap)
    assert visible is not None  # a soft cap always has its mask
    scores = scores.masked_fill(~visible, float("-inf"))
    return scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype) @ value


def repeat_groups(tensor: Tensor, num_heads: int, dim: int) -> Tensor:
    """Repeat key-value heads along `dim` until there are as many as query heads."""
    times = num_heads // tensor.shape[dim]
    return tensor if times == 1 else tensor.repeat_interleave(times, dim=dim)


def run_varlen(query: Tensor, key: Tensor, value: Tensor, segments: AttentionSegments, rule: ScoreRule) -> Tensor:
    """torch's own variable-length FlashAttention."""
    from torch.nn.attention.varlen import varlen_attn

    grouping: dict[str, Any] = {}
    if takes_groups(varlen_attn):
        grouping = {"enable_gqa": query.shape[1] != key.shape[1]}
    else:
        key, value = repeat_groups(key, query.shape[1], dim=1), repeat_groups(value, query.shape[1], dim=1)
    output = varlen_attn(
        query,
        key,
        value,
        segments.cu_seqlens_q,
        segments.cu_seqlens_k,
        segments.max_q,
        segments.max_k,
        scale=rule.scale,
        window_size=(-1, 0) if rule.window is None else flash_window(rule.window),  # (-1, 0): causal
        **grouping,
    )
    return output[0] if isinstance(output, tuple) else output


@cache  # reading a signature takes longer than a kernel's launch
def takes_groups(varlen_attn: Callable) -> bool:
    """Whether torch's function takes fewer key-value heads than query heads, as from torch 2.12 on."""
    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def run_flash_package(
    module: str, query: Tensor, key: Tensor, value: Tensor, segments: AttentionSegments, rule: ScoreRule
) -> Tensor:
    """flash_attn_varlen_func of one of the FlashAttention packages, which agree in these arguments.

    Their backward adds in the order in which blocks finish, unless told otherwise; torch's own kernels look at
    torch.use_deterministic_algorithms by themselves.
    """
    if module not in sys.modules:  # torch.compile breaks its graph at an import
        importlib.import_module(module)
    function = sys.modules[module].flash_attn_varlen_func
    options: dict[str, Any] = {} if rule.window is None else {"window_size": flash_window(rule.window)}
    if torch.are_deterministic_algorithms_enabled():
        options["deterministic"] = True
    output = function(
        query,
        key,
        value,
        cu_seqlens_q=segments.cu_seqlens_q,
        cu_seqlens_k=segments.cu_seqlens_k,
        max_seqlen_q=segments.max_q,
        max_seqlen_k=segments.max_k,
        softmax_scale=rule.scale,
        causal=True,
        softcap=rule.softcap or 0.0,
        **options,
    )
    return output[0] if isinstance(output, tuple) else output  # some versions also return the log-sum-exp


def flash_window(window: int) -> tuple[int, int]:
    """(left, right) of FlashAttention, which counts keys beside a query's own; a model's window includes that one."""
    return window - 1, 0


KERNELS = {
    kernel.name: kernel
    for kernel in (
        # Its deterministic backward refuses heads that it rounds up to 256 (hopper/flash_api.cpp).
        Kernel(
            "fa3",
            partial(run_flash_package, "flash_attn_interface"),
            "flash_attn_interface",
            (9,),
            True,
            deterministic_heads=192,
        ),
        Kernel("fa2", partial(run_flash_package, "flash_attn"), "flash_attn_2_cuda", (8, 9, 10, 12), True),
        # A pre-release. On Blackwell it has no head sizes between 128 and 256, and no soft cap for all of them.
        # It compiles its kernels by itself: where torch.compile makes graphs of a layer, one ends before it.
        Kernel(
            "fa4",
            torch.compiler.disable(partial(run_flash_package, "flash_attn.cute")),
            "flash_attn.cute",
            (9, 10),
            False,
            {10: 128},
        ),
        Kernel("varlen", run_varlen, "torch.nn.attention.varlen", (8, 9, 10, 12), False),
        # A graph would hold a call for each segment.
        Kernel("segmented", torch.compiler.disable(run_segmented), "torch", (), True),
    )
}
"""By name, in the order in which `auto` prefers them, but for PREFERRED."""
PREFERRED = {10: "fa4"}
"""Major compute capability -> the kernel that `auto` tries first: on Blackwell fa2 runs code for Ampere."""

for kernel in KERNELS.values():
    AttentionInterface.register(kernel.implementation, partial(segment_attention, kernel))


def check_kernel(requested: str, device: torch.device) -> None:
    """Raises ModelError if `requested` is a kernel that can run no model here: known before a model is."""
    if requested == "auto":
        return
    problem = KERNELS[requested].unfit_device(device) or import_problem(KERNELS[requested].package)
    if problem is not None:
        raise ModelError(f"--model.attention {requested} cannot be used: {problem}. Set it to auto")


def choose_kernel(requested: str, device: torch.device, dtype: torch.dtype, config: PretrainedConfig) -> Kernel:
    """The kernel named `requested`, or for "auto" the first that can run the model.

    Args:
        config: of the model.

    Raises:
        ModelError: the named one cannot run it.
    """
    config = config.get_text_config()
    able = (name for name in kernel_order(device) if KERNELS[name].obstacle(device, dtype, config) is None)
    if requested == "auto":
        return KERNELS[next(able)]  # looks at no kernel behind it
    if (obstacle := KERNELS[requested].obstacle(device, dtype, config)) is not None:
        raise ModelError(f"--model.attention {requested} cannot be used: {obstacle}. What can: {', '.join(able)}")
    return KERNELS[requested]


def kernel_order(device: torch.device) -> list[str]:
    """Names of the kernels in the order in which `auto` tries them on a device."""
    preferred = PREFERRED.get(torch.cuda.get_device_capability(device)[0]) if device.type == "cuda" else None
    return sorted(KERNELS, key=lambda name: name != preferred)  # which keeps the order of the others


def stock_attention(model: PreTrainedModel) -> str:
    """sdpa, or eager for a model that has no sdpa or whose scores have a soft cap, which sdpa leaves out."""
    has_softcap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    return "sdpa" if model._supports_sdpa and not has_softcap else "eager"


def set_attention(causal_lm: PreTrainedModel, layout: str, requested: str, device: torch.device) -> str:
    """Give a model the attention that a layout runs under; returns the layout, with "auto" resolved.

    Args:
        requested: name of a kernel or "auto"; the padded layout runs under the model's stock attention.

    Raises:
        ModelError: the model cannot run in the layout, or not under the kernel.
    """
    if causal_lm._supports_attention_backend and layout != "padded":
        kernel = choose_kernel(requested, device, causal_lm.dtype, causal_lm.config)
        causal_lm.set_attn_implementation(kernel.implementation)
        return "shared_prefix" if layout == "auto" else layout
    if layout not in ("auto", "padded"):
        raise ModelError(
            f"{type(causal_lm).__name__} does not take its attention from transformers' AttentionInterface, which "
            f"--batch.layout {layout} needs; set it to auto or padded"
        )
    # A registered name gets no mask, not even one for padding.
    causal_lm.set_attn_implementation(stock_attention(causal_lm))
    return "padded"
