"""Tiny models of every family in bfloat16, in every layout under every kernel, against fp32 on padded, separate
sequences under the model's own attention. bfloat16 on padded sequences is off, too: that is the yardstick.
"""

from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from hafrm_ds.data.packing import lay_out
from hafrm_ds.errors import ModelError
from hafrm_ds.model.attention import KERNELS, import_problem
from hafrm_ds.model.hybrid import HybridModel, layout_difference, tolerance_of
from hafrm_ds.model.recomputation import set_gradient_checkpointing
from tests.gpu.environment import DEVICE, IS_GPU, available_kernels
from tests.tiny_models import FAMILIES, pair_losses, random_items, tiny_hybrid

pytestmark = pytest.mark.gpu

ITEMS = random_items(seed=3, num_items=6)
FACTOR, FLOOR = 3, 0.02
"""A kernel may be off by this many times the yardstick and this much more."""


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
    pair_losses(scores.reward, scores.logprob, reference).mean().backward()
    gradients = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    return Results(scores.reward.detach(), scores.logprob.detach(), gradients)


@lru_cache(maxsize=2)  # the tests of one family follow each other
def on_padded_sequences(family: str, dtype: torch.dtype) -> Results:
    return run(model_of(family, dtype), "padded", "auto")


def skip_what_cannot_run(kernel: str, model: HybridModel) -> None:
    config = model.causal_lm.config.get_text_config()
    if (reason := KERNELS[kernel].obstacle(DEVICE, torch.bfloat16, config)) is not None:
        pytest.skip(f"{kernel}: {reason}")


def distances(actual: Results, expected: Results) -> dict[str, float]:
    """Scores as the check at the start of a run compares them; gradients relative to the model's largest."""
    num_tokens = lay_out(ITEMS, "padded").num_tokens.to(DEVICE)
    assert actual.gradients.keys() == expected.gradients.keys()
    scale = max(gradient.abs().max() for gradient in expected.gradients.values())
    apart = [(actual.gradients[name] - gradient).abs().max() for name, gradient in expected.gradients.items()]
    found = {
        "reward": ((actual.reward - expected.reward).abs() / (1 + expected.reward.abs())).max(),
        "log-prob of a token": ((actual.logprob - expected.logprob).abs() / num_tokens).max(),
        "gradient": max(apart) / scale,
    }
    return {name: value.item() for name, value in found.items()}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("layout", ["shared_prefix", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_near_to_fp32_as_on_padded_sequences(family, layout, kernel):
    model = model_of(family, torch.bfloat16)
    skip_what_cannot_run(kernel, model)
    exact = on_padded_sequences(family, torch.float32)
    yardstick = distances(on_padded_sequences(family, torch.bfloat16), exact)
    for name, distance in distances(run(model, layout, kernel), exact).items():
        allowed = FACTOR * yardstick[name] + FLOOR
        assert distance <= allowed, f"{name}: off by {distance:.3g}, allowed are {allowed:.3g}"


@pytest.mark.parametrize("kind", ["liger", "compile"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_layers_are_as_near_to_fp32_as_their_own(family, kind):
    if not IS_GPU or (kind == "liger" and import_problem("liger_kernel.ops")):
        pytest.skip("needs a GPU, and liger_kernel for its functions")
    model = model_of(family, torch.bfloat16)
    try:
        model.use_fused(kind, DEVICE)
    except ModelError as error:
        pytest.skip(str(error))
    exact = on_padded_sequences(family, torch.float32)
    yardstick = distances(on_padded_sequences(family, torch.bfloat16), exact)
    for name, distance in distances(run(model, "shared_prefix", "auto"), exact).items():
        allowed = FACTOR * yardstick[name] + FLOOR
        assert distance <= allowed, f"{name}: off by {distance:.3g}, allowed are {allowed:.3g}"


@pytest.mark.parametrize("layout", ["shared_prefix", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_equals_padded_sequences(family, layout):
    found = distances(run(model_of(family, torch.float32), layout, "auto"), on_padded_sequences(family, torch.float32))
    assert max(found.values()) <= 1e-4, found


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_gradient_checkpointing_changes_nothing(family, kernel):
    """Beyond the order in which a GPU adds."""
    model = model_of(family, torch.bfloat16)
    skip_what_cannot_run(kernel, model)
    expected = run(model, "shared_prefix", kernel)
    set_gradient_checkpointing(model.causal_lm, True)
    found = distances(run(model, "shared_prefix", kernel), expected)
    assert max(found["reward"], found["log-prob of a token"]) <= 1e-5
    assert found["gradient"] <= 0.02


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
