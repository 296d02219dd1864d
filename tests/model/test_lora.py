"""Adapters: injected into every family, off for the reference, merged in the saved model, exported and loaded."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hafrm_ds import HybridRewardModel, load_judge
from hafrm_ds.config import LoraOptions, ModelConfig
from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.packing import lay_out
from hafrm_ds.errors import ModelError
from hafrm_ds.model import lora
from hafrm_ds.model.hybrid import HybridModel, make_reward_head
from hafrm_ds.model.lora import ADAPTER, adapted_layers, adapters_off, add_adapters, check_packages
from hafrm_ds.saved.adapters import merged_tensors
from hafrm_ds.saved.export import CONVERSATIONS, export_model
from hafrm_ds.saved.writing import save_hybrid_model
from tests.tiny_models import FAMILIES, random_items, save_tiny_final, save_tiny_model, tiny_hybrid, use_layout
from tests.tiny_tokenizers import byte_level_tokenizer

LAYOUTS = {"opt": "padded"}


def options(base: str | Path = "example/base", **changes) -> ModelConfig:
    return ModelConfig(name_or_path=str(base), lora=LoraOptions(**{"rank": 4, "alpha": 8.0} | changes))


def randomize(model: HybridModel) -> None:
    """Adapters as if they had been trained: B is not 0."""
    generator = torch.Generator().manual_seed(0)
    for layer in adapted_layers(model.causal_lm).values():
        weight = layer.lora_B[ADAPTER].weight
        weight.data = (0.2 * torch.randn(weight.shape, generator=generator)).to(weight.dtype)


def scores(model: HybridModel, layout: str) -> torch.Tensor:
    with torch.no_grad():
        result = model(lay_out(random_items(0), layout))
    return torch.cat([result.reward, result.logprob])


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_change_nothing_until_trained_and_merge_into_the_scores_of_the_live_model(family):
    model, layout = tiny_hybrid(family), LAYOUTS.get(family, "shared_prefix")
    use_layout(model, layout)
    names = [name for name, _ in model.causal_lm.named_parameters()]
    base = scores(model, layout)
    add_adapters(model.causal_lm, options(), seed=0)
    assert torch.equal(scores(model, layout), base)
    randomize(model)
    live = scores(model, layout)
    assert (live - base).abs().max() > 0.01
    with adapters_off(model.causal_lm):
        assert torch.equal(scores(model, layout), base)
    assert torch.equal(scores(model, layout), live)

    tensors = merged_tensors(model.causal_lm, lambda parameters: nullcontext())
    assert list(tensors) == names
    plain = tiny_hybrid(family, seed=1)
    use_layout(plain, layout)
    plain.reward_head = model.reward_head
    with torch.no_grad():
        for name, parameter in plain.causal_lm.named_parameters():
            with tensors[name].open() as tensor:
                parameter.copy_(tensor)
    torch.testing.assert_close(scores(plain, layout), live, rtol=1e-5, atol=1e-5)


def test_only_adapters_and_the_reward_head_are_trained_in_the_dtype_of_the_body():
    model = tiny_hybrid("qwen2").to(torch.bfloat16)
    add_adapters(model.causal_lm, options(targets=["q_proj", "mlp.up_proj"]), seed=0)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(".lora_" in name or name.startswith("reward_head") for name in trained)
    assert {name.split(".lora_")[0].split(".")[-1] for name in trained} == {"q_proj", "up_proj", "weight"}
    assert len(trained) == 1 + 2 * 2 * 2
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_adapters_depend_on_the_seed_alone_and_draw_no_random_numbers():
    def adapter(seed: int, state: int) -> torch.Tensor:
        model = tiny_hybrid("llama")
        torch.manual_seed(state)
        before = torch.get_rng_state()
        add_adapters(model.causal_lm, options(), seed)
        assert torch.equal(torch.get_rng_state(), before)
        return next(iter(adapted_layers(model.causal_lm).values())).lora_A[ADAPTER].weight

    assert torch.equal(adapter(0, 1), adapter(0, 2))
    assert not torch.equal(adapter(0, 1), adapter(1, 1))


def test_dropout_is_for_training_steps_alone():
    model = tiny_hybrid("llama")
    use_layout(model, "shared_prefix")
    add_adapters(model.causal_lm, options(dropout=0.5), seed=0)
    randomize(model)
    batch = lay_out(random_items(0), "shared_prefix")
    assert torch.equal(scores(model, "shared_prefix"), scores(model, "shared_prefix"))
    assert model.training
    assert not torch.equal(model(batch).reward, model(batch).reward)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "attention"], r"'attention' names no layer of LlamaForCausalLM; it has down_proj, gate_proj"),
        (["lm_head"], "'lm_head' names lm_head, which is no linear layer of the body"),
        (["embed_tokens"], "names model.embed_tokens, which is no linear layer"),
        (["mlp"], "names model.layers.0.mlp, which is no linear layer"),
    ],
)
def test_targets_that_are_no_linear_layers_of_the_body_are_refused(targets, message):
    with pytest.raises(ModelError, match=message):
        add_adapters(tiny_hybrid("llama").causal_lm, options(targets=targets), seed=0)


@pytest.mark.parametrize(("quantize", "missing"), [("none", "peft"), ("4bit", "bitsandbytes")])
def test_a_missing_package_is_named_with_its_remedy(monkeypatch, quantize, missing):
    check_packages(LoraOptions())
    monkeypatch.setattr(lora, "import_problem", lambda package: "is missing" if package == missing else None)
    extra = "lora" if missing == "peft" else "qlora"
    with pytest.raises(ModelError, match=rf"needs the package {missing}: pip install -e '\.\[{extra}\]'"):
        check_packages(LoraOptions(rank=4, quantize=quantize))


def test_quantised_weights_are_written_unpacked(tmp_path):
    """Where bitsandbytes is installed; it computes on the CPU too."""
    pytest.importorskip("bitsandbytes")
    from hafrm_ds.model.loading import load_hybrid_model

    config = options(save_tiny_model(tmp_path / "base", "llama"), quantize="4bit").model_copy(
        update={"dtype": "float32"}
    )
    model = load_hybrid_model(config, layout="auto", seed=0, device=torch.device("cpu"))
    add_adapters(model.causal_lm, config, seed=0)
    randomize(model)
    folder = save(model, tmp_path / "final")
    loaded = HybridRewardModel.from_pretrained(folder).model
    torch.testing.assert_close(scores(loaded, "shared_prefix"), scores(model, "shared_prefix"), rtol=1e-4, atol=1e-4)


# ---- saving, exporting, loading ------------------------------------------------------------------------------------


def save(model: HybridModel, folder: Path) -> Path:
    formatter = ChatFormatter.create(byte_level_tokenizer(), None, "2024-07-26")
    save_hybrid_model(model, formatter, folder, gathered=lambda parameters: nullcontext(), is_writer=True, metadata={})
    return folder


def trained(base: Path, final: Path, dtype: torch.dtype) -> HybridModel:
    """A model with trained adapters, saved into `final`."""
    causal_lm = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    model = HybridModel(causal_lm, make_reward_head(32, bias=False, init="normal", dtype=dtype, seed=0))
    use_layout(model, "shared_prefix")
    add_adapters(causal_lm, options(base), seed=0)
    randomize(model)
    save(model, final)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama-tied", "phi"])
def test_the_saved_model_and_the_exported_adapter_score_as_the_live_model(tmp_path, family, dtype):
    live = trained(save_tiny_model(tmp_path / "base", family), tmp_path / "final", dtype)
    model = HybridRewardModel.from_pretrained(tmp_path / "final")
    ids = [model.encode(conversation) for conversation in CONVERSATIONS]
    expected = HybridRewardModel(live, model.formatter, max_tokens=1000).score_ids(ids)
    # In bfloat16 the live model rounds two products, the merged one their sum.
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(model.score_ids(ids), expected, rtol=tolerance, atol=tolerance)

    exported = export_model(tmp_path / "final", "adapter", tmp_path / "adapter")
    assert exported.largest_difference == 0
    reopened = HybridRewardModel.from_pretrained(tmp_path / "adapter")
    assert reopened.score(CONVERSATIONS) == model.score(CONVERSATIONS)
    assert reopened.log_probs(CONVERSATIONS) == model.log_probs(CONVERSATIONS)
    assert {parameter.dtype for parameter in reopened.model.parameters()} == {dtype}
    names = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "reward_head.safetensors", "hafrm.json"} <= names
    assert "model.safetensors" not in names


def test_an_adapter_is_measured_against_the_base_that_it_is_put_on(tmp_path):
    """hafrm.json of this one does not name the base."""
    live = trained(save_tiny_model(tmp_path / "base"), tmp_path / "final", torch.float32)
    export_model(tmp_path / "final", "adapter", tmp_path / "adapter")
    judge = load_judge(tmp_path / "adapter", "implicit", device="cpu")
    model = HybridRewardModel(live, judge.formatter, max_tokens=1000)
    policy = torch.tensor(model.log_probs(CONVERSATIONS))
    with adapters_off(live.causal_lm):
        reference = torch.tensor(model.log_probs(CONVERSATIONS))
    expected = 0.1 * (policy - reference)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(torch.tensor(judge.score(CONVERSATIONS)), expected, rtol=1e-4, atol=1e-4)


def test_peft_loads_the_exported_adapter(tmp_path):
    from peft import AutoPeftModelForCausalLM

    trained(save_tiny_model(tmp_path / "base"), tmp_path / "final", torch.float32)
    export_model(tmp_path / "final", "adapter", tmp_path / "adapter")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "final").eval()
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, stock(ids).logits, rtol=1e-4, atol=1e-4)


def test_adapters_that_do_not_belong_to_their_base_are_refused(tmp_path):
    trained(save_tiny_model(tmp_path / "base"), tmp_path / "final", torch.float32)
    export_model(tmp_path / "final", "adapter", tmp_path / "adapter")
    config_file = tmp_path / "adapter/adapter_config.json"
    other = save_tiny_model(tmp_path / "other", "phi")
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(config | {"base_model_name_or_path": str(other)}))
    with pytest.raises(ModelError, match=r"the adapter of .* does not fit PhiForCausalLM .* made for another model"):
        HybridRewardModel.from_pretrained(tmp_path / "adapter")
    config_file.write_text(json.dumps({key: value for key, value in config.items() if key != "r"}))
    with pytest.raises(ModelError, match=r"adapter_config.json lacks r"):
        HybridRewardModel.from_pretrained(tmp_path / "adapter")
    config_file.write_text("{")
    with pytest.raises(ModelError, match=r"adapter_config.json cannot be read"):
        HybridRewardModel.from_pretrained(tmp_path / "adapter")


def test_a_model_without_adapters_has_no_such_export(tmp_path):
    with pytest.raises(ModelError, match="has no adapter/: it was not trained with adapters"):
        export_model(save_tiny_final(tmp_path / "final"), "adapter", tmp_path / "adapter")


def test_an_adapter_on_quantised_weights_is_exported_merged_alone(tmp_path):
    trained(save_tiny_model(tmp_path / "base"), tmp_path / "final", torch.float32)
    file = tmp_path / "final/hafrm.json"
    metadata = json.loads(file.read_text()) | {"config": {"model": {"lora": {"quantize": "4bit"}}}}
    file.write_text(json.dumps(metadata))
    with pytest.raises(ModelError, match=r"was trained on weights in 4bit.*export the policy"):
        export_model(tmp_path / "final", "adapter", tmp_path / "adapter")
