"""An evaluation of a composition: its files against the composition itself, and what it refuses."""

import json
import random

import numpy as np
import pytest
import torch.distributed as dist

from hafrm_ds.errors import ConfigError, DataError
from hafrm_ds.evaluation.evaluate import evaluate
from hafrm_ds.evaluation.options import EvaluationOptions
from hafrm_ds.evaluation.pair_scores import load_all
from hafrm_ds.evaluation.reward_evaluation import evaluate_reward
from hafrm_ds.options import read
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.rewards.loading import load_reward
from tests.data.row_files import write_lines
from tests.evaluation.benchmarks.rows import rewardbench_row
from tests.tiny_models import save_tiny_final

FUNCTIONS = """
def brevity(prompt, answer):
    if "fault" in answer:
        raise ValueError("no")
    return -len(answer) / 10
"""
COMPOSITION = """
hierarchy: hierarchical
threshold: 0.0
holistic: {model: final, mean: 0.0, deviation: 2.0, weight: 2}
aspects: {brevity: aspects.py:brevity}
"""
NUM_PAIRS = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """all.yaml, its parts, pairs.jsonl, and rewardbench.jsonl with one question that cannot be scored."""
    folder = tmp_path_factory.mktemp("composition")
    save_tiny_final(folder / "final")
    (folder / "aspects.py").write_text(FUNCTIONS)
    (folder / "all.yaml").write_text(COMPOSITION)
    source = random.Random(0)

    def text() -> str:
        return "".join(source.choice("abc de") for _ in range(source.randrange(2, 40))).strip() or "x"

    rows = [{"prompt": text(), "chosen": text(), "rejected": text(), "source": "ab"[n % 2]} for n in range(NUM_PAIRS)]
    write_lines(folder / "pairs.jsonl", rows)
    questions = [rewardbench_row("hep-python") for _ in range(30)] + [rewardbench_row("hep-python", chosen="fault")]
    write_lines(folder / "rewardbench.jsonl", questions)
    return folder


def options_for(folder, output, **changes) -> EvaluationOptions:
    given = {"model": str(folder / "all.yaml"), "data": [str(folder / "pairs.jsonl")], "cache_dir": folder / "cache"}
    return EvaluationOptions(**given | {"output_dir": output} | changes)


def run(options: EvaluationOptions) -> dict:
    evaluate_reward(options, Processes(rank=0, local_rank=0, world_size=1, store=dist.HashStore()))
    return json.loads((options.output_dir / "evaluation.json").read_text())


def test_a_composition_is_evaluated_by_the_values_that_it_gives(folder, tmp_path, capsys):
    found = run(options_for(folder, tmp_path / "out"))
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    asked = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
        for row in pairs
        for side in ("chosen", "rejected")
    ]
    direct = load_reward(folder / "all.yaml", device="cpu").scores(asked)
    expected = np.array([score.value for score in direct]).reshape(-1, 2)
    [scores] = load_all(tmp_path / "out" / "evaluation").values()
    assert scores.reward == pytest.approx(expected, abs=1e-5)
    assert scores.num_tokens[0].tolist() == [len(pairs[0][side].split()) for side in ("chosen", "rejected")]
    [analysis] = found["sets"].values()
    margins = expected[:, 0] - expected[:, 1]
    assert analysis["accuracy"]["reward"]["value"] == pytest.approx(np.mean(margins > 0) + np.mean(margins == 0) / 2)
    assert set(analysis["by_source"]) == {"a", "b"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "evaluation",
        "evaluation.json",
        "report.html",
    ]
    capsys.readouterr()
    assert run(options_for(folder, tmp_path / "out")) == found
    assert "is there already" in capsys.readouterr().out
    with pytest.raises(DataError, match="holds the results of another job"):
        run(options_for(folder, tmp_path / "out", max_pairs=5))


def test_questions_that_a_function_fails_on_are_left_out_of_a_benchmark(folder, tmp_path):
    asked = {"benchmarks": {"rewardbench": str(folder / "rewardbench.jsonl")}, "data": {}}
    asked |= {"model": f"{folder}/aspects.py:brevity"}
    found = run(options_for(folder, tmp_path / "out", **asked))["benchmarks"]["rewardbench"]
    place = folder / "rewardbench.jsonl"
    assert found["why_left_out"] == [f"{place}:31: aspects.py:brevity: ValueError: no"] and found["left_out"] == 1
    subset = found["judges"]["reward"]["categories"]["Reasoning"]["subsets"]["hep-python"]
    assert subset["questions"] == 30


def test_pairs_that_cannot_be_scored_are_left_out_up_to_a_share(folder, tmp_path, capsys):
    lines = (folder / "pairs.jsonl").read_text() + json.dumps({"prompt": "a", "chosen": "fault", "rejected": "b"})
    (tmp_path / "pairs.jsonl").write_text(lines)
    changed = {"model": f"{folder}/aspects.py:brevity", "data": [str(tmp_path / "pairs.jsonl")]}
    [analysis] = run(options_for(folder, tmp_path / "out", **changed))["sets"].values()
    assert analysis["pairs"] == NUM_PAIRS
    assert "1 of 31 pairs could not be scored" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(DataError, match=r"--max_dropped_share is 0\.01"):
        run(options_for(folder, tmp_path / "other", max_dropped_share=0.01, **changed))


def test_groups_are_evaluated_as_those_of_a_model(folder, tmp_path):
    """A composition of one model alone, on answers that are scored with ties, against the model itself."""
    source = random.Random(1)
    rows = [
        {
            "prompt": f"q{number}",
            "responses": ["x" * source.randrange(1, 9) + str(n) for n in range(4)],
            "scores": [source.randrange(3) for _ in range(4)],
        }
        for number in range(20)
    ]
    write_lines(tmp_path / "groups.jsonl", rows)
    (tmp_path / "one.yaml").write_text(f"model: {folder}/final")
    asked = {"data": [str(tmp_path / "groups.jsonl")]}
    composed = run(options_for(folder, tmp_path / "out", model=str(tmp_path / "one.yaml"), **asked))
    options = options_for(folder, tmp_path / "model", model=str(folder / "final"), dtype="float32", **asked)
    evaluate(options, Processes(rank=0, local_rank=0, world_size=1, store=dist.HashStore()))
    plain = json.loads((tmp_path / "model" / "evaluation.json").read_text())
    [[found], [expected]] = (list(each["sets"].values()) for each in (composed, plain))
    assert [found[name] for name in ("pairs", "groups", "answers")] == [
        expected[name] for name in ("pairs", "groups", "answers")
    ]
    # Their intervals differ: the bootstrap draws prompts in the order of their names, which are hashes of other things.
    assert found["accuracy"]["reward"]["value"] == pytest.approx(expected["accuracy"]["reward"]["value"])
    ranking, of_the_model = (
        {name: each["value"] for name, each in every["ranking"]["reward"].items()} for every in (found, expected)
    )
    assert ranking == pytest.approx(of_the_model) and set(ranking) == {"tau_b", "top_1", "ndcg"}
    assert [each.ids for each in load_all(tmp_path / "out" / "evaluation").values()] == [
        each.ids for each in load_all(tmp_path / "model" / "evaluation").values()
    ]


def test_options_of_a_model_are_refused(folder, tmp_path):
    given = ["--model", str(folder / "all.yaml"), "--data", "x.jsonl", "--output_dir", str(tmp_path)]
    options = read(EvaluationOptions, [*given, "--reference", "base", "--max_length", "12"])
    with pytest.raises(ConfigError, match="--reference, --max_length: of a single model alone"):
        run(options)
