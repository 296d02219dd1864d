"""Kernels against naive attention in fp64, how they are chosen, and what is refused. Whole models: test_hybrid."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from transformers import Gemma2Config, Llama4TextConfig, LlamaConfig, MistralConfig, PhimoeConfig, Qwen2MoeConfig

from hafrm_ds.data.packing import lay_out
from hafrm_ds.data.tokenization import PromptWithResponses
from hafrm_ds.errors import ModelError
from hafrm_ds.model import attention
from hafrm_ds.model.attention import (
    KERNELS,
    ScoreRule,
    UnsupportedAttention,
    choose_kernel,
    import_problem,
    kernel_order,
    masked_type,
    segment_attention,
    set_attention,
)
from tests.tiny_models import tiny_causal_lm, tiny_hybrid, use_layout

SEGMENTS = lay_out([PromptWithResponses([5, 6], ([7], [8, 9]))], "shared_prefix").segments


def layer_of(config, index: int = 0) -> torch.nn.Module:
    """What segment attention reads of an attention layer."""
    layer = torch.nn.Identity()
    layer.config, layer.layer_idx = config, index
    return layer


def attend(mask: torch.Tensor | None = None, kernel: str = "segmented", config=None, **arguments):
    states = torch.randn(1, 2, 5, 8)
    module = layer_of(config or LlamaConfig())
    return segment_attention(KERNELS[kernel], module, states, states, states, mask, segments=SEGMENTS, **arguments)


@pytest.mark.parametrize("name", ["s_aux", "position_bias"])
def test_a_tensor_that_would_change_the_scores_is_refused(name):
    """Attention sinks (gpt-oss), ALiBi: ignoring them would give other scores than the model's own."""
    with pytest.raises(ModelError, match=rf"Identity gives {name} to its attention.*--batch.layout padded"):
        attend(**{name: torch.zeros(2)})


def test_a_mask_is_refused():
    """A model that builds one would hide what the segments show."""
    with pytest.raises(UnsupportedAttention, match=r"Identity makes an attention mask of its own.*layout padded"):
        attend(mask=torch.ones(5, 5))


SLIDING_MOE = {"use_sliding_window": True, "sliding_window": 4, "num_hidden_layers": 2, "max_window_layers": 2}
CHUNKED = {"attention_chunk_size": 4, "num_hidden_layers": 4}  # every fourth layer sees all


@pytest.mark.parametrize(
    ("config", "layer", "length", "expected"),
    [
        (LlamaConfig(), 0, 9, None),
        (Qwen2MoeConfig(**SLIDING_MOE), 0, 9, "sliding_attention"),
        (Qwen2MoeConfig(**SLIDING_MOE), 1, 9, None),  # in turns
        (Qwen2MoeConfig(**{**SLIDING_MOE, "use_sliding_window": False}), 0, 9, None),
        (Qwen2MoeConfig(**{**SLIDING_MOE, "max_position_embeddings": 5}), 0, 3, "sliding_attention"),
        (Qwen2MoeConfig(**{**SLIDING_MOE, "max_position_embeddings": 4}), 0, 4, None),  # it holds all positions
        (Qwen2MoeConfig(**{**SLIDING_MOE, "max_position_embeddings": 4}), 0, 5, "sliding_attention"),
        (PhimoeConfig(sliding_window=4), 0, 9, "sliding_attention"),  # has no layer types
        (PhimoeConfig(sliding_window=None), 0, 9, None),
        (LlamaConfig(sliding_window=4, use_sliding_window=False), 0, 9, None),
        (LlamaConfig(attention_chunk_size=4), 0, 9, "chunked_attention"),
        (Llama4TextConfig(**CHUNKED), 0, 9, "chunked_attention"),
        (Llama4TextConfig(**CHUNKED), 3, 9, None),
        (LlamaConfig(layer_types=["indexed_attention"], num_hidden_layers=1), 0, 9, "indexed_attention"),
    ],
)
def test_what_a_mask_would_hide_is_read_from_the_configuration(config, layer, length, expected):
    assert masked_type(layer_of(config, layer), length) == expected


def test_a_window_is_passed_on_or_refused():
    """Mistral's layers pass it, Qwen2-MoE's have it in their mask alone, which segments do without. However short the
    sequences: longer ones may follow."""
    windowed = MistralConfig(sliding_window=100)
    attend(config=windowed, sliding_window=100)
    with pytest.raises(UnsupportedAttention, match=r"is sliding_attention by its attention mask alone.*layout padded"):
        attend(config=windowed)


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


class OnCuda(torch.Tensor):
    """On the CPU, and says otherwise."""

    is_cuda = True


