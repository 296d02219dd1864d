"""Mixtures of experts: layouts, the load of the experts and the loss of their routers."""

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from hafrm_ds.config import LoraOptions, ModelConfig
from hafrm_ds.data.packing import lay_out
from hafrm_ds.errors import ModelError
from hafrm_ds.model.attention import UnsupportedAttention
from hafrm_ds.model.experts import expert_layers, gives_router_logits, router_loss_coefficient
from hafrm_ds.model.hybrid import HybridModel
from hafrm_ds.model.lora import add_adapters
from hafrm_ds.model.recomputation import set_gradient_checkpointing
from hafrm_ds.objective import ResponseScores
from tests.tiny_models import EXPERTS, random_items, tiny_hybrid, use_layout

ITEMS = [*random_items(0), *random_items(1, num_items=1, num_responses=3)]
PACKABLE = [family for family in EXPERTS if family != "gpt-oss"]
LAYOUTS = ("shared_prefix", "packed", "padded")


def scores(model: HybridModel, layout: str, items=ITEMS) -> ResponseScores:
    use_layout(model, layout)
    return model(lay_out(items, layout), with_router=True)


@pytest.mark.parametrize("layout", ["shared_prefix", "packed"])
@pytest.mark.parametrize("family", PACKABLE)
def test_layouts_give_the_scores_and_the_router_s_loss_and_load_of_padded_rows(family, layout):
    model = tiny_hybrid(family)
    actual, expected = scores(model, layout), scores(model, "padded")
    for name in ("reward", "logprob"):
        torch.testing.assert_close(actual.of(name), expected.of(name), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(actual.router.loss, expected.router.loss, rtol=1e-5, atol=0)
    assert torch.equal(actual.router.load, expected.router.load)


def test_attention_sinks_keep_a_model_padded():
    model = tiny_hybrid("gpt-oss")
    with pytest.raises(UnsupportedAttention, match=r"gives s_aux to its attention.*set --batch.layout padded"):
        scores(model, "shared_prefix")
    assert scores(model, "padded").router.loss.isfinite().all()


@pytest.mark.parametrize("family", EXPERTS)
def test_the_loss_of_a_group_is_transformers_over_its_tokens_with_the_prompt_once(family):
    """A router sees a prompt's tokens alike in all of its copies: those of one stand for all."""
    model = tiny_hybrid(family)
    use_layout(model, "padded")
    actual = model(lay_out(ITEMS, "padded"), with_router=True).router
    config = model.causal_lm.config
    for number, (prompt, answers) in enumerate(ITEMS):
        rows = [torch.tensor([[*prompt, *answer]]) for answer in answers]
        of_rows = [model.causal_lm.get_decoder()(row, output_router_logits=True).router_logits for row in rows]
        logits = tuple(
            torch.cat([first, *(other[len(prompt) :] for other in others)]) for first, *others in zip(*of_rows)
        )
        expected = load_balancing_loss_func(logits, config.num_local_experts, config.num_experts_per_tok)
        torch.testing.assert_close(actual.loss[number], expected, rtol=1e-5, atol=0)
        tokens = len(prompt) + sum(map(len, answers))
        assert actual.load[number].sum(1).tolist() == [tokens * config.num_experts_per_tok] * config.num_hidden_layers


@pytest.mark.parametrize("is_recomputed", [False, True])
def test_the_loss_trains_the_routers(is_recomputed):
    gradients = []
    for checkpointing in {False, is_recomputed}:
        model = tiny_hybrid("olmoe")
        set_gradient_checkpointing(model.causal_lm, checkpointing)
        scores(model, "shared_prefix").router.loss.sum().backward()
        gradients.append([layer.gate.weight.grad for layer in expert_layers(model.causal_lm)])
    assert len(gradients[0]) == 2 and all(each.abs().max() > 0 for each in gradients[0])
    torch.testing.assert_close(gradients[0], gradients[-1])


@pytest.mark.parametrize("family", [*EXPERTS, "qwen2-moe"])
def test_layers_with_experts_are_found(family):
    model = tiny_hybrid(family).causal_lm
    assert [id(layer) for layer in expert_layers(model)] == [id(layer.mlp) for layer in model.model.layers]
    assert gives_router_logits(model)
    assert router_loss_coefficient(model, None) == 0
    assert router_loss_coefficient(model, "own") == model.config.router_aux_loss_coef > 0


def test_a_router_s_loss_that_a_model_cannot_give_is_refused():
    assert not expert_layers(tiny_hybrid("llama").causal_lm)
    with pytest.raises(ModelError, match=r"model.router_aux_loss is own, but LlamaForCausalLM has no experts"):
        router_loss_coefficient(tiny_hybrid("llama").causal_lm, "own")
    with pytest.raises(ModelError, match=r"router_aux_loss_coef is 0.0 in its configuration"):
        router_loss_coefficient(tiny_hybrid("olmoe", router_aux_loss_coef=0.0).causal_lm, "own")


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            "all-linear",
            r"all-linear, but the experts of OlmoeForCausalLM .* cannot have adapters: .* k_proj, o_proj",
        ),
        (["gate_up_proj"], r"'gate_up_proj' names weights of the experts of OlmoeForCausalLM, which cannot have"),
        (["q_proj", "down_proj"], r"'down_proj' names weights of the experts"),
    ],
)
def test_adapters_on_experts_are_refused(targets, message):
    config = ModelConfig(name_or_path="m", lora=LoraOptions(rank=2, targets=targets))
    with pytest.raises(ModelError, match=message):
        add_adapters(tiny_hybrid("olmoe").causal_lm, config, seed=0)


def test_adapters_on_the_attention_of_a_model_with_experts_are_trained():
    model = tiny_hybrid("olmoe")
    add_adapters(model.causal_lm, ModelConfig(name_or_path="m", lora=LoraOptions(rank=2, targets=["q_proj"])), seed=0)
    scores(model, "shared_prefix").reward.sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {name.split(".")[-3] for name in trained - {"reward_head.weight"}} == {"lora_A", "lora_B"}
