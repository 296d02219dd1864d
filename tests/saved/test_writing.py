"""A saved model is a whole one: reopened through the stock class it has every weight, and gives the same scores."""

import json
from contextlib import nullcontext
from itertools import chain

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.packing import lay_out
from hafrm_ds.model.hybrid import HybridModel, make_reward_head
from hafrm_ds.saved import tensor_files, writing
from hafrm_ds.saved.writing import save_hybrid_model
from tests.tiny_models import EXPERTS, random_items, tiny_hybrid, use_layout
from tests.tiny_tokenizers import byte_level_tokenizer


def save(model: HybridModel, folder, gathered=lambda parameters: nullcontext()) -> None:
    save_hybrid_model(
        model,
        ChatFormatter.create(byte_level_tokenizer(), None, "2024-07-26"),
        folder,
        gathered=gathered,
        is_writer=True,
        metadata={"base": {"model": "tiny", "license": "apache-2.0"}},
    )


def stored_shapes(folder) -> dict[str, tuple[int, ...]]:
    """Name -> shape, from the headers of all safetensors files but the reward head's."""
    shapes = {}
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, framework="pt") as content:
            for name in content.keys():  # noqa: SIM118 (no mapping)
                assert name not in shapes, f"{name} is stored twice"
                shapes[name] = tuple(content.get_slice(name).get_shape())
    return shapes


def scores(model: HybridModel):
    use_layout(model, "shared_prefix")
    with torch.no_grad():
        return model(lay_out(random_items(seed=6), "shared_prefix"))


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt-neox-tied", "phi", "gemma2", "opt"])
@pytest.mark.parametrize("in_one_file", [True, False])
def test_a_reopened_model_has_every_weight_and_gives_the_same_scores(family, in_one_file, tmp_path, monkeypatch):
    if not in_one_file:
        monkeypatch.setattr(tensor_files, "MAX_SHARD_BYTES", 10_000)
    model, folder = tiny_hybrid(family), tmp_path / "final"
    expected = scores(model)
    save(model, folder)
    assert (folder / "model.safetensors").exists() == in_one_file
    assert (folder / "model.safetensors.index.json").exists() != in_one_file
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1

    weights = dict(model.causal_lm.named_parameters())
    shapes = stored_shapes(folder)
    assert {name: shapes[name] for name in weights} == {name: tuple(value.shape) for name, value in weights.items()}
    tied = model.causal_lm.get_input_embeddings().weight is model.lm_head.weight
    assert tied == family.endswith("-tied")

    reopened, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    for name, value in reopened.named_parameters():
        assert torch.equal(value, weights[name]), name
    head = make_reward_head(32, bias=False, init="zero", dtype=torch.float32, seed=0)
    with safe_open(folder / "reward_head.safetensors", framework="pt") as content:
        head.load_state_dict({name: content.get_tensor(name) for name in content.keys()})  # noqa: SIM118
    actual = scores(HybridModel(reopened, head).eval())
    assert torch.equal(actual.reward, expected.reward)
    assert torch.equal(actual.logprob, expected.logprob)


def test_a_saved_folder_needs_nothing_of_ours(tmp_path):
    model = tiny_hybrid("llama")
    use_layout(model, "shared_prefix")
    model.causal_lm.config.architectures = None
    save(model, tmp_path / "final")
    config = (tmp_path / "final/config.json").read_text()
    assert "hafrm" not in config
    assert json.loads(config)["architectures"] == ["LlamaForCausalLM"]
    assert AutoTokenizer.from_pretrained(tmp_path / "final").chat_template == byte_level_tokenizer().chat_template
    assert json.loads((tmp_path / "final/hafrm.json").read_text())["base"]["model"] == "tiny"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "final").config._attn_implementation == "sdpa"


@pytest.mark.parametrize("part", ["causal_lm.model.norm", "reward_head"])
def test_a_parameter_that_was_not_gathered_is_no_folder(part, tmp_path):
    """As under ZeRO-3: no elements, the true shape in ds_shape."""
    model = tiny_hybrid("llama")
    parameter = model.get_submodule(part).weight
    parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    with pytest.raises(RuntimeError, match=r"has the shape \(0,\) instead of \(.*32.*\): not gathered"):
        save(model, tmp_path / "final")
    assert not (tmp_path / "final").exists()


def test_every_parameter_is_gathered_once_and_alone(tmp_path):
    """No rank ever holds a whole copy of the model."""
    model, gathered = tiny_hybrid("llama-tied"), []

    def gather(parameters):
        gathered.append(list(parameters))
        return nullcontext()

    save(model, tmp_path / "final", gather)
    body, head = gathered[:-1], gathered[-1]
    assert head == [model.reward_head.weight]
    assert all(len(parameters) <= 1 for parameters in body)
    assert list(chain(*body)) == list(model.causal_lm.parameters())


def test_an_earlier_folder_is_replaced_and_drafts_are_left_behind_by_nobody(tmp_path):
    folder = tmp_path / "final"
    folder.mkdir()
    (folder / "old.safetensors").touch()
    save(tiny_hybrid("llama"), folder)
    assert not (folder / "old.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


@pytest.mark.parametrize("in_one_file", [True, False])
@pytest.mark.parametrize("family", EXPERTS)
def test_experts_are_written_as_transformers_publishes_them(family, in_one_file, tmp_path, monkeypatch):
    """One by one, where the family was published so: other programs do not read the stacks that transformers 5 has."""
    if not in_one_file:
        monkeypatch.setattr(tensor_files, "MAX_SHARD_BYTES", 10_000)
    model = tiny_hybrid(family)
    save(model, tmp_path / "final")
    model.causal_lm.save_pretrained(tmp_path / "stock")
    expected = load_file(tmp_path / "stock/model.safetensors")
    assert stored_shapes(tmp_path / "final") == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "final").state_dict()
    assert all(torch.equal(reopened[name], tensor) for name, tensor in model.causal_lm.state_dict().items())


def test_experts_that_were_written_as_stacks_are_still_read(tmp_path, monkeypatch):
    model = tiny_hybrid("olmoe")
    monkeypatch.setattr(writing, "publisher", lambda causal_lm: tensor_files.as_it_is)
    save(model, tmp_path / "final")
    assert "model.layers.0.mlp.experts.gate_up_proj" in stored_shapes(tmp_path / "final")
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "final").state_dict()
    assert all(torch.equal(reopened[name], tensor) for name, tensor in model.causal_lm.state_dict().items())
