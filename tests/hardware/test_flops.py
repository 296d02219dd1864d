"""What a training step is said to cost."""

import pytest

from hafrm_ds.config import LoraOptions, ModelConfig
from hafrm_ds.data.packing import lay_out
from hafrm_ds.hardware.flops import ForwardCost
from hafrm_ds.model.lora import add_adapters
from tests.tiny_models import random_items, tiny_hybrid


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
@pytest.mark.parametrize("with_logprob", [True, False])
def test_a_step_costs_three_forward_passes_and_without_gradients_of_the_weights_two(family, with_logprob):
    model, batch = tiny_hybrid(family).causal_lm, lay_out(random_items(0), "shared_prefix")
    full = ForwardCost.of(model)
    forward = sum(full.parts(batch, with_logprob))
    assert full.training_flops(batch, with_logprob) == pytest.approx(3 * forward)

    model.requires_grad_(False)
    frozen = ForwardCost.of(model)
    body, head, attention = frozen.parts(batch, with_logprob)
    assert frozen.training_flops(batch, with_logprob) == pytest.approx(2 * forward + attention)
    assert bool(head) == with_logprob

    add_adapters(model, ModelConfig(name_or_path="m", lora=LoraOptions(rank=1)), seed=0)
    lora = ForwardCost.of(model)
    adapters = lora.per_token - frozen.per_token
    assert 0 < adapters < 0.1 * frozen.per_token
    extra = lora.training_flops(batch, with_logprob) - frozen.training_flops(batch, with_logprob)
    assert extra == pytest.approx(3 * body * adapters / frozen.per_token)
