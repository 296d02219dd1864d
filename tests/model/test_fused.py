"""What is found in the layers of every family, and that nothing changes but who computes it."""

import pytest
import torch
from torch import nn

from hafrm_ds.data.packing import lay_out
from hafrm_ds.errors import ModelError
from hafrm_ds.model import fused
from hafrm_ds.model.fused import fuse, gated, rms_norm
from hafrm_ds.model.hybrid import HybridModel, fused_difference
from hafrm_ds.model.recomputation import set_gradient_checkpointing
from tests.tiny_models import EXPERTS, FAMILIES, MASKED_WINDOW, pair_losses, random_items, tiny_hybrid, use_layout

CPU = torch.device("cpu")
ITEMS = random_items(seed=3)
LLAMA = {"RMSNorm", "rotary embedding", "gated MLP"}
FOUND = {
    **dict.fromkeys(FAMILIES, LLAMA),
    **{family: {"rotary embedding"} for family in ("phi", "gpt-neox", "gpt-neox-tied")},
    "cohere": LLAMA - {"RMSNorm"} | {"LayerNorm"},
    "opt": set(),
    "qwen2-moe": LLAMA,
    **{family: {"RMSNorm", "rotary embedding"} for family in EXPERTS},
}


class SameFunctions:
    """The functions that torch.compile would get, as they are; counts their calls."""

    name = "same"

    def __init__(self):
        self.calls = 0

    def counted(self, function):
        def call(*arguments):
            self.calls += 1
            return function(*arguments)

        return call

    def rms_norm(self, *arguments):
        return self.counted(rms_norm)(*arguments)

    def rotation(self, stock):
        return self.counted(stock)

    def gate(self, activation: nn.Module):
        return self.counted(lambda gate, up: gated(activation, gate, up))


def run(model: HybridModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and gradients."""
    model.zero_grad()
    scores = model(lay_out(ITEMS, model.layout))
    reference = torch.full_like(scores.logprob, -20.0)
    pair_losses(scores.reward, scores.logprob, reference).sum().backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat([scores.reward, scores.logprob]).detach(), torch.cat(gradients)


def model_of(family: str) -> HybridModel:
    model = tiny_hybrid(family)
    use_layout(model, "auto" if family in FAMILIES else "padded")
    return model


@pytest.mark.parametrize("family", [*FAMILIES, *MASKED_WINDOW, *EXPERTS])
def test_every_family_computes_the_same(family):
    model, functions = model_of(family), SameFunctions()
    scores, gradients = run(model)
    model.fused = fuse(model.causal_lm, functions)
    assert model.fused.names == FOUND[family]
    fused_scores, fused_gradients = run(model)
    assert (functions.calls > 0) == bool(FOUND[family] - {"LayerNorm"})
    torch.testing.assert_close(fused_scores, scores, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fused_gradients, gradients, rtol=1e-4, atol=1e-5 * gradients.abs().max().item())


def test_what_is_not_known_is_named():
    others = {family: fuse(model_of(family).causal_lm, SameFunctions()).others for family in ("llama", "mixtral")}
    assert others == {"llama": set(), "mixtral": {"MixtralExperts"}}


def test_models_of_one_process_may_differ_and_functions_can_be_taken_away():
    one, other = model_of("llama"), model_of("llama")
    functions = SameFunctions()
    one.fused = fuse(one.causal_lm, functions)
    run(other)
    assert functions.calls == 0
    run(one)
    # Of two layers: two norms, a rotation and a gate each; the last norm.
    assert functions.calls == 2 * 4 + 1
    with one.fused.taken_away():
        run(one)
    assert functions.calls == 2 * 4 + 1
    set_gradient_checkpointing(one.causal_lm, True)
    run(one)
    assert functions.calls == 2 * 4 + 1 + 2 * (2 * 4) + 1  # layers run again in backward


def test_the_check_at_the_start_of_a_run_finds_what_is_wrong():
    model, functions = model_of("llama"), SameFunctions()
    functions.rotation = lambda stock: lambda query, key, cos, sin: (query, key)
    assert fused_difference(model, model, ITEMS, with_logprob=True) == 0
    model.fused = fuse(model.causal_lm, functions)
    assert fused_difference(model, model, ITEMS, with_logprob=True) > 0.01


def test_without_a_gpu_nothing_is_fused_unless_asked_for(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = model_of("llama")
    model.use_fused("auto", CPU)
    assert model.fused is None
    with pytest.raises(ModelError, match=r"model.fused liger cannot be used: .*Set --model.fused off"):
        model.use_fused("liger", CPU)


def test_what_cannot_be_fused_is_refused_by_name():
    with pytest.raises(ModelError, match="OPTForCausalLM has no RMSNorm"):
        model_of("opt").use_fused("compile", CPU)
    with pytest.raises(ModelError, match="MixtralForCausalLM is a mixture of experts"):
        model_of("mixtral").use_fused("compile_layers", CPU)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["compile", "compile_layers"])
@pytest.mark.parametrize("family", ["gemma2", "qwen3-tied"])
def test_compiled_functions_and_layers_compute_the_same(monkeypatch, family, kind):
    """By what torch.compile traces, forward and backward; that it makes C++ of it here is torch's affair."""
    usual = fused.for_any_length()
    monkeypatch.setattr(fused, "for_any_length", lambda: usual | {"backend": "aot_eager"})
    torch._dynamo.reset()
    model = model_of(family)
    expected = run(model)
    model.use_fused(kind, CPU)
    for found, own in zip(run(model), expected):
        torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-5 * max(1.0, own.abs().max().item()))
    assert fused_difference(model, model, ITEMS, with_logprob=True) < 1e-4
    set_gradient_checkpointing(model.causal_lm, True)
    for found, own in zip(run(model), expected):
        torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-5 * max(1.0, own.abs().max().item()))
