"""Every kernel against attention formed in fp64 from one mask over all tokens: values and gradients.

A kernel may be off by little more than eager attention in its own dtype is: 2 times in the output and 3 times in a
gradient, which are FlashAttention's own bounds. A wrong mask is off by orders of magnitude more.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig

from hafrm_ds.data.packing import AttentionSegments, lay_out
from hafrm_ds.data.tokenization import PromptWithResponses
from hafrm_ds.model.attention import KERNELS, ScoreRule, segment_attention
from tests.gpu.environment import DEVICE, IS_GPU, obstacle

pytestmark = pytest.mark.gpu

OUTPUT_FACTOR, GRADIENT_FACTOR = 2, 3
LONG = 400 if IS_GPU else 24
"""Tokens of a long prompt: more than one tile of every kernel, and no multiple of a tile."""
HEAD_DIMS = (64, 128, 256) if IS_GPU else (64,)
DTYPES = {"bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Heads:
    query: int
    groups: int
    dim: int


def items(*shapes: tuple[int, tuple[int, ...]]) -> list[PromptWithResponses]:
    """(tokens of the prompt, tokens of each response); which tokens they are never matters here."""
    return [PromptWithResponses([0] * prompt, tuple([0] * length for length in lengths)) for prompt, lengths in shapes]


PAIRS = items((LONG + 7, (33, LONG // 2)), (5, (1, LONG)), (LONG // 3, (LONG // 4 + 1, 2)))
CASES = {
    "pairs": (PAIRS, "shared_prefix"),
    "pairs, packed": (PAIRS, "packed"),
    "single tokens": (items((1, (1, 1)), (1, (1, 2)), (2, (1, 1))), "shared_prefix"),
    "one token after a long prompt": (items((2 * LONG + 1, (1, 1))), "shared_prefix"),
    "eight answers": (items((LONG // 2, (1, 3, 17, 64, 65, LONG // 4, 2, 31))), "shared_prefix"),
}
RULES = {
    "plain": ScoreRule(scale=None, window=None, softcap=None),
    "scale": ScoreRule(scale=0.3, window=None, softcap=None),
    "window": ScoreRule(scale=None, window=LONG // 6, softcap=None),
    "window of one": ScoreRule(scale=None, window=1, softcap=None),
    "softcap": ScoreRule(scale=None, window=None, softcap=2.0),
    "softcap and window": ScoreRule(scale=0.2, window=LONG // 5, softcap=5.0),
}


def visible_tokens(segments: AttentionSegments, window: int | None) -> Tensor:
    """[T, T] bool: which tokens a token sees. Bottom right: a segment's last query sees its last key."""
    q_ends, k_ends = segments.cu_seqlens_q.tolist(), segments.cu_seqlens_k.tolist()
    tokens = torch.arange(k_ends[-1]) if segments.key_index is None else segments.key_index
    visible = torch.zeros(q_ends[-1], q_ends[-1], dtype=torch.bool)
    for number, (q, k) in enumerate(zip(segments.q_lengths, segments.k_lengths, strict=True)):
        own = torch.ones(q, k, dtype=torch.bool).tril(k - q)
        if window is not None:
            own = own.triu(k - q - window + 1)
        visible[q_ends[number] : q_ends[number + 1], tokens[k_ends[number] : k_ends[number + 1]]] = own
    return visible


def eager_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, rule: ScoreRule) -> Tensor:
    """[1, Q, T, D], two of [1, G, T, D], [T, T] -> [1, T, Q, D], in the dtype that is given, but for the softmax."""
    times = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(times, dim=1), value.repeat_interleave(times, dim=1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if rule.scale is None else rule.scale)
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    scores = scores.masked_fill(~visible.to(scores.device), float("-inf"))
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)
    return (weights @ value).transpose(1, 2)


