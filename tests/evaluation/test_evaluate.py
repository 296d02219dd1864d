"""An evaluation from folders to files: against plain transformers code, and stopped and started again."""

import itertools
import json
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hafrm_ds import load_judge
from hafrm_ds.config import DataConfig
from hafrm_ds.data.pairs import assistant, user
from hafrm_ds.errors import ConfigError, DataError, ModelError
from hafrm_ds.evaluation import scoring
from hafrm_ds.evaluation.best_of_n.options import RankingOptions
from hafrm_ds.evaluation.best_of_n.ranking import rank
from hafrm_ds.evaluation.evaluate import evaluate
from hafrm_ds.evaluation.options import EvaluationOptions
from hafrm_ds.evaluation.pair_scores import load_all
from hafrm_ds.model.sizes import ModelSizes
from hafrm_ds.objective import JudgeFit
from hafrm_ds.options import read
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.saved.export import export_model
from hafrm_ds.scoring.files import ScoringOptions, score_file
from tests.data.row_files import write_lines
from tests.evaluation.benchmarks.rows import rewardbench_row
from tests.evaluation.test_combined import combine
from tests.evaluation.test_order import naive_tau
from tests.tiny_models import save_tiny_final, save_tiny_model

NUM_PAIRS = 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """final/, its two exports, base/ (other weights, the same tokenizer), and pairs.jsonl of two sources."""
    folder = tmp_path_factory.mktemp("evaluation")
    save_tiny_final(folder / "final", pad_token="</s>")
    export_model(folder / "final", "sequence-classification", folder / "classifier")
    export_model(folder / "final", "policy", folder / "policy")
    save_tiny_model(folder / "base", pad_token="</s>")
    weights = AutoModelForCausalLM.from_pretrained(folder / "base")
    with torch.no_grad():
        for parameter in weights.parameters():
            parameter.mul_(0.8)
    weights.save_pretrained(folder / "base")
    source = random.Random(0)

    def text() -> str:
        return "".join(source.choice("abc de") for _ in range(source.randrange(2, 40))).strip() or "x"

    with (folder / "pairs.jsonl").open("w") as file:
        for number in range(NUM_PAIRS):
            row = {"prompt": text(), "chosen": text(), "rejected": text(), "source": "ab"[number % 2]}
            file.write(json.dumps(row) + "\n")
    return folder


def options_for(folder, model: str, output, **changes) -> EvaluationOptions:
    data = DataConfig(train="unused", eval={"held out": str(folder / "pairs.jsonl")}).eval
    given = {"model": str(folder / model), "output_dir": output, "data": data, "max_length": 500}
    return EvaluationOptions(**given | changes)


def run(options: EvaluationOptions) -> dict:
    evaluate(options, Processes(rank=0, local_rank=0, world_size=1, store=dist.HashStore()))
    return json.loads((options.output_dir / "evaluation.json").read_text())


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]


def rendered(tokenizer, *messages) -> torch.Tensor:
    return tokenizer.apply_chat_template(list(messages), return_tensors="pt", return_dict=True)["input_ids"]


def stock_rewards(folder) -> np.ndarray:
    """[P, 2] by plain transformers code: one conversation after another through the exported classifier."""
    stock = AutoModelForSequenceClassification.from_pretrained(folder / "classifier").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "classifier")
    with torch.no_grad():
        return np.array(
            [
                [stock(rendered(tokenizer, user(row["prompt"]), assistant(row[side]))).logits[0, 0].item()
                 for side in ("chosen", "rejected")]
                for row in rows(folder)
            ]
        )  # fmt: skip


