"""Both heads as one judge, from the evaluations of a training to whatever scores with its final model."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from hafrm_ds.engine.checkpoint import read_state
from hafrm_ds.evaluation.combined import combine
from hafrm_ds.evaluation.pair_scores import load_all
from hafrm_ds.objective import JudgeFit
from hafrm_ds.training.final import export_checkpoint
from tests.distributed.launching import as_options, rows, run_jobs, write_pairs
from tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.distributed

NUM_PAIRS = 80


def with_flipped_labels(file: Path) -> Path:
    """Three of ten pairs turned round, so that no head is always right."""
    source, pairs = random.Random(0), [json.loads(line) for line in file.read_text().splitlines()]
    for pair in pairs:
        if source.random() < 0.3:
            pair["chosen"], pair["rejected"] = pair["rejected"], pair["chosen"]
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """run/, trained on two processes and evaluated on near and far, whose final/ has the best weights by both heads;
    few/, whose first set has too few prompts."""
    folder = tmp_path_factory.mktemp("judge")
    near = with_flipped_labels(write_pairs(folder / "near.jsonl", NUM_PAIRS, seed=1))
    far = with_flipped_labels(write_pairs(folder / "far.jsonl", 20, seed=2))
    chosen = {
        "deepspeed": "ds_configs/zero2.json",
        "max_steps": 6,
        "model.name_or_path": save_tiny_model(folder / "model"),
        "model.dtype": "float32",
        "data.train": with_flipped_labels(write_pairs(folder / "train.jsonl", 60)),
        "batch.global_batch_size": 8,
        "batch.max_tokens_per_micro_batch": 150,
        "data.max_length": 120,
        "reference.store": folder / "store",
        "optimizer.learning_rate": 3e-3,
        "evaluation.every_steps": 2,
        "logging.report": "false",
    }
    judged = {
        "output_dir": folder / "run",
        "data.eval": f"{{near: {near}, far: {far}}}",
        "evaluation.best_metric": "near/accuracy/combined",
        "checkpoint.final": "best",
        "checkpoint.every_steps": 2,
        "checkpoint.keep_last": 3,
    }
    few = {"output_dir": folder / "few", "data.eval": f"{{far: {far}, near: {near}}}"}
    printed = run_jobs(2, [("train", as_options(chosen | each)) for each in (judged, few)])
    (folder / "printed").write_text(printed)
    return folder


def test_a_training_is_evaluated_by_both_heads_as_one_judge(folder):
    evaluations = rows(folder / "run", "eval")
    assert len(evaluations) == 2 * 4 and all(
        {"accuracy/combined", "margin/combined"} <= row.keys() for row in evaluations
    )
    scores = load_all(folder / "run" / "evaluation")
    for name, row in (("near", evaluations[-2]), ("far", evaluations[-1])):
        right = (scores[name].margins("combined") > 0).mean()
        assert row["set"] == name and row["accuracy/combined"] == pytest.approx(right, abs=1e-6)
    expected = combine(scores["near"].margins("reward"), scores["near"].margins("implicit"), scores["near"].prompts)
    np.testing.assert_allclose(scores["near"].margins("combined"), expected, rtol=1e-4, atol=1e-5)
    assert scores["far"].fit == scores["near"].fit
    far = [scores["far"].margins(judge) for judge in ("reward", "implicit")]
    whole = np.stack(far, axis=1) @ scores["far"].fit.weights
    np.testing.assert_allclose(scores["far"].margins("combined"), whole, rtol=1e-4, atol=1e-5)


def test_the_best_weights_are_saved_with_the_judge_of_their_step(folder):
    metadata = json.loads((folder / "run/final/hafrm.json").read_text())
    summary = json.loads((folder / "run/summary.json").read_text())
    step = metadata["training"]["steps"]
    assert summary["best"] == {"metric": "near/accuracy/combined", "step": step, "value": summary["best"]["value"]}
    accuracies = {row["step"]: row["accuracy/combined"] for row in rows(folder / "run", "eval") if row["set"] == "near"}
    assert summary["best"]["value"] == accuracies[step] == max(list(accuracies.values())[1:])
    checkpoint = folder / "run" / "checkpoints" / f"step-{step:06}"
    fit = JudgeFit.from_json(metadata["judge"])
    assert fit == JudgeFit.from_json(read_state(checkpoint).judge)
    num_prompts = len({json.loads(line)["prompt"] for line in (folder / "near.jsonl").read_text().splitlines()})
    assert (fit.set, fit.pairs, fit.prompts, fit.beta) == ("near", NUM_PAIRS, num_prompts, 0.1)
    export_checkpoint(checkpoint, folder / "exported")
    assert json.loads((folder / "exported/hafrm.json").read_text())["judge"] == metadata["judge"]


def test_too_few_prompts_have_no_judge_and_it_is_said_once(folder):
    assert not any("accuracy/combined" in row for row in rows(folder / "few", "eval"))
    assert "judge" not in json.loads((folder / "few/final/hafrm.json").read_text())
    said = "the first evaluation set, far, has 20 prompts, and the combined judge is fitted on 50 or more"
    printed = " ".join((folder / "printed").read_text().split())
    assert printed.count(said) == 1
