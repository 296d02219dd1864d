"""Any model that scores, by what lies in its folder."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hafrm_ds import HybridRewardModel, load_judge
from hafrm_ds.data.pairs import assistant, user
from hafrm_ds.errors import ModelError
from hafrm_ds.saved.export import export_model
from hafrm_ds.saved.opening import identity_of_model, load_scorer, open_model, open_reference, open_reward_model
from tests.test_objective import FIT
from tests.tiny_models import save_tiny_final, save_tiny_model

CONVERSATIONS = [
    [user(question), assistant(answer)]
    for question in ("Why?", "What is it, and since when?")
    for answer in ("Because.", " It rains, and nobody knows why.", "Since May.")
]
DPO = {"alpha": 0.2, "rm_weight": 0.0, "beta": 0.3}


@pytest.fixture(scope="module")
def final(tmp_path_factory):
    return save_tiny_final(tmp_path_factory.mktemp("model") / "final", pad_token="</s>")


def values(folder, head: str, **options) -> list[float]:
    scorer = load_scorer(open_model(folder, **options), torch.device("cpu"), 2000)
    return scorer.values(map(scorer.encode, CONVERSATIONS), (head,))[:, 0].tolist()


def foreign_classifier(final, folder, pad_token_id: int | None):
    """A classifier that other software has written: pad = eos, where the template ends in eos, or no pad at all."""
    shutil.copytree(final, folder)
    (folder / "hafrm.json").unlink()
    config = AutoConfig.from_pretrained(folder, num_labels=1, pad_token_id=pad_token_id)
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return folder


def test_a_training_and_its_exports_say_the_same(final, tmp_path):
    export_model(final, "sequence-classification", tmp_path / "classifier")
    export_model(final, "policy", tmp_path / "policy")
    model = HybridRewardModel.from_pretrained(final)
    assert values(final, "reward") == pytest.approx(model.score(CONVERSATIONS), abs=1e-5)
    assert values(tmp_path / "classifier", "reward") == pytest.approx(model.score(CONVERSATIONS), abs=1e-5)
    assert values(tmp_path / "policy", "logprob") == pytest.approx(model.log_probs(CONVERSATIONS), abs=1e-4)


def test_a_head_that_no_reward_loss_has_trained_gives_no_reward(tmp_path):
    folder = save_tiny_final(tmp_path / "dpo", objective=DPO)
    assert open_model(folder).heads == ("logprob",)
    model = HybridRewardModel.from_pretrained(folder)
    assert len(model.log_probs(CONVERSATIONS)) == len(CONVERSATIONS)
    with pytest.raises(ModelError, match=r"trained without a reward loss \(objective\.rm_weight 0\)"):
        model.score(CONVERSATIONS)
    with pytest.raises(ModelError, match="export the policy"):
        export_model(folder, "sequence-classification", tmp_path / "export")


def start_weights(folder, **tokenizer_options):
    """Other weights than those of `save_tiny_final`, for the same tokens."""
    base = save_tiny_model(folder, **tokenizer_options)
    weights = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for parameter in weights.parameters():
            parameter.mul_(0.8)
    weights.save_pretrained(base)
    return base


def test_without_a_reward_head_the_implicit_reward_scores(tmp_path):
    base = start_weights(tmp_path / "base")
    dpo = save_tiny_final(tmp_path / "dpo", base=base, objective=DPO)
    differences = np.subtract(values(dpo, "logprob"), values(base, "logprob"))
    for saved in (open_reward_model(dpo), open_reward_model(dpo, reference=str(base))):
        scorer = load_scorer(saved, torch.device("cpu"), 2000)
        found = scorer.score_ids(map(scorer.encode, CONVERSATIONS))
        assert found == pytest.approx((0.3 * differences).tolist(), abs=1e-4)
    assert max(differences) - min(differences) > 1

    moved = save_tiny_final(tmp_path / "moved", base=tmp_path / "gone", objective=DPO)
    with pytest.raises(ModelError, match=r"(?s)the reference of \S+moved cannot be used \(--reference\).*gone"):
        open_reward_model(moved)
    with pytest.raises(ModelError, match=r"no reward head.*give --reference"):
        open_reward_model(base)


def test_both_heads_score_as_one_judge_by_the_saved_fit(final, tmp_path):
    base = start_weights(tmp_path / "base", pad_token="</s>")
    model = save_tiny_final(tmp_path / "model", base=base, pad_token="</s>", objective={"alpha": 0.2, "beta": 0.3})
    with pytest.raises(ModelError, match=r"no combined judge: \S+hafrm\.json holds no fit.*--fit_judge SOURCE"):
        open_reward_model(model, judge="combined")
    metadata = json.loads((model / "hafrm.json").read_text())
    (model / "hafrm.json").write_text(json.dumps(metadata | {"judge": FIT.to_json()}))
    differences = np.subtract(values(model, "logprob"), values(base, "logprob"))
    assert np.ptp(differences) > 1
    expected = {
        "reward": values(model, "reward"),
        "implicit": 0.3 * differences,
        "combined": 2 * np.array(values(model, "reward")) + 3 * 0.2 * differences,  # by the weights and beta of the fit
    }
    for judge, scores in expected.items():
        for reference in (None,) if judge == "reward" else (None, str(base)):
            scorer = load_judge(model, judge, reference=reference, device="cpu")
            assert scorer.score(CONVERSATIONS) == pytest.approx(list(scores), abs=1e-4)
    assert identity_of_model(open_reward_model(model, judge="combined"))["judge"] == FIT.to_json()
    (model / "hafrm.json").write_text(json.dumps(metadata | {"judge": {"weights": [1, 2]}}))
    with pytest.raises(ModelError, match=r"the combined judge in \S+hafrm\.json cannot be read"):
        open_reward_model(model, judge="combined")


def test_a_judge_that_a_model_does_not_have_is_refused_with_what_to_do(final, tmp_path):
    dpo = save_tiny_final(tmp_path / "dpo", objective=DPO)
    with pytest.raises(ModelError, match="leave out --judge, or give --judge implicit"):
        open_reward_model(dpo, judge="reward")
    with pytest.raises(ModelError, match="no combined judge, which takes two heads: it has no trained reward head"):
        open_reward_model(dpo, judge="combined")
    export_model(final, "sequence-classification", tmp_path / "classifier")
    with pytest.raises(ModelError, match="no combined judge, which takes two heads: it has no LM head"):
        open_reward_model(tmp_path / "classifier", judge="combined")
    with pytest.raises(ModelError, match="has no LM head, so no implicit reward"):
        open_reward_model(tmp_path / "classifier", judge="implicit")
    with pytest.raises(ModelError, match=r"(?s)the reference of \S+ cannot be used \(--reference\).*example/tiny"):
        open_reward_model(final, judge="implicit")


def test_the_final_of_a_training_is_the_reference_of_one_that_started_from_it(final, tmp_path):
    """As of the plain causal LM in the same folder, whose reward head is not asked."""
    weights = load_file(final / "model.safetensors")
    start = shutil.copytree(final, tmp_path / "start")
    save_file({name: 0.9 * each for name, each in weights.items()}, start / "model.safetensors", {"format": "pt"})
    export_model(start, "policy", tmp_path / "policy")
    against = []
    for reference in (start, tmp_path / "policy"):
        against.append(load_judge(final, "implicit", reference=str(reference), device="cpu").score(CONVERSATIONS))
    assert against[0] == against[1] and len(set(against[0])) > 1


def test_a_reference_that_would_read_other_tokens_is_refused(final, tmp_path):
    saved = open_model(final)
    other_words = save_tiny_model(tmp_path / "words")
    tokenizer = json.loads((other_words / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, two = list(vocabulary)[5:7]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other_words / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match="words has another vocabulary than"):
        open_reference(str(other_words), saved)
    other_kind = save_tiny_model(tmp_path / "kind", "qwen2")
    with pytest.raises(ModelError, match=r"kind is a qwen2 model, .* a llama model"):
        open_reference(str(other_kind), saved)


def test_a_reward_head_scores_without_a_reference(final):
    assert open_reward_model(final).heads == ("reward", "logprob")
    with pytest.raises(ModelError, match="has a reward head, which scores without a reference"):
        open_reward_model(final, reference="base")


@pytest.mark.parametrize("pad_token_id", [1, None])
def test_another_classifier_scores_as_its_own_forward_does(final, tmp_path, pad_token_id):
    folder = foreign_classifier(final, tmp_path / "classifier", pad_token_id)
    stock = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token_id == 1
    expected = []
    for conversation in CONVERSATIONS:
        ids = tokenizer.apply_chat_template(conversation, return_tensors="pt", return_dict=True)["input_ids"]
        with torch.no_grad():
            expected.append(stock(ids).logits[0, 0].item())
    assert len({round(value, 4) for value in expected}) > 3
    assert values(folder, "reward") == pytest.approx(expected, abs=1e-5)


def test_a_plain_causal_lm_has_log_probs_and_no_score(tmp_path):
    folder = save_tiny_model(tmp_path / "policy")
    saved = open_model(folder)
    assert saved.heads == ("logprob",)
    scorer = load_scorer(saved, torch.device("cpu"), 2000)
    assert scorer.layout == "shared_prefix" and not scorer.model.uses_stock_logits
    assert len(set(values(folder, "logprob"))) == len(CONVERSATIONS)


def test_a_causal_lm_that_mixes_packed_answers_goes_padded(tmp_path):
    """A state-space layer runs on from one answer into the next."""
    folder = save_tiny_model(tmp_path / "policy", "mamba")
    assert load_scorer(open_model(folder), torch.device("cpu"), 2000).layout == "padded"
    assert all(value < 0 for value in values(folder, "logprob"))


def test_what_does_not_score_is_refused_by_name(final, tmp_path):
    with pytest.raises(ModelError, match="is no local folder"):
        open_model(tmp_path / "nothing")
    shutil.copytree(final, tmp_path / "broken")
    (tmp_path / "broken" / "hafrm.json").write_text("{")
    with pytest.raises(ModelError, match=r"hafrm\.json cannot be read"):
        open_model(tmp_path / "broken")
    folder = foreign_classifier(final, tmp_path / "other", None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaModel"]}))
    run = tmp_path / "run"
    (run / "final").mkdir(parents=True)
    (run / "final" / "hafrm.json").write_text("{}")
    with pytest.raises(ModelError, match=f"{run} is the folder of a run; its model is {run / 'final'}"):
        open_model(run)
    with pytest.raises(ModelError, match=r"is no model that scores.*it names LlamaModel"):
        open_model(folder)
    labels = {"architectures": ["LlamaForSequenceClassification"], "num_labels": 3, "id2label": {}, "label2id": {}}
    (folder / "config.json").write_text(json.dumps(config | labels))
    with pytest.raises(ModelError, match="has 3 labels; a reward model has one"):
        open_model(folder)


def test_a_classifier_whose_score_is_missing_is_refused(final, tmp_path):
    folder = foreign_classifier(final, tmp_path / "classifier", 1)
    shutil.copyfile(final / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"lack score\.weight, so the scores would be random"):
        values(folder, "reward")