def stock_logprobs(folder, model: str) -> np.ndarray:
    """[P, 2] summed log-probs of the answers by plain transformers code."""
    stock = AutoModelForCausalLM.from_pretrained(folder / model).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "final")

    def logprob(row: dict, side: str) -> float:
        ids = rendered(tokenizer, user(row["prompt"]), assistant(row[side]))
        start = tokenizer.apply_chat_template(
            [user(row["prompt"])], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"].shape[1]
        logprobs = stock(ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        return logprobs.gather(1, ids[0, 1:, None])[start - 1 :].sum().item()

    with torch.no_grad():
        return np.array([[logprob(row, side) for side in ("chosen", "rejected")] for row in rows(folder)])


@pytest.mark.parametrize("model", ["final", "classifier"])
def test_accuracies_are_those_of_plain_transformers_code(folder, tmp_path, model):
    found = run(options_for(folder, model, tmp_path / "out"))["sets"]["held out"]
    expected = stock_rewards(folder)
    right = (np.sign(expected[:, 0] - expected[:, 1]) + 1) / 2
    assert 0.2 < right.mean() < 0.8
    assert found["pairs"] == NUM_PAIRS and found["ties"]["reward"] == 0
    assert found["accuracy"]["reward"]["value"] == pytest.approx(right.mean(), abs=1e-12)
    for place, source in enumerate("ab"):
        by_source = found["by_source"][source]["accuracy"]["reward"]["value"]
        assert by_source == pytest.approx(right[place::2].mean(), abs=1e-12)
    scores = load_all(tmp_path / "out" / "evaluation")["held out"]
    np.testing.assert_allclose(scores.reward, expected, atol=1e-4)


def test_groups_of_answers_are_ordered_as_plain_transformers_code_does(folder, tmp_path):
    """Scored groups, one with a tie, and the texts of the worst comparison."""
    pairs, source = rows(folder), random.Random(5)
    given = [
        {
            "prompt": one["prompt"],
            "responses": [one["chosen"], one["rejected"] + "!", two["chosen"] + "?"],
            "scores": source.choice([[1, 2, 3], [2, 1, 1], [3, 2, 1], [1, 2, 2]]),
        }
        for one, two in zip(pairs[:20], pairs[20:40])
    ]
    write_lines(tmp_path / "groups.jsonl", given)
    data = DataConfig(train="unused", eval={"graded": str(tmp_path / "groups.jsonl")}).eval
    found = run(options_for(folder, "final", tmp_path / "out", data=data))["sets"]["graded"]
    stock = AutoModelForSequenceClassification.from_pretrained(folder / "classifier").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "classifier")
    with torch.no_grad():
        rewards = [
            [stock(rendered(tokenizer, user(row["prompt"]), assistant(text))).logits[0, 0].item()
             for text in row["responses"]]
            for row in given
        ]  # fmt: skip
    margins = {
        (number, better, worse): rewards[number][better] - rewards[number][worse]
        for number, row in enumerate(given)
        for better, worse in itertools.permutations(range(3), 2)
        if row["scores"][better] > row["scores"][worse]
    }
    assert (found["pairs"], found["groups"], found["answers"]) == (len(margins), 20, 60)
    assert found["accuracy"]["reward"]["value"] == pytest.approx(np.mean([each > 0 for each in margins.values()]))
    taus = [naive_tau(row["scores"], each) for row, each in zip(given, rewards)]
    assert found["ranking"]["reward"]["tau_b"]["value"] == pytest.approx(np.mean(taus))
    assert found["ranking"].keys() == found["accuracy"].keys() == {"reward", "logprob"}
    scores = load_all(tmp_path / "out" / "evaluation")["graded"]
    assert len(set(scores.ids)) == len(margins)
    number, better, worse = min(margins, key=lambda each: margins[each])
    text = scores.texts[scores.mistakes()[0]]
    assert given[number]["responses"][better] in text.chosen and given[number]["responses"][worse] in text.rejected
    assert text.id.endswith(f"({better + 1}>{worse + 1})")


@pytest.mark.parametrize("model", ["final", "policy"])
def test_the_implicit_reward_is_policy_against_reference(folder, tmp_path, model):
    results = run(options_for(folder, model, tmp_path / "out", reference=str(folder / "base"), beta=0.3))
    found = results["sets"]["held out"]
    policy, reference = stock_logprobs(folder, "policy"), stock_logprobs(folder, "base")
    scores = load_all(tmp_path / "out" / "evaluation")["held out"]
    np.testing.assert_allclose(scores.logprob, policy, atol=1e-3)
    np.testing.assert_allclose(scores.reference, reference, atol=1e-3)
    margins = 0.3 * ((policy - reference)[:, 0] - (policy - reference)[:, 1])
    assert found["accuracy"]["implicit"]["value"] == pytest.approx((margins > 0).mean(), abs=1e-12)
    assert found["margin"]["implicit"]["value"] == pytest.approx(margins.mean(), abs=1e-4)
    assert found["accuracy"]["logprob"]["value"] == pytest.approx((policy[:, 0] > policy[:, 1]).mean(), abs=1e-12)
    assert ("reward" in found["accuracy"]) == (model == "final")


def test_a_benchmark_is_judged_by_every_judge_there_is(folder, tmp_path):
    """The pairs of the set as rows of one subset: its score is the plain accuracy, but that a tie is lost."""
    write_lines(tmp_path / "rows.jsonl", [rewardbench_row("math-prm", **row) for row in map(sides, rows(folder))])
    asked = {"rewardbench": str(tmp_path / "rows.jsonl")}
    options = options_for(
        folder, "final", tmp_path / "out", data={}, benchmarks=asked, reference=str(folder / "base"), beta=0.3
    )
    found = run(options)["benchmarks"]["rewardbench"]
    assert found["cut"] == 0 and found["judges"].keys() == {"reward", "logprob", "implicit"}
    policy, reference = stock_logprobs(folder, "policy"), stock_logprobs(folder, "base")
    expected = {"reward": stock_rewards(folder), "logprob": policy, "implicit": policy - reference}
    for judge, values in expected.items():
        result = found["judges"][judge]["categories"]["Reasoning"]["subsets"]["math-prm"]
        assert result["score"] == pytest.approx((values[:, 0] > values[:, 1]).mean(), abs=1e-12)
        assert result["questions"] == NUM_PAIRS


def sides(row: dict) -> dict:
    return {name: row[name] for name in ("prompt", "chosen", "rejected")}


class Interrupted(Exception):
    """Stands for a kill."""


def test_a_stopped_evaluation_goes_on_with_what_is_missing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "SMALLEST_PART", 8)
    whole = run(options_for(folder, "final", tmp_path / "whole"))
    load, written = scoring.load_for_job, []

    def dying_after(num_parts: int):
        def loading(*arguments):
            scorer = load(*arguments)
            values = scorer.values

            def counted(*given):
                if len(written) == num_parts:
                    raise Interrupted
                written.append(None)
                return values(*given)

            scorer.values = counted
            return scorer

        return loading

    options = options_for(folder, "final", tmp_path / "stopped")
    monkeypatch.setattr(scoring, "load_for_job", dying_after(3))
    with pytest.raises(Interrupted):
        run(options)
    written.clear()
    monkeypatch.setattr(scoring, "load_for_job", dying_after(1000))
    assert run(options)["sets"] == whole["sets"]
    assert len(written) == 7 - 3  # parts of 8 pairs
    written.clear()
    assert run(options)["sets"] == whole["sets"] and not written  # it is finished
    assert {path.name for path in options.output_dir.iterdir()} == {"evaluation", "evaluation.json", "report.html"}