def random_states(num_tokens: int, heads: Heads, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Query, key, value and the gradient of the output. Scores spread enough that the softmax is not flat."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, count, num_tokens, heads.dim) for count in (heads.query, heads.groups, heads.groups)]
    shapes.append((1, num_tokens, heads.query, heads.dim))
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def with_gradients(attention, states: list[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and gradients of `attention`(query, key, value), fp64."""
    *inputs, upstream = (state.to(dtype) for state in states)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    output = attention(*inputs)
    gradients = torch.autograd.grad(output, inputs, upstream)
    named = zip(("output", "query", "key", "value"), (output, *gradients), strict=True)
    return {name: tensor.detach().double() for name, tensor in named}


def errors(
    kernel: str,
    case: tuple[list[PromptWithResponses], str],
    heads: Heads,
    rule: ScoreRule,
    dtype: torch.dtype,
    mask: Callable[[AttentionSegments, int | None], Tensor] = visible_tokens,
) -> dict[str, tuple[float, float]]:
    """For the output and each gradient: the largest error, and the largest that is allowed."""
    segments = lay_out(*case).segments
    assert segments is not None
    visible = mask(segments, rule.window)
    states = random_states(len(visible), heads, dtype)
    on_device = segments.to(DEVICE)
    layer = nn.Identity()
    layer.config = LlamaConfig()  # a model without windows of its own

    def under_test(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output, _ = segment_attention(
            KERNELS[kernel],
            layer,
            query,
            key,
            value,
            None,
            segments=on_device,
            scaling=rule.scale,
            sliding_window=rule.window,
            softcap=rule.softcap,
        )
        return output

    def eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return eager_attention(query, key, value, visible, rule)

    exact = with_gradients(eager, states, torch.float64)
    yardstick = with_gradients(eager, states, dtype)
    actual = with_gradients(under_test, states, dtype)
    found = {}
    for name, expected in exact.items():
        factor = OUTPUT_FACTOR if name == "output" else GRADIENT_FACTOR
        # Of the largest value; where a token sees one key its gradient is 0, but of terms that are not.
        rounding = torch.finfo(dtype).eps / 2 * max(expected.abs().max().item(), 0.1)
        allowed = factor * (yardstick[name] - expected).abs().max().item() + rounding
        found[name] = (actual[name] - expected).abs().max().item(), allowed
    return found


def assert_within(found: dict[str, tuple[float, float]], context: str) -> None:
    for name, (error, allowed) in found.items():
        assert error <= allowed, f"{context}, {name}: off by {error:.3g}, allowed are {allowed:.3g}"


def skip_what_cannot_run(kernel: str, dtype: torch.dtype, head_dim: int, rule: ScoreRule) -> None:
    if (reason := obstacle(kernel, dtype, head_dim, rule.softcap)) is not None:
        pytest.skip(f"{kernel}: {reason}")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_equals_fp64_attention(kernel, dtype, head_dim, rule):
    skip_what_cannot_run(kernel, DTYPES[dtype], head_dim, RULES[rule])
    for name, case in CASES.items():
        for query_heads, groups in ((4, 4), (4, 2), (4, 1)):
            heads = Heads(query_heads, groups, head_dim)
            assert_within(errors(kernel, case, heads, RULES[rule], DTYPES[dtype]), f"{name}, {heads}")


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=60 if IS_GPU else 15, deadline=None, derandomize=True, database=None)
@given(
    shapes=st.lists(
        st.tuples(st.integers(1, LONG), st.lists(st.integers(1, LONG // 2), min_size=1, max_size=4).map(tuple)),
        min_size=1,
        max_size=4,
    ),
    layout=st.sampled_from(["shared_prefix", "packed"]),
    heads=st.sampled_from([Heads(4, 4, 64), Heads(8, 2, 64), Heads(4, 2, 128)]),
    window=st.none() | st.integers(1, LONG),
    dtype=st.sampled_from(sorted(DTYPES)),
)
def test_kernel_equals_fp64_attention_for_random_shapes(kernel, shapes, layout, heads, window, dtype):
    rule = ScoreRule(scale=None, window=window, softcap=None)
    skip_what_cannot_run(kernel, DTYPES[dtype], heads.dim, rule)
    assert_within(errors(kernel, (items(*shapes), layout), heads, rule, DTYPES[dtype]), kernel)


def top_left(segments: AttentionSegments, window: int | None) -> Tensor:
    """[T, T] bool: `visible_tokens` with the mistake that a kernel is most likely to make."""
    visible = visible_tokens(segments, window)
    rows = torch.arange(len(visible)).split(segments.q_lengths)
    assert segments.key_index is not None
    keys = segments.key_index.split(segments.k_lengths)
    for own_rows, own_keys in zip(rows, keys, strict=True):
        visible[own_rows[:, None], own_keys] = torch.ones(len(own_rows), len(own_keys), dtype=torch.bool).tril()
    return visible


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bounds_tell_bottom_right_from_top_left(dtype):
    found = errors("segmented", CASES["pairs"], Heads(4, 2, 64), RULES["plain"], DTYPES[dtype], mask=top_left)
    assert all(error > 5 * allowed for error, allowed in found.values()), found
