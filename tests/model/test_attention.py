"""Kernels against naive attention in fp64, how they are chosen, and what is refused. Whole models: test_hybrid."""

import sys
import types

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig

from hafrm_ds.data.packing import PromptWithResponses, lay_out
from hafrm_ds.errors import ModelError
from hafrm_ds.model import attention
from hafrm_ds.model.attention import KERNELS, ScoreRule, choose_kernel, import_problem, segment_attention, set_attention
from tests.tiny_models import tiny_causal_lm, tiny_hybrid, use_layout

SEGMENTS = lay_out([PromptWithResponses([5, 6], ([7], [8, 9]))], "shared_prefix").segments


def attend(mask: torch.Tensor | None = None, kernel: str = "segmented", **arguments):
    states = torch.randn(1, 2, 5, 8)
    module = torch.nn.Identity()
    return segment_attention(KERNELS[kernel], module, states, states, states, mask, segments=SEGMENTS, **arguments)


@pytest.mark.parametrize("name", ["s_aux", "position_bias"])
def test_a_tensor_that_would_change_the_scores_is_refused(name):
    """Attention sinks (gpt-oss), ALiBi: ignoring them would give other scores than the model's own."""
    with pytest.raises(ModelError, match=rf"Identity gives {name} to its attention.*--batch.layout padded"):
        attend(**{name: torch.zeros(2)})


def test_a_mask_is_refused():
    """A model that builds one would hide what the segments show."""
    with pytest.raises(ValueError, match="takes no mask"):
        attend(mask=torch.ones(5, 5))


def test_a_forward_without_segments_fails():
    """No segments would mean that every token sees every earlier one."""
    model = tiny_hybrid("llama")
    use_layout(model, "shared_prefix")
    with pytest.raises(TypeError, match="segments"):
        model.causal_lm(torch.arange(3, 9)[None], use_cache=False)


# ---- kernels -------------------------------------------------------------------------------------------------------

RULES = {
    "plain": ScoreRule(scale=None, window=None, softcap=None),
    "scale": ScoreRule(scale=0.3, window=None, softcap=None),
    "window": ScoreRule(scale=None, window=3, softcap=None),
    "softcap": ScoreRule(scale=None, window=None, softcap=2.0),
    "all": ScoreRule(scale=0.3, window=4, softcap=2.0),
}
LAYOUTS = {
    "shared_prefix": [PromptWithResponses([1] * 6, ([2] * 3, [3] * 5, [4])), PromptWithResponses([1], ([2], [3]))],
    "packed": [PromptWithResponses([1] * 6, ([2] * 3, [3] * 5)), PromptWithResponses([1], ([2],))],
}


def naive_attention(query, key, value, cu_q, cu_k, *, scale, window, softcap):
    """[T, Q, D], [K, G, D], [K, G, D] -> [T, Q, D]: causal from the bottom right, one segment after another."""
    groups, outputs = query.shape[1] // key.shape[1], []
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    for s in range(len(cu_q) - 1):
        q, k, v = query[cu_q[s] : cu_q[s + 1]], key[cu_k[s] : cu_k[s + 1]], value[cu_k[s] : cu_k[s + 1]]
        scores = torch.einsum("qhd,khd->hqk", q, k) * (scale if scale is not None else q.shape[-1] ** -0.5)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        ahead = torch.arange(len(k))[None] - torch.arange(len(k) - len(q), len(k))[:, None]  # > 0: in the future
        hidden = (ahead > 0) if window is None else (ahead > 0) | (ahead <= -window)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v))
    return torch.cat(outputs)


def attention_inputs(layout: str, dtype=torch.float64):
    """Segments, and query [T, 4, 8], expanded key and value [K, 2, 8]."""
    segments = lay_out(LAYOUTS[layout], layout).segments
    generator = torch.Generator().manual_seed(0)
    counts = ((sum(segments.q_lengths), 4), (sum(segments.k_lengths), 2), (sum(segments.k_lengths), 2))
    return segments, [torch.randn(*count, 8, generator=generator, dtype=torch.float64).to(dtype) for count in counts]