@pytest.mark.parametrize(
    ("tensor_type", "dtype", "num_queries", "window", "is_repeated"),
    [
        (torch.Tensor, torch.float32, 3, None, False),
        (torch.Tensor, torch.float32, 6, 4, False),
        (OnCuda, torch.bfloat16, 6, None, False),
        (OnCuda, torch.bfloat16, 6, 4, True),
        (OnCuda, torch.bfloat16, 3, None, True),  # the bottom rows
        (OnCuda, torch.float32, 6, None, True),
    ],
)
def test_torch_gets_no_grouped_heads_where_its_fused_kernels_take_none(
    monkeypatch, tensor_type, dtype, num_queries, window, is_repeated
):
    told, original = [], F.scaled_dot_product_attention

    def record(query, key, value, **options):
        told.append((key.shape[1], value.shape[1], options["enable_gqa"]))
        return original(query, key, value, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    query, key, value = (
        torch.randn(1, heads, length, 8, dtype=dtype).as_subclass(tensor_type)
        for heads, length in ((4, num_queries), (2, 6), (2, 6))
    )
    output = attention.segment_sdpa(query, key, value, ScoreRule(scale=None, window=window, softcap=None))
    assert told == [(4, 4, False) if is_repeated else (2, 2, True)]
    flat = [tensor.as_subclass(torch.Tensor)[0].transpose(0, 1).double() for tensor in (query, key, value)]
    expected = naive_attention(*flat, [0, num_queries], [0, 6], scale=None, window=window, softcap=None)
    actual = output.as_subclass(torch.Tensor)[0].transpose(0, 1).double()
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-2 if dtype == torch.bfloat16 else 1e-5)


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
        deterministic=False,
    ):
        assert deterministic == torch.are_deterministic_algorithms_enabled()
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
    expected = naive(inputs, segments, rule)
    torch.testing.assert_close(KERNELS[kernel].run(*inputs, segments, rule), expected)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    torch.testing.assert_close(KERNELS[kernel].run(*inputs, segments, rule), expected)


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
def imported(monkeypatch):
    """Packages that were looked for, of which FlashAttention 3 is not installed."""
    names = []

    def look_for(package: str) -> str | None:
        names.append(package)
        return f"the package {package} is not installed" if package == "flash_attn_interface" else None

    monkeypatch.setattr(attention, "import_problem", look_for)
    return names


@pytest.fixture
def hopper(monkeypatch, imported):
    """An H100 with the packages of FlashAttention 2 and 4."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return torch.device("cuda", 0)


LLAMA = LlamaConfig(hidden_size=512, num_attention_heads=8)


def test_auto_takes_the_first_that_can(hopper):
    assert choose_kernel("auto", hopper, torch.bfloat16, LLAMA).name == "fa2"
    assert choose_kernel("fa4", hopper, torch.bfloat16, LLAMA).name == "fa4"
    assert choose_kernel("auto", hopper, torch.float32, LLAMA).name == "segmented"
    assert choose_kernel("auto", torch.device("cpu"), torch.bfloat16, LLAMA).name == "segmented"


@pytest.mark.parametrize(("capability", "first"), [(8, "fa3"), (9, "fa3"), (10, "fa4"), (12, "fa3")])
def test_on_blackwell_auto_tries_the_kernel_that_is_written_for_it_first(monkeypatch, capability, first):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    order = kernel_order(torch.device("cuda", 0))
    assert order[0] == first
    assert [name for name in order if name != "fa4"] == [name for name in KERNELS if name != "fa4"]


@pytest.mark.parametrize(("capability", "size", "refused"), [(9, 256, False), (10, 256, True), (10, 128, False)])
def test_flash_attention_4_takes_large_heads_on_hopper(monkeypatch, imported, capability, size, refused):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    obstacle = KERNELS["fa4"].obstacle(torch.device("cuda", 0), torch.bfloat16, LlamaConfig(head_dim=size))
    assert ("heads of up to 128" in (obstacle or "")) is refused


@pytest.mark.parametrize(("size", "is_on", "chosen"), [(256, True, "fa2"), (192, True, "fa3"), (256, False, "fa3")])
def test_a_backward_that_is_not_deterministic_is_passed_over_or_refused(hopper, monkeypatch, size, is_on, chosen):
    monkeypatch.setattr(attention, "import_problem", lambda package: None)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: is_on)
    config = LlamaConfig(head_dim=size)
    assert choose_kernel("auto", hopper, torch.bfloat16, config).name == chosen
    if chosen != "fa3":
        with pytest.raises(ModelError, match=r"fa3 cannot be used: deterministic is true.* heads of 256 .* can: fa2"):
            choose_kernel("fa3", hopper, torch.bfloat16, config)


@pytest.mark.parametrize(
    ("capability", "dtype", "expected"),
    [
        (9, torch.bfloat16, ["flash_attn_interface", "flash_attn_2_cuda"]),
        (8, torch.bfloat16, ["flash_attn_2_cuda"]),  # an A100 has no use for the others
        (9, torch.float32, ["torch"]),
    ],
)
def test_auto_imports_no_package_that_it_does_not_need(monkeypatch, imported, capability, dtype, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    choose_kernel("auto", torch.device("cuda", 0), dtype, LLAMA)
    assert imported == expected


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


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise ImportError('undefined symbol')", "cannot be imported: undefined symbol"),  # built for another torch
        ("raise RuntimeError('no CUDA')", "cannot be imported: no CUDA"),
        ("raise OSError", "cannot be imported: OSError"),
        ("import no_such", "cannot be imported: it needs no_such, which is not installed"),
    ],
)
def test_a_package_that_cannot_be_imported_is_named_with_the_reason(tmp_path, monkeypatch, code, reason):
    (tmp_path / "broken_kernel.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    assert import_problem("broken_kernel") == f"the package broken_kernel {reason}"


def test_a_package_that_is_not_installed_is_named():
    assert import_problem("no_such.kernel") == "the package no_such is not installed"
    assert import_problem("torch.no_such") == "the package torch.no_such is not installed"
    assert import_problem("torch") is None


def test_kernels_of_nvidia_gpus_are_refused_on_one_of_amd(hopper, monkeypatch):
    """An MI300 calls itself cuda and says 9.4, as if it were a Hopper."""
    monkeypatch.setattr(torch.version, "hip", "6.4.1")
    assert choose_kernel("auto", hopper, torch.bfloat16, LLAMA).name == "segmented"
    with pytest.raises(ModelError, match=r"fa2 cannot be used: it needs an NVIDIA GPU, not one of AMD. What can: segm"):
        choose_kernel("fa2", hopper, torch.bfloat16, LLAMA)


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
