"""The generated pairs, their yardsticks, the tokenizer and the model of the quickstart."""

import hashlib
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hafrm_ds import quickstart
from hafrm_ds.errors import UserError
from hafrm_ds.quickstart import (
    LEAST_MARGIN,
    RUBRIC,
    features_of,
    generate_pairs,
    results,
    rubric,
    share_won,
    write_data,
    write_model,
    write_tokenizer,
    yardsticks,
)


@pytest.fixture(scope="module")
def pairs():
    return generate_pairs(4000, seed=0, label_noise=0.1)


def test_the_same_seed_gives_the_same_files(tmp_path):
    for name in ("first", "second"):
        write_data(tmp_path / name, train_pairs=40, test_pairs=10, seed=3)
    write_data(tmp_path / "other", train_pairs=40, test_pairs=10, seed=4)
    for file in ("train.jsonl", "test.jsonl", "rubric.json"):
        first, second, other = ((tmp_path / name / file).read_bytes() for name in ("first", "second", "other"))
        assert first == second != other


def test_the_pairs_are_those_of_the_published_figures(tmp_path):
    write_data(tmp_path)
    digests = [hashlib.sha256((tmp_path / f"{name}.jsonl").read_bytes()).hexdigest()[:16] for name in ("train", "test")]
    assert digests == ["82abdab29263fb4f", "bfef08c8d1158da9"]


def test_rows_hold_what_a_trainer_may_see(tmp_path):
    write_data(tmp_path, train_pairs=30, test_pairs=20)
    files = [tmp_path / "train.jsonl", tmp_path / "test.jsonl"]
    train, test = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    assert (len(train), len(test)) == (30, 20)
    assert all(row.keys() == {"prompt", "chosen", "rejected", "flipped"} for row in train + test)
    key = {(row["prompt"], *sorted((row["chosen"], row["rejected"]))) for row in train + test}
    assert len(key) == 50, "a pair stands in both files or twice in one"


def test_the_share_of_flipped_labels_is_the_noise(pairs):
    share = sum(pair.flipped for pair in pairs) / len(pairs)
    assert abs(share - 0.1) < 3 * (0.1 * 0.9 / len(pairs)) ** 0.5
    assert not any(pair.flipped for pair in generate_pairs(200, label_noise=0.0))


def test_noise_flips_labels_and_leaves_the_texts(pairs):
    for clean, noisy in zip(generate_pairs(200, label_noise=0.0), pairs, strict=False):
        row, other = clean.row(), noisy.row()
        if noisy.flipped:
            other["chosen"], other["rejected"] = other["rejected"], other["chosen"]
        assert row == other | {"flipped": False}


def test_the_better_answer_wins_by_the_rubric(pairs):
    assert all(pair.better.score - pair.worse.score >= LEAST_MARGIN for pair in pairs)
    answer = pairs[0].better
    assert answer.score == sum(RUBRIC[name] * answer.features[name] for name in RUBRIC)


def test_features_are_what_the_text_says(pairs):
    for answer in (answer for pair in pairs[:300] for answer in (pair.better, pair.worse)):
        opening, *body = answer.text.replace("?", ".").replace("!", ".").split(". ")
        repeated = len(body) - len({sentence.rstrip(".") for sentence in body})
        assert repeated == answer.features["repetition"], answer.text
        assert ("thing" in opening or "my mind" in opening) == (not answer.features["on_topic"]), answer.text


def test_the_rubric_knows_the_features_of_any_answer(pairs):
    for pair in pairs[:500]:
        for answer in (pair.better, pair.worse):
            assert features_of(pair.prompt, answer.text) == answer.features
            assert rubric([{"role": "user", "content": pair.prompt}], answer.text) == answer.score
    assert sum(features_of(pairs[0].prompt, "Nothing of this world.").values()) == 0
    with pytest.raises(ValueError, match="the world has no prompt 'Why'"):
        features_of("Why", "Because.")


def test_no_single_feature_and_no_length_gives_the_answer_away(pairs):
    measured = yardsticks(pairs)
    assert measured.keys() == {"longer answer", *RUBRIC}
    assert 0.45 < measured["longer answer"] < 0.6
    assert max(measured.values()) < 0.75