def test_results_of_two_evaluations_never_mix(folder, tmp_path):
    options = options_for(folder, "final", tmp_path / "out", max_pairs=10)
    assert run(options)["sets"]["held out"]["pairs"] == 10
    for changed in (
        options.model_copy(update={"model": str(folder / "classifier")}),
        options.model_copy(update={"max_pairs": 11}),
    ):
        with pytest.raises(
            DataError, match=r"evaluation\.json holds the results of another job; choose another --output_dir"
        ):
            run(changed)


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("classifier", {"reference": "base"}, "has no LM head"),
        ("final", {"reference": "classifier"}, "is no causal LM with weights of its own"),
        ("final", {"max_length": 9000}, "do not fit --max_tokens_per_micro_batch 8,192"),
        ("nothing", {}, "is no local folder"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(folder, tmp_path, model, changes, message):
    if changes.get("reference") == "classifier":
        changes = {"reference": str(folder / "classifier")}
    with pytest.raises((DataError, ModelError), match=message):
        run(options_for(folder, model, tmp_path / "out", **changes))


def test_the_base_is_the_one_that_the_model_names(folder, tmp_path):
    with pytest.raises(ModelError, match="example/tiny"):
        run(options_for(folder, "final", tmp_path / "out", reference="base"))


# ---- both heads as one judge ----


@pytest.fixture(scope="module")
def judged(folder, tmp_path_factory):
    """(model that names its start weights, pairs for the fit, evaluation of the held-out pairs that has fitted them and
    saved the fit in the model). The better answer is the one with more a's, but for one pair in four."""
    place, source = tmp_path_factory.mktemp("judged"), random.Random(3)
    save_tiny_final(place / "final", base=folder / "base", pad_token="</s>")
    pairs = []
    for row in rows(folder) * 3:
        answers = sorted((row["chosen"], row["rejected"]), key=lambda text: text.count("a"), reverse=True)
        chosen, rejected = answers[:: -1 if source.random() < 0.25 else 1]
        pairs.append({"prompt": row["prompt"] + source.choice("xyz"), "chosen": chosen, "rejected": rejected})
    write_lines(place / "judge.jsonl", pairs)
    return (
        place / "final",
        place / "judge.jsonl",
        run(fitting(folder, place / "final", place / "judge.jsonl", place / "out")),
    )


def fitting(folder, model, pairs, output, **changes) -> EvaluationOptions:
    sources = DataConfig(train="unused", eval=str(pairs)).eval
    return options_for(folder, str(model), output, fit_judge=sources, **{"save_judge": True} | changes)


def test_the_combined_judge_is_fitted_on_pairs_that_are_not_tested(folder, judged):
    model, _, results = judged
    fit = JudgeFit.from_json(results["judge"])
    assert (fit.set, fit.pairs) == ("judge", 3 * NUM_PAIRS) and results["reference"] == str(folder / "base")
    scores = load_all(model.parent / "out" / "evaluation")["held out"]
    expected = fit.score(stock_rewards(folder), stock_logprobs(folder, "policy"), stock_logprobs(folder, "base"))
    np.testing.assert_allclose(scores.combined, expected, atol=1e-3)
    right = (expected[:, 0] > expected[:, 1]).mean()
    assert results["sets"]["held out"]["accuracy"]["combined"]["value"] == pytest.approx(right, abs=1e-12)
    assert results["sets"]["held out"]["calibration"].keys() == {"reward", "implicit", "combined"}
    assert json.loads((model / "hafrm.json").read_text())["judge"] == results["judge"]


def test_a_fit_on_groups_counts_their_comparisons(folder, judged, tmp_path):
    texts = [[row["chosen"], row["rejected"] + "!", row["rejected"] + "?", "x"] for row in rows(folder)[:12]]
    given = [{"prompt": f"question {n}", "responses": each, "ranks": [1, 2, 3, 4]} for n, each in enumerate(texts)]
    write_lines(tmp_path / "groups.jsonl", given)
    results = run(fitting(folder, judged[0], tmp_path / "groups.jsonl", tmp_path / "out", save_judge=False))
    assert (results["judge"]["pairs"], results["judge"]["prompts"]) == (12 * 6, 12)


def test_a_fit_that_was_saved_judges_later_sets_and_benchmarks(folder, judged, tmp_path):
    model, pairs, results = judged
    again = run(fitting(folder, model, pairs, model.parent / "out"))  # it is finished, and the model has changed by it
    assert again == results
    write_lines(tmp_path / "rows.jsonl", [rewardbench_row("math-prm", **row) for row in map(sides, rows(folder))])
    benchmarks = {"rewardbench": str(tmp_path / "rows.jsonl")}
    later = run(options_for(folder, str(model), tmp_path / "out", reference="base", beta=7, benchmarks=benchmarks))
    accuracy = results["sets"]["held out"]["accuracy"]["combined"]
    assert later["sets"]["held out"]["accuracy"]["combined"] == accuracy and later["judge"] == results["judge"]
    subset = later["benchmarks"]["rewardbench"]["judges"]["combined"]["categories"]["Reasoning"]["subsets"]["math-prm"]
    assert subset["score"] == pytest.approx(accuracy["value"])
    alone = run(options_for(folder, str(model), tmp_path / "alone"))
    assert "judge" not in alone and alone["sets"]["held out"]["accuracy"].keys() == {"reward", "logprob"}


def test_pairs_that_are_fitted_and_tested_are_judged_fold_by_fold(folder, judged, tmp_path):
    model, pairs, _ = judged
    data = DataConfig(train="unused", eval={"same": str(pairs)}).eval
    run(fitting(folder, model, pairs, tmp_path / "fitted", data=data, save_judge=False))
    run(options_for(folder, str(model), tmp_path / "saved", data=data, reference="base"))
    fitted, saved = (load_all(tmp_path / name / "evaluation")["same"] for name in ("fitted", "saved"))
    expected = combine(fitted.margins("reward"), fitted.margins("implicit"), fitted.prompts)
    for scores in (fitted, saved):
        np.testing.assert_allclose(scores.margins("combined"), expected, rtol=1e-4, atol=1e-4)


def test_evaluate_score_best_of_n_and_python_give_the_same_score(folder, judged, tmp_path):
    model, _, _ = judged
    expected = load_all(model.parent / "out" / "evaluation")["held out"].combined
    given = [{"prompt": row["prompt"], "responses": [row["chosen"], row["rejected"]]} for row in rows(folder)]
    write_lines(tmp_path / "in.jsonl", given)
    alone = Processes(rank=0, local_rank=0, world_size=1, store=dist.HashStore())
    score_file(
        ScoringOptions(model=model, input=tmp_path / "in.jsonl", output=tmp_path / "out.jsonl", judge="combined"),
        alone.for_job("score"),
    )
    ranking = {"candidates": tmp_path / "in.jsonl", "output_dir": tmp_path / "ranked", "judge": "combined"}
    rank(RankingOptions(model=[str(model)], **ranking), alone.for_job("rank"))
    scorer = load_judge(model, "combined", device="cpu")
    scored = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    ranked = [json.loads(line) for line in (tmp_path / "ranked" / "ranked.jsonl").read_text().splitlines()]
    for values, row, by_file, by_rank in zip(expected.tolist(), given, scored, ranked, strict=True):
        found = scorer.score([user(row["prompt"])], row["responses"])
        ranks = {each["response"]: each["score"] for each in by_rank["candidates"]}
        for other in (found, by_file["scores"], [ranks[text] for text in row["responses"]]):
            assert other == pytest.approx(values, rel=1e-5, abs=1e-5)
    assert json.loads((tmp_path / "ranked" / "best_of_n.json").read_text())["judge"] == "combined"


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("classifier", {}, "classifier has no combined judge, which takes two heads: it has no LM head"),
        ("policy", {}, "policy has no combined judge, which takes two heads: it has no trained reward head"),
        (
            "final",
            {"max_pairs": 40},
            r"--fit_judge judge: 40 pairs of \d+ prompts are too few",
        ),
    ],
)
def test_what_cannot_be_fitted_is_refused_before_a_model_is_loaded(folder, judged, tmp_path, model, changes, message):
    with pytest.raises((DataError, ModelError), match=message):
        reference = {} if model != "final" else {"reference": str(folder / "base")}
        run(fitting(folder, folder / model, judged[1], tmp_path / "out", **reference | changes))


