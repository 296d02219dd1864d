"""Both heads as one judge, from the evaluations of a training to whatever scores with its final model."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from hafrm_ds.config import DataConfig
from hafrm_ds.engine.checkpoint import read_state
from hafrm_ds.errors import DataError
from hafrm_ds.evaluation import scoring
from hafrm_ds.evaluation.evaluate import evaluate
from hafrm_ds.evaluation.options import EvaluationOptions
from hafrm_ds.evaluation.pair_scores import load_all
from hafrm_ds.objective import JudgeFit
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.saved.sharded import load_for_job
from hafrm_ds.training.final import export_checkpoint
from tests.distributed.forked_ranks import run_cases
from tests.distributed.launching import as_options, rows, write_pairs
from tests.evaluation.test_combined import combine
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
    printed = run_cases(2, [[as_options(chosen | each), None] for each in (judged, few)])
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


def test_the_reference_store_of_the_training_saves_the_forward_of_the_reference(folder, tmp_path, monkeypatch):
    """What was evaluated in the training is evaluated again, without the start weights, and comes out the same."""
    run, alone = folder / "run", Processes(rank=0, local_rank=0, world_size=1, store=dist.HashStore())
    sets = DataConfig(train="unused", eval={name: str(folder / f"{name}.jsonl") for name in ("near", "far")}).eval
    asked = {"model": str(run / "final"), "data": sets, "reference_store": folder / "store"}
    loaded = []

    def load(saved, *arguments):
        loaded.append(saved.folder)
        return load_for_job(saved, *arguments)

    monkeypatch.setattr(scoring, "load_for_job", load)
    evaluate(EvaluationOptions(output_dir=tmp_path / "out", **asked), alone)
    assert loaded == [run / "final"]
    found, expected = load_all(tmp_path / "out/evaluation"), load_all(run / "evaluation")
    step = json.loads((run / "final/hafrm.json").read_text())["training"]["steps"]
    at_step = {row["set"]: row for row in rows(run, "eval") if row["step"] == step}
    for name in sets:
        np.testing.assert_array_equal(found[name].reference, expected[name].reference)
        for judge in ("reward", "implicit", "combined"):
            assert found[name].margins(judge).mean() == pytest.approx(at_step[name][f"margin/{judge}"], abs=1e-5)
    new = DataConfig(train="unused", eval={"new": str(write_pairs(tmp_path / "new.jsonl", 60, seed=9))}).eval
    with pytest.raises(DataError, match="does not have all pairs of --fit_judge; give --reference base"):
        evaluate(EvaluationOptions(output_dir=tmp_path / "new", fit_judge=new, **asked), alone.for_job("new"))
    with pytest.raises(DataError, match="no log-probs in bfloat16 of the weights that"):
        evaluate(EvaluationOptions(output_dir=tmp_path / "b", dtype="bfloat16", **asked), alone.for_job("bfloat16"))


def test_too_few_pairs_have_no_judge_and_it_is_said_once(folder):
    assert not any("accuracy/combined" in row for row in rows(folder / "few", "eval"))
    assert "judge" not in json.loads((folder / "few/final/hafrm.json").read_text())
    said = "the first evaluation set, far: 20 pairs of 20 prompts are too few for the combined judge, which is fitted"
    printed = " ".join((folder / "printed").read_text().split())
    assert printed.count(said) == 1