def naive(inputs, segments, rule: ScoreRule):
    return naive_attention(
        *inputs,
        segments.cu_seqlens_q.tolist(),
        segments.cu_seqlens_k.tolist(),
        scale=rule.scale,
        window=rule.window,
        softcap=rule.softcap,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_segmented_attention_and_its_gradients_equal_a_naive_version_in_fp64(layout, rule):
    segments, exact = attention_inputs(layout)
    exact = [tensor.requires_grad_() for tensor in exact]
    single = [tensor.detach().float().requires_grad_() for tensor in exact]
    upstream = torch.linspace(-1, 2, exact[0].numel(), dtype=torch.float64).view_as(exact[0])
    expected, actual = naive(exact, segments, rule), KERNELS["segmented"].run(*single, segments, rule)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad((actual * upstream.float()).sum(), single)
    for got, wanted in zip(gradients, torch.autograd.grad((expected * upstream).sum(), exact), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)


def test_bfloat16_on_the_cpu_is_computed_in_fp32():
    segments, inputs = attention_inputs("shared_prefix", torch.bfloat16)
    output = KERNELS["segmented"].run(*inputs, segments, RULES["plain"])
    assert output.dtype == torch.bfloat16
    expected = naive([tensor.double() for tensor in inputs], segments, RULES["plain"])
    torch.testing.assert_close(output, expected.bfloat16(), rtol=2**-8, atol=1e-6)  # one rounding, at the end


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize(
    ("kernel", "module"), [("fa2", "flash_attn"), ("fa3", "flash_attn_interface"), ("fa4", "flash_attn.cute")]
)
def test_what_the_flash_packages_are_told(monkeypatch, kernel, module, layout, rule):
    """A stand-in that keeps to their documented arguments: causal from the bottom right, window_size = (left, right)
    counts the keys beside a query's own, -1 is no limit. The packages themselves need a GPU: tests/gpu."""

    def stand_in(
        q,
        k,
        v,
        *,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        causal,
        softcap,
        window_size=(-1, -1),
    ):
        lengths = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        assert causal and (max_seqlen_q, max_seqlen_k) == tuple(map(max, lengths))
        left, right = window_size
        assert (left, right) == (-1, -1) or right == 0
        window = None if left < 0 else left + 1
        out = naive_attention(
            q, k, v, cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), scale=softmax_scale, window=window, softcap=softcap
        )
        return (out, None) if kernel == "fa4" else out

    for name in {module, module.split(".")[0]}:
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(flash_attn_varlen_func=stand_in))
    segments, inputs = attention_inputs(layout)
    torch.testing.assert_close(KERNELS[kernel].run(*inputs, segments, rule), naive(inputs, segments, rule))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["plain", "scale", "window"])