def test_options_of_the_fit_that_contradict_themselves_are_refused(tmp_path):
    given = ["--model", "org/name", "--output_dir", str(tmp_path), "--data", "a.jsonl"]
    with pytest.raises(ConfigError, match="saves the fit of --fit_judge, which is not given"):
        read(EvaluationOptions, [*given, "--save_judge", "true"], about="")
    with pytest.raises(ConfigError, match=r"takes one set(?s:.*)org/name is none"):
        read(EvaluationOptions, [*given, "--save_judge", "true", "--fit_judge", "a.jsonl", "b.jsonl"], about="")


@pytest.mark.parametrize(("misfits", "left_out", "cut"), [("leave_out", 1, 0), ("cut", 0, 1)])
def test_one_question_that_does_not_fit_is_left_out_or_cut(folder, tmp_path, misfits, left_out, cut):
    given = [rewardbench_row("math-prm", **sides(row)) for row in rows(folder)]
    given[3]["chosen"] = "a long answer " * 100
    write_lines(tmp_path / "rows.jsonl", given)
    options = options_for(
        folder,
        "final",
        tmp_path / "out",
        data={},
        benchmarks={"rewardbench": str(tmp_path / "rows.jsonl")},
        misfits=misfits,
        max_missing_share=0.001,
    )
    found = run(options)["benchmarks"]["rewardbench"]
    assert (found["left_out"], found["cut"]) == (left_out, cut)
    [reason] = found["why_left_out"] or ["rows.jsonl:4: an answer leaves no room"]
    assert "rows.jsonl:4: an answer leaves no room" in reason
    result = found["judges"]["reward"]["categories"]["Reasoning"]["subsets"]["math-prm"]
    assert result["questions"] == NUM_PAIRS - left_out


def test_positions_beyond_those_of_the_model_are_refused_before_it_is_loaded(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "load_for_job", None)
    options = options_for(folder, "final", tmp_path / "out", max_length=2000)
    monkeypatch.setattr(ModelSizes, "of", classmethod(lambda cls, name, config: ModelSizes(name, 10**6, 20)))
    with pytest.raises(
        DataError,
        match=r"held out: the longest pair has \d+ tokens, but .* knows 20 positions; set --max_length",
    ):
        run(options)
    monkeypatch.setattr(ModelSizes, "of", classmethod(lambda cls, name, config: ModelSizes(name, 40, 10**6)))
    with pytest.raises(ModelError, match=r"held out: token id \d+ .* is beyond the embedding of .*, which has 40 rows"):
        run(options)


def test_the_scores_of_a_run_are_not_replaced(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValidationError, match="holds a run, with scores and a report of its own: give another"):
        EvaluationOptions(model="m", output_dir=tmp_path)
