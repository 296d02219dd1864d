"""An export scores the same in stock classes, and one that does not is never written."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hafrm_ds import HybridRewardModel, load_judge
from hafrm_ds.errors import DataError, ModelError
from hafrm_ds.saved import export, tensor_files
from hafrm_ds.saved.export import export_model
from hafrm_ds.saved.pad_token import PadToken
from tests.saved.test_score_equality import ENDS_IN_EOS, ENDS_IN_NEWLINE
from tests.tiny_models import save_tiny_final

ROOT = Path(__file__).parents[2]
QUESTION = [{"role": "user", "content": "Why?"}]
ANSWERS = ["Because.", " It rains, and nobody knows why.", "1"]
CONVERSATIONS = [[*QUESTION, {"role": "assistant", "content": answer}] for answer in ANSWERS]
FORMATS = ["policy", "sequence-classification"]


def stock_scores(folder, conversations=CONVERSATIONS, side: str = "right") -> list[float]:
    """By nothing but transformers: one padded batch."""
    model, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side)
    batch = tokenizer.apply_chat_template(conversations, padding=True, return_tensors="pt", return_dict=True)
    assert (batch["attention_mask"] == 0).any()
    with torch.no_grad():
        return model.eval()(**batch).logits[:, 0].tolist()


@pytest.mark.parametrize("family", ["llama-tied", "qwen3-tied", "phi", "gemma2", "gpt-neox-tied", "opt"])
@pytest.mark.parametrize("template", [ENDS_IN_EOS, ENDS_IN_NEWLINE], ids=["eos", "newline"])
def test_a_classifier_scores_as_the_model_does(family, template, tmp_path):
    final = save_tiny_final(tmp_path / "final", family, chat_template=template, pad_token="</s>")
    model = HybridRewardModel.from_pretrained(final)
    exported = export_model(final, "sequence-classification", tmp_path / "export")
    assert exported.largest_difference < 1e-5
    assert stock_scores(tmp_path / "export") == pytest.approx(model.score(CONVERSATIONS), abs=1e-5)
    assert stock_scores(tmp_path / "export", side="left") == pytest.approx(model.score(CONVERSATIONS), abs=1e-5)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    config = json.loads((tmp_path / "export/config.json").read_text())
    assert tokenizer.pad_token_id == config["pad_token_id"] == exported.pad_token.id
    for conversation in CONVERSATIONS:
        assert model.formatter.encode(conversation)[-1] != tokenizer.pad_token_id


def test_a_policy_has_the_models_log_probs(tmp_path):
    final = save_tiny_final(tmp_path / "final", pad_token="</s>")
    assert export_model(final, "policy", tmp_path / "export").largest_difference < 1e-5
    model = HybridRewardModel.from_pretrained(final)
    stock, tokenizer = (kind.from_pretrained(tmp_path / "export") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert tokenizer.pad_token_id == stock.config.pad_token_id == stock.generation_config.pad_token_id
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    for conversation, expected in zip(CONVERSATIONS, model.log_probs(CONVERSATIONS), strict=True):
        ids = torch.tensor([model.formatter.encode(conversation)])
        with torch.no_grad():
            logprobs = stock(ids).logits[0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None])
        length = len(model.encode(conversation).responses[0])
        assert logprobs[-length:].sum().item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("format", FORMATS)
def test_bfloat16_is_written_as_it_is_in_files_of_a_bounded_size(format, tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "MAX_SHARD_BYTES", 10_000)
    final = save_tiny_final(tmp_path / "final", dtype=torch.bfloat16)
    exported = export_model(final, format, tmp_path / "export")
    assert exported.largest_difference < 1e-5  # compared in fp32, into which bfloat16 goes without loss
    assert len(list((tmp_path / "export").glob("model-*.safetensors"))) > 3
    assert not list((tmp_path / "export").glob("*.bin"))
    assert json.loads((tmp_path / "export/config.json").read_text())["dtype"] == "bfloat16"
    if format == "sequence-classification":
        expected = HybridRewardModel.from_pretrained(final, dtype="float32").score(CONVERSATIONS)
        assert stock_scores(tmp_path / "export") == pytest.approx(expected, abs=0.05)


def test_a_new_pad_token_gets_a_row_of_the_embedding(tmp_path, monkeypatch):
    """As for GPT-2, whose only special token is eos and whose embedding has no row to spare."""
    final = save_tiny_final(tmp_path / "final", pad_token="</s>")
    model = HybridRewardModel.from_pretrained(final)
    rows = model.model.causal_lm.get_input_embeddings().num_embeddings
    monkeypatch.setattr(export, "choose_pad_token", lambda *_: PadToken("<|pad|>", rows, is_new=True))
    export_model(final, "sequence-classification", tmp_path / "classifier")
    assert stock_scores(tmp_path / "classifier") == pytest.approx(model.score(CONVERSATIONS), abs=1e-5)
    assert json.loads((tmp_path / "classifier/config.json").read_text())["vocab_size"] == rows + 1
    # In a policy one more row of the head would enter every softmax.
    assert export_model(final, "policy", tmp_path / "policy").pad_token is None
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "policy").config.vocab_size == rows


def test_an_export_that_scores_otherwise_is_not_written(tmp_path, monkeypatch):
    """With pad = eos and a template that ends in eos, the stock class reads one token early."""
    final = save_tiny_final(tmp_path / "final", pad_token="</s>")
    eos = AutoTokenizer.from_pretrained(final).eos_token_id
    monkeypatch.setattr(export, "choose_pad_token", lambda *_: PadToken("</s>", eos, is_new=False))
    with pytest.raises(ModelError, match=r"the reopened export gives other scores.*no export was written"):
        export_model(final, "sequence-classification", tmp_path / "export")
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_what_has_no_place_in_a_stock_class_is_refused(tmp_path):
    biased = save_tiny_final(tmp_path / "biased", bias=True)
    with pytest.raises(ModelError, match=r"the reward head has a bias.*reward_head_bias false"):
        export_model(biased, "sequence-classification", tmp_path / "export")
    family = save_tiny_final(tmp_path / "cohere", "cohere")
    with pytest.raises(ModelError, match="no sequence-classification model for cohere"):
        export_model(family, "sequence-classification", tmp_path / "export")
    with pytest.raises(ModelError, match="is already there"):
        export_model(biased, "policy", family)
    export_model(biased, "policy", tmp_path / "export")
    with pytest.raises(ModelError, match=r"is an export \(policy\).*give the final/ folder"):
        HybridRewardModel.from_pretrained(tmp_path / "export")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 50}, r"token id [\d,]+ \('.*'\) is beyond the embedding of .*final, which has 50 rows"),
        ({"max_position_embeddings": 20}, r"tokens, more than the positions that the model knows \(20\)"),
    ],
)
def test_sizes_are_checked_before_weights_are_read(tmp_path, monkeypatch, changes, message):
    final = save_tiny_final(tmp_path / "final")
    config = json.loads((final / "config.json").read_text())
    (final / "config.json").write_text(json.dumps(config | changes))
    monkeypatch.setattr(export.SavedModel, "hybrid_model", None)
    with pytest.raises(DataError, match=message):
        export_model(final, "policy", tmp_path / "export")


def test_the_card_says_where_the_model_comes_from(tmp_path):
    export_model(save_tiny_final(tmp_path / "final"), "sequence-classification", tmp_path / "export")
    for folder in ("final", "export"):
        card = (tmp_path / folder / "README.md").read_text()
        assert "license: apache-2.0" in card and "base_model: example/tiny" in card
        assert "| train | 30 | 28 | 2 | 1 |" in card
        assert "| accuracy/reward | 0.7500 |" in card
        assert "alpha: 0.2" in card
    config = json.loads((tmp_path / "export/config.json").read_text())
    assert (config["mean"], config["std"]) == (0.5, 2.0)  # of the reward on the evaluation set


def launch(monkeypatch, **options) -> int:
    """Exit status."""
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["export.py", *words])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(ROOT / "launch/export.py"), run_name="__main__")
    return left.value.code


def test_the_launch_file(tmp_path, monkeypatch, capsys):
    final = save_tiny_final(tmp_path / "final")
    options = {"model": final, "format": "sequence-classification", "output_dir": tmp_path / "export"}
    assert launch(monkeypatch, **options) == 0
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'export'}: pad token '<|im_start|>'" in printed and "reopened: scores that differ" in printed
    for changes, message in (
        ({}, "is already there"),
        ({"format": "onnx"}, "format: input should be 'policy', 'sequence-classification', 'adapter' or 'hybrid'"),
    ):
        assert launch(monkeypatch, **options | changes) != 0
        assert message in capsys.readouterr().err


# ---- outside loaders -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """(export, scores of the model) of a tiny model whose template ends in eos = pad."""
    folder = tmp_path_factory.mktemp("outside")
    final = save_tiny_final(folder / "final", pad_token="</s>")
    export_model(final, "sequence-classification", folder / "export")
    return folder / "export", HybridRewardModel.from_pretrained(final).score(CONVERSATIONS)


def test_trl_takes_it_as_a_reward_function(classifier, tmp_path):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    folder, expected = classifier
    policy = save_tiny_final(tmp_path / "policy")
    options = {"output_dir": str(tmp_path / "run"), "report_to": [], "use_cpu": True, "bf16": False}
    trainer = GRPOTrainer(
        model=str(policy),
        reward_funcs=str(folder),
        args=GRPOConfig(**options, num_generations=3, per_device_train_batch_size=3),
        train_dataset=Dataset.from_list([{"prompt": QUESTION}]),
    )
    prompts = [QUESTION] * len(ANSWERS)
    completions = [conversation[1:] for conversation in CONVERSATIONS]
    inputs = [{"prompt": prompt} for prompt in prompts]
    rewards = trainer._calculate_rewards(inputs, prompts, completions, [[0]] * len(ANSWERS))
    assert rewards[:, 0].tolist() == pytest.approx(expected, abs=1e-5)


def test_a_loader_that_puts_its_own_linear_on_the_body_finds_everything(classifier):
    """OpenRLHF's reward path and vLLM's: the body by the name of its family, `score` beside it, the value read at the
    last attended position, under padding on the left too."""
    folder, expected = classifier
    body, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and set(report["unexpected_keys"]) == {"score.weight"}
    weight = tensor_of(folder, "score.weight")
    assert weight.shape == (1, body.config.hidden_size)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    texts = tokenizer.apply_chat_template(CONVERSATIONS, tokenize=False)
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        states = body(**batch, position_ids=positions).last_hidden_state[:, -1]
    assert (states @ weight[0]).tolist() == pytest.approx(expected, abs=1e-5)
    assert json.loads((folder / "config.json").read_text())["problem_type"] == "regression"  # no sigmoid in vLLM


def tensor_of(folder, name: str) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as content:
        return content.get_tensor(name)


def test_readers_with_transformers_4_find_the_rotary_base_and_a_tokenizer_they_know(classifier):
    folder, _ = classifier
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["model_input_names"] == ["input_ids", "attention_mask"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attributes_are_further_labels(tmp_path, dtype):
    """In stock classes the logits plus the offsets of config.json, in ours the values as they are."""
    names = ("helpfulness", "verbosity")
    final = save_tiny_final(tmp_path / "final", dtype=dtype, attributes=names, pad_token="</s>")
    model = HybridRewardModel.from_pretrained(final, dtype="float32")
    rated = model.rate(CONVERSATIONS)
    assert [each["reward"] for each in rated] == model.score(CONVERSATIONS)
    assert all(list(each) == ["reward", *names] for each in rated)
    assert rated == model.rate(QUESTION, ANSWERS) and model.rate(CONVERSATIONS[0]) == pytest.approx(rated[0])

    folder = tmp_path / "export"
    assert export_model(final, "sequence-classification", folder).largest_difference < 1e-5
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"] == {"0": "reward", "1": "helpfulness", "2": "verbosity"}
    assert config["label_offsets"] == [0.0, *model.model.attribute_head.bias.tolist()]
    stock, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    batch = tokenizer.apply_chat_template(CONVERSATIONS, padding=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        values = stock.float().eval()(**batch).logits + torch.tensor(config["label_offsets"])
    expected = torch.tensor([list(each.values()) for each in rated])
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-4)
    assert "helpfulness, verbosity: the logits plus `label_offsets`" in (folder / "README.md").read_text()
    assert "`model.rate(messages)` gives helpfulness, verbosity" in (final / "README.md").read_text()

    reopened = load_judge(folder, dtype="float32")
    assert reopened.attributes == names
    torch.testing.assert_close(
        torch.tensor([list(each.values()) for each in reopened.rate(CONVERSATIONS)]), expected, rtol=1e-4, atol=1e-4
    )
    export_model(final, "policy", tmp_path / "policy")


def test_an_export_whose_attributes_are_others_is_not_written(tmp_path, monkeypatch):
    final = save_tiny_final(tmp_path / "final", attributes=["helpfulness"], pad_token="</s>")
    own = export.stock_scores
    monkeypatch.setattr(export, "stock_scores", lambda *all_of: [*own(*all_of)[:-1], 0.0])
    with pytest.raises(ModelError, match="the reopened export gives other scores"):
        export_model(final, "sequence-classification", tmp_path / "export")


def test_a_model_without_attributes_is_saved_as_it_always_was(tmp_path):
    final = save_tiny_final(tmp_path / "final", pad_token="</s>")
    assert sorted(file.name for file in final.glob("*.safetensors")) == ["model.safetensors", "reward_head.safetensors"]
    assert "attributes" not in json.loads((final / "hafrm.json").read_text())
    export_model(final, "sequence-classification", tmp_path / "export")
    config = json.loads((tmp_path / "export/config.json").read_text())
    assert not {"label_offsets", "num_labels"} & config.keys() and config["id2label"] == {"0": "LABEL_0"}
    assert HybridRewardModel.from_pretrained(final).rate(CONVERSATIONS[0]).keys() == {"reward"}


def test_a_folder_without_its_head_of_attributes_is_refused(tmp_path):
    final = save_tiny_final(tmp_path / "final", attributes=["helpfulness"])
    (final / "attribute_head.safetensors").unlink()
    with pytest.raises(ModelError, match=r"the head .*attribute_head.safetensors cannot be read"):
        HybridRewardModel.from_pretrained(final)