@pytest.mark.parametrize("is_grouped", [True, False], ids=["torch 2.12", "torch 2.11"])
def test_what_varlen_attention_is_told(monkeypatch, layout, name, is_grouped):
    """torch's function takes (-1, 0) for causal; before 2.12 it wants as many key heads as query heads."""
    from torch.nn.attention import varlen

    def attend(query, key, value, cu_q, cu_k, max_q, max_k, scale, window_size):
        left, right = window_size
        assert right == 0
        assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
        window = None if left < 0 else left + 1
        return naive_attention(
            query, key, value, cu_q.tolist(), cu_k.tolist(), scale=scale, window=window, softcap=None
        )

    def newer(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert enable_gqa
        return attend(query, key, value, cu_q, cu_k, max_q, max_k, scale, window_size)

    def older(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size):
        assert query.shape[1] == key.shape[1] == value.shape[1]
        return attend(query, key, value, cu_q, cu_k, max_q, max_k, scale, window_size)

    monkeypatch.setattr(varlen, "varlen_attn", newer if is_grouped else older)
    segments, inputs = attention_inputs(layout)
    torch.testing.assert_close(
        KERNELS["varlen"].run(*inputs, segments, RULES[name]), naive(inputs, segments, RULES[name])
    )


# ---- choosing ------------------------------------------------------------------------------------------------------


@pytest.fixture
def hopper(monkeypatch):
    """An H100 with the packages of FlashAttention 2 and 4."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    problems = {"flash_attn_interface": "the package flash_attn_interface is not installed"}
    monkeypatch.setattr(attention, "import_problem", problems.get)
    return torch.device("cuda", 0)


LLAMA = LlamaConfig(hidden_size=512, num_attention_heads=8)


def test_auto_takes_the_first_that_can(hopper):
    assert choose_kernel("auto", hopper, torch.bfloat16, LLAMA).name == "fa2"
    assert choose_kernel("fa4", hopper, torch.bfloat16, LLAMA).name == "fa4"
    assert choose_kernel("auto", hopper, torch.float32, LLAMA).name == "segmented"
    assert choose_kernel("auto", torch.device("cpu"), torch.bfloat16, LLAMA).name == "segmented"


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        ("fa3", LLAMA, "the package flash_attn_interface is not installed. What can: fa2, fa4, varlen, segmented"),
        ("varlen", Gemma2Config(head_dim=64), "has no soft cap .* What can: fa2, segmented"),
    ],
)
def test_a_kernel_that_cannot_is_refused_with_those_that_can(hopper, name, config, reason):
    with pytest.raises(ModelError, match=f"--model.attention {name} cannot be used: .*{reason}"):
        choose_kernel(name, hopper, torch.bfloat16, config)


def test_a_package_that_cannot_be_imported_is_named_with_the_reason(tmp_path, monkeypatch):
    """As one that was built for another torch."""
    (tmp_path / "broken_kernel.py").write_text("raise ImportError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    assert import_problem("broken_kernel") == "the package broken_kernel cannot be imported: undefined symbol"
    assert import_problem("no_such.kernel") == "the package no_such.kernel is not installed"
    assert import_problem("torch") is None


def test_a_gpu_kernel_is_refused_on_the_cpu():
    with pytest.raises(ModelError, match="varlen cannot be used: it needs an NVIDIA GPU, not cpu"):
        choose_kernel("varlen", torch.device("cpu"), torch.bfloat16, LLAMA)


def test_a_soft_cap_that_no_configuration_announced_is_not_ignored():
    with pytest.raises(ModelError, match="caps its attention scores, which varlen cannot"):
        attend(kernel="varlen", softcap=5.0)


def test_a_model_without_the_attention_interface_runs_padded_or_not_at_all():
    model = tiny_causal_lm("llama")
    model._supports_attention_backend = False
    device = torch.device("cpu")
    assert set_attention(model, "auto", "auto", device) == "padded"
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ModelError, match=r"LlamaForCausalLM does not take its attention .* --batch.layout packed"):
        set_attention(model, "packed", "auto", device)


@pytest.mark.parametrize(
    ("options", "dtype", "capability", "reason"),
    [
        ({"head_dim": 100}, torch.bfloat16, 9, "multiples of 8, not 100"),  # OpenLLaMA 3B
        ({"head_dim": 264}, torch.bfloat16, 9, "up to 256 dimensions"),
        ({"head_dim": 64}, torch.float32, 9, "has no float32"),
        ({"head_dim": 64}, torch.bfloat16, 7, "compute capability 7"),
        ({"head_dim": 64, "attn_logit_softcapping": 50.0}, torch.bfloat16, 9, "no soft cap"),
        ({"head_dim": 128}, torch.bfloat16, 9, None),
    ],
)
def test_what_a_flash_kernel_cannot_run_is_said_and_auto_goes_on_to_another(
    monkeypatch, options, dtype, capability, reason
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    device, config = torch.device("cuda"), LlamaConfig(**options)
    assert KERNELS["segmented"].obstacle(device, dtype, config) is None
    obstacle = KERNELS["varlen"].obstacle(device, dtype, config)
    chosen = choose_kernel("auto", device, dtype, config).name
    if reason is None:
        assert (obstacle, chosen) == (None, "varlen")
    else:
        assert reason in obstacle
        assert chosen == "segmented"
        with pytest.raises(ModelError, match=f"--model.attention varlen cannot be used: .*{reason}"):
            choose_kernel("varlen", device, dtype, config)
