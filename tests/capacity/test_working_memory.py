"""What a micro-batch is said to take, against the tensors of a real one."""

import pytest
import torch

from hafrm_ds.capacity.working_memory import (
    META,
    TRACED,
    Pass,
    WorkingMemory,
    peak_of,
    recomputed_bytes,
    working_bytes,
)
from hafrm_ds.data.packing import lay_out
from hafrm_ds.model.hybrid import HybridModel, make_reward_head
from hafrm_ds.model.recomputation import set_gradient_checkpointing
from tests.tiny_models import random_items, tiny_hybrid, use_layout

# Long answers, so that activations outweigh what a small vocabulary takes.
ITEMS = random_items(0, num_items=3, prompt_lengths=(30, 60), response_lengths=(20, 50))


def on_meta(model: HybridModel) -> HybridModel:
    return model.to(META)


@pytest.mark.parametrize("layout", ["shared_prefix", "packed"])
@pytest.mark.parametrize("family", ["llama-tied", "phi"])
@pytest.mark.parametrize("kind", [False, "selective", "every_2", True])
def test_shapes_alone_give_the_peak_of_real_tensors(kind, family, layout):
    how = Pass(layout, "cpu", with_reward=True, with_logprob=True)
    model, batch = tiny_hybrid(family, num_hidden_layers=4), lay_out(ITEMS, layout)
    use_layout(model, layout)
    set_gradient_checkpointing(model.causal_lm, kind)
    real = peak_of(model, batch, how)
    traced = on_meta(model)
    traced.causal_lm.set_attn_implementation(TRACED["cpu"].implementation)
    # Real attention holds a mask besides for an answer that continues another segment's prompt.
    assert peak_of(traced, batch.to(META), how) == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("family", ["gemma2", "gpt-neox", "opt", "phi", "qwen3-tied"])
def test_families_can_be_traced(family):
    how = Pass("shared_prefix", "cuda", with_reward=True, with_logprob=True)
    assert working_bytes(on_meta(tiny_hybrid(family)), ITEMS, how) > 0


def llama_of(layers: int, vocabulary: int = 500) -> HybridModel:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4
    )
    with torch.device(META):
        causal_lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return HybridModel(
        causal_lm.train(), make_reward_head(64, bias=False, init="zero", dtype=torch.bfloat16, seed=0).to(META)
    )


@pytest.mark.parametrize("kind", [False, "selective", "every_3", True])
def test_two_depths_give_the_peak_of_any(kind):
    how = Pass("shared_prefix", "cuda", with_reward=True, with_logprob=True, recomputation=kind)
    model = llama_of(layers=13)
    extrapolated = working_bytes(model, ITEMS, how)
    set_gradient_checkpointing(model.causal_lm, kind)
    whole = peak_of(model, lay_out(ITEMS, "shared_prefix").to(META), how)
    assert extrapolated == pytest.approx(whole, rel=1e-3)
    assert len(model.causal_lm.model.layers) == 13


def bytes_of_a_layer(kind: bool | str, measure) -> float:
    """For each token, of a Llama in bfloat16 with hidden states of 64 and an MLP of 128."""
    how = Pass("packed", "cuda", with_reward=True, with_logprob=False, recomputation=kind)
    found = [measure(llama_of(layers), ITEMS, how) for layers in (8, 16)]
    return (found[1] - found[0]) / 8


def test_what_a_layer_keeps_for_each_token():
    tokens = lay_out(ITEMS, "packed").num_positions
    kept = {kind: bytes_of_a_layer(kind, working_bytes) / tokens for kind in (False, "every_2", "selective", True)}
    # The input, 128 bytes. Selective also query, key, value and output of attention with a number for each of 4 heads,
    # what is projected back, gate, up and down.
    assert kept[True] == pytest.approx(2 * 64, rel=0.05)
    assert kept["selective"] == pytest.approx(2 * (64 + 4 * 64 + 64 + 2 * 128 + 64) + 4 * 4, rel=0.05)
    assert kept["every_2"] == pytest.approx((kept[False] + kept[True]) / 2, rel=0.02)
    assert kept[False] > 1.8 * kept["selective"]


def test_what_selective_recomputation_reads_and_writes():
    """Two norms, rotary embeddings, the MLP's activation and product, two sums: several times what a layer keeps, and
    of no product."""
    moved = bytes_of_a_layer("selective", recomputed_bytes)
    states, inner = 2 * 64, 2 * 128
    # An addition: two in, one out. SiLU one and one, the product two and one. A norm in transformers: to fp32 and back,
    # its square, mean and root, two products.
    least = 2 * 3 * states + 5 * inner + 2 * 12 * states
    assert least < moved < 4 * least


def test_a_line_gives_the_bytes_of_any_micro_batch_and_the_largest_that_fits():
    how = Pass("shared_prefix", "cuda", with_reward=True, with_logprob=True)
    model = llama_of(layers=6, vocabulary=50_000)
    line = WorkingMemory.of(model, ITEMS, how)
    # More answers than fill a chunk of logits, whose size then stays.
    items = ITEMS * 100
    tokens = lay_out(items, "shared_prefix").num_positions
    assert line.fixed + line.per_token * tokens == pytest.approx(working_bytes(model, items, how), rel=0.03)
    assert line.largest_budget(line.fixed + 1000.5 * line.per_token) == 1000
    assert line.largest_budget(0.0) <= 0
