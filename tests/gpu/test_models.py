"""Tiny models of every family in bfloat16, in every layout under every kernel, against fp32 on padded, separate
sequences under the model's own attention."""

from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from hafrm_ds.data.packing import lay_out
from hafrm_ds.model.attention import KERNELS
from hafrm_ds.model.hybrid import HybridModel, layout_difference, tolerance_of
from hafrm_ds.objective import bradley_terry_loss, dpo_loss
from tests.gpu.environment import DEVICE, available_kernels
from tests.tiny_models import FAMILIES, random_items, tiny_hybrid

pytestmark = pytest.mark.gpu

ITEMS = random_items(seed=3, num_items=6)
GRADIENT_TOLERANCE = 0.1
"""Of the largest gradient entry of the model: bfloat16 in two layers and back."""


@dataclass(frozen=True)
class Results:
    reward: Tensor
    logprob: Tensor
    gradients: dict[str, Tensor]


def model_of(family: str, dtype: torch.dtype) -> HybridModel:
    """Its weights are rounded to bfloat16 in either dtype, so that only the computation differs."""
    return tiny_hybrid(family).bfloat16().to(DEVICE, dtype)


def run(model: HybridModel, layout: str, kernel: str) -> Results:
    """Scores and gradients of the joint loss."""
    model.use_layout(layout, kernel, DEVICE)
    model.zero_grad()
    scores = model(lay_out(ITEMS, layout).to(DEVICE))
    reference = torch.full_like(scores.logprob, -20.0)
    (bradley_terry_loss(scores.reward) + dpo_loss(scores.logprob, reference, beta=0.1)).mean().backward()
    gradients = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    return Results(scores.reward.detach(), scores.logprob.detach(), gradients)


@lru_cache(maxsize=1)  # the tests of one family follow each other
def exact(family: str) -> Results:
    return run(model_of(family, torch.float32), "padded", "auto")


def skip_what_cannot_run(kernel: str, model: HybridModel, layout: str) -> None:
    if layout == "padded":
        return
    config = model.causal_lm.config.get_text_config()
    if (reason := KERNELS[kernel].obstacle(DEVICE, torch.bfloat16, config)) is not None:
        pytest.skip(f"{kernel}: {reason}")


def assert_close(actual: Results, expected: Results, tolerance: float, gradient_tolerance: float) -> None:
    """Scores: as the check at the start of a run compares them."""
    num_tokens = lay_out(ITEMS, "padded").num_tokens.to(DEVICE)
    for name, ours, theirs in (
        ("reward", actual.reward, expected.reward),
        ("log-prob a token", actual.logprob / num_tokens, expected.logprob / num_tokens),
    ):
        difference = ((ours - theirs).abs() / (1 + theirs.abs())).max().item()
        assert difference <= tolerance, f"{name}: {difference:.3g}"
    assert actual.gradients.keys() == expected.gradients.keys()
    scale = max(gradient.abs().max().item() for gradient in expected.gradients.values())
    for name, gradient in expected.gradients.items():
        difference = (actual.gradients[name] - gradient).abs().max().item() / scale
        assert difference <= gradient_tolerance, f"gradient of {name}: {difference:.3g}"


RUNS = [*((layout, kernel) for layout in ("shared_prefix", "packed") for kernel in KERNELS), ("padded", "auto")]


@pytest.mark.parametrize(("family", "layout", "kernel"), [(family, *how) for family in FAMILIES for how in RUNS])
def test_bfloat16_equals_fp32_on_padded_sequences(family, layout, kernel):
    model = model_of(family, torch.bfloat16)
    skip_what_cannot_run(kernel, model, layout)
    assert_close(run(model, layout, kernel), exact(family), tolerance_of(model), GRADIENT_TOLERANCE)


@pytest.mark.parametrize("layout", ["shared_prefix", "packed", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_equals_fp32_on_padded_sequences(family, layout):
    model = model_of(family, torch.float32)
    assert_close(run(model, layout, "auto"), exact(family), tolerance_of(model), 1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_gradient_checkpointing_changes_nothing(family, kernel):
    """Beyond the order in which a kernel's backward adds."""
    model = model_of(family, torch.bfloat16)
    skip_what_cannot_run(kernel, model, "shared_prefix")
    expected = run(model, "shared_prefix", kernel)
    model.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    assert_close(run(model, "shared_prefix", kernel), expected, 1e-5, 0.02)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_check_at_the_start_of_a_run_passes(family):
    model = model_of(family, torch.bfloat16)
    model.use_layout("shared_prefix", "auto", DEVICE)

    def forward(batch, **how):
        return model(batch.to(DEVICE), **how)

    assert layout_difference(model, forward, ITEMS, "shared_prefix", with_logprob=True) <= tolerance_of(model)


def test_auto_takes_the_first_kernel_that_runs():
    model = model_of("llama", torch.bfloat16)
    model.use_layout("auto", "auto", DEVICE)
    first = KERNELS[available_kernels()[0]]
    assert (model.layout, model.causal_lm.config._attn_implementation) == ("shared_prefix", first.implementation)