def test_best_accuracy_is_the_share_of_unflipped_labels(tmp_path):
    facts = write_data(tmp_path, train_pairs=10, test_pairs=200, label_noise=0.3)
    flipped = [json.loads(line)["flipped"] for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    assert facts["best_accuracy_on_test"] == 1 - sum(flipped) / 200
    assert facts["expected_best_accuracy"] == 0.7
    assert facts == json.loads((tmp_path / "rubric.json").read_text())


def test_a_tie_counts_half():
    assert share_won([1, 2, 0, -1]) == 2.5 / 4


@pytest.fixture(scope="module")
def model_folder(pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    texts = [text for pair in pairs[:300] for text in (pair.prompt, pair.better.text, pair.worse.text)]
    write_tokenizer(folder, texts, vocabulary=600)
    write_model(folder, vocabulary=600, hidden=64, layers=1)
    return folder


def test_the_tokenizer_round_trips_any_text(model_folder, pairs):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    assert len(tokenizer) == 600
    for text in (pairs[0].prompt, pairs[0].better.text, "Zwölf Euro: 12 €\n\tand  two spaces 漢字"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


def test_a_rendered_conversation_starts_with_bos_and_ends_with_eos(model_folder, pairs):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    question = [{"role": "user", "content": pairs[0].prompt}]
    whole = [*question, {"role": "assistant", "content": pairs[0].better.text}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    text = tokenizer.apply_chat_template(whole, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
    assert ids[: len(prompt_ids)] == prompt_ids
    assert (ids.count(tokenizer.bos_token_id), ids[0]) == (1, tokenizer.bos_token_id)
    assert (ids.count(tokenizer.eos_token_id), ids[-1]) == (1, tokenizer.eos_token_id)
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}) == 3


def test_the_model_loads_and_is_the_same_for_the_same_seed(model_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    write_model(tmp_path / "again", vocabulary=600, hidden=64, layers=1)
    write_model(tmp_path / "other", vocabulary=600, hidden=64, layers=1, seed=1)
    again, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("again", "other"))
    assert model.dtype == torch.float32
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)


def test_results_compare_the_last_evaluation_with_the_best(tmp_path):
    facts = write_data(tmp_path / "data", train_pairs=10, test_pairs=100)
    with pytest.raises(UserError, match=r"metrics\.jsonl does not exist"):
        results(tmp_path)
    (tmp_path / "run").mkdir()
    rows = [{"step": step, "kind": "eval", "set": "held_out", "accuracy/reward": 0.5 + step / 100} for step in (0, 20)]
    rows.insert(1, {"step": 20, "kind": "train", "accuracy/reward": 0.1})
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = results(tmp_path)
    assert "0.700  at step 20, after 0.500 at step 0" in text
    assert f"{facts['best_accuracy_on_test']:.3f}  best reachable" in text


# ---- the study -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "folder"), [([], "model"), (["--study"], "data")])
def test_what_it_did_not_write_is_not_overwritten(tmp_path, words, folder):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "train.jsonl").write_text("mine")
    with pytest.raises(UserError, match=rf"{folder} is there already, .* name another folder"):
        quickstart.main([str(tmp_path), *words])
    assert [file.name for file in tmp_path.rglob("*")] == [folder, "train.jsonl"]


def test_a_cue_stands_before_the_better_answer_as_often_as_asked(pairs):
    cue = quickstart.WORLD["cue"]
    for share in (0.0, 0.8, 1.0):
        cued = quickstart.with_cue(pairs, share, seed=1)
        better = sum(pair.better.text.startswith(cue) for pair in cued)
        assert better + sum(pair.worse.text.startswith(cue) for pair in cued) == len(pairs)
        assert abs(better / len(pairs) - share) <= 3 * (share * (1 - share) / len(pairs)) ** 0.5
        assert [pair.better.features for pair in cued] == [pair.better.features for pair in pairs]


def test_a_study_holds_topics_out_turns_the_cue_and_pretrains(tmp_path, monkeypatch):
    small = {"TRAIN_PAIRS": 60, "STUDY_TEST_PAIRS": 40, "PRETRAINING_PAIRS": 300, "PRETRAINING_EPOCHS": 1}
    for name, value in small.items():
        monkeypatch.setattr(quickstart, name, value)
    quickstart.write_study(tmp_path)
    rows = {
        file.stem: [json.loads(line) for line in file.read_text().splitlines()]
        for file in tmp_path.glob("data/*.jsonl")
    }
    sizes = {name: len(each) for name, each in rows.items()}
    assert sizes == {"train": 60, "train_cued": 60, "same_topics": 40, "other_topics": 40, "turned_cue": 40}
    prompts = {name: {row["prompt"] for row in each} for name, each in rows.items()}
    assert not prompts["other_topics"] & (prompts["train"] | prompts["same_topics"])
    assert any(row["flipped"] for row in rows["train"])
    assert not any(row["flipped"] for name in ("same_topics", "other_topics", "turned_cue") for row in rows[name])
    cue = quickstart.WORLD["cue"]
    in_front = {
        name: sum(row["chosen"].startswith(cue) for row in rows[name]) / len(rows[name])
        for name in ("train", "train_cued", "turned_cue")
    }
    assert in_front["train"] == 0 and in_front["train_cued"] > 0.6 and in_front["turned_cue"] < 0.4

    # The pre-trained model predicts answers that it has not seen better than the one with random weights.
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "pretrained")
    text = tokenizer(rows["other_topics"][0]["chosen"], return_tensors="pt").input_ids
    with torch.no_grad():
        losses = [
            AutoModelForCausalLM.from_pretrained(tmp_path / name)(text, labels=text).loss.item()
            for name in ("random", "pretrained")
        ]
    assert losses[1] < losses[0] - 0.5
