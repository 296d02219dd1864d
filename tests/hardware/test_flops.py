"""What a training step is said to cost."""

import pytest
import torch
import transformers

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


ATTENTION = {"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False}
# Name -> configuration as published, parameters in all, and those in the products of the body that a token takes.
PUBLISHED = {
    "Qwen3-30B-A3B": (
        transformers.Qwen3MoeConfig(
            **ATTENTION | {"num_key_value_heads": 4}, vocab_size=151_936, hidden_size=2048, intermediate_size=6144,
            moe_intermediate_size=768, num_hidden_layers=48, head_dim=128, num_experts=128, num_experts_per_tok=8,
        ),
        30_532_122_624,
        48 * (2 * 2048 * 4096 + 2 * 2048 * 512 + 128 * 2048 + 8 * 3 * 2048 * 768),
    ),
    "Mixtral-8x7B-v0.1": (
        transformers.MixtralConfig(
            **ATTENTION, vocab_size=32_000, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
            num_local_experts=8, num_experts_per_tok=2,
        ),
        46_702_792_704,
        32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 8 * 4096 + 2 * 3 * 4096 * 14_336),
    ),
    "OLMoE-1B-7B-0924": (
        transformers.OlmoeConfig(
            **ATTENTION | {"num_attention_heads": 16, "num_key_value_heads": 16}, vocab_size=50_304, hidden_size=2048,
            intermediate_size=1024, num_hidden_layers=16, num_experts=64, num_experts_per_tok=8,
        ),
        6_919_161_856,
        16 * (4 * 2048 * 2048 + 64 * 2048 + 8 * 3 * 2048 * 1024),
    ),
    "gpt-oss-20b": (
        transformers.GptOssConfig(
            **ATTENTION | {"num_attention_heads": 64}, vocab_size=201_088, hidden_size=2880, intermediate_size=2880,
            num_hidden_layers=24, head_dim=64, num_local_experts=32, num_experts_per_tok=4,
        ),
        20_914_757_184,
        24 * (2 * 2880 * 4096 + 2 * 2880 * 512 + 32 * 2880 + 4 * 3 * 2880 * 2880),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_token_costs_the_experts_that_it_is_sent_to(name):
    """Counted by hand: query and output, key and value, router, and gate, up and down of each chosen expert."""
    config, parameters, active = PUBLISHED[name]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    cost = ForwardCost.of(model)
    assert cost.per_token == 2 * active
    assert cost.per_response_token == 2 * config.vocab_size * config.hidden_size
    assert cost.trained_share == 1
    for layer in model.model.layers:
        layer.mlp.experts.requires_grad_(False)
    per_expert = 3 * config.hidden_size * getattr(config, "moe_intermediate_size", config.intermediate_size)
    experts = config.num_hidden_layers * config.num_experts_per_tok * per_expert
    assert ForwardCost.of(model).trained_share == pytest.approx(1 - experts / active)
