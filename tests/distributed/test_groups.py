"""Trainings on groups of answers: any ranks, stage, layout and budget give the same, stopped and resumed or not."""

from pathlib import Path

import pytest
import torch

from tests.distributed.forked_ranks import run_cases
from tests.distributed.launching import TINY_RUN, as_options, rows, write_groups, write_stages
from tests.distributed.test_training import final_weights, largest_difference, stored_values
from tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.distributed

STEPS = 4
OWN_STORE = "reference.store"
ATTRIBUTES = {"model.attributes": "[vowels, length]", "objective.attributes_weight": 0.05}
# Name -> (ranks, ZeRO stage, options, the run whose weights it must have).
RUNS = {
    "one": (1, 0, {}, None),
    "zero0": (2, 0, {}, "one"),
    "zero1": (2, 1, {}, "one"),
    "zero2": (2, 2, {}, "one"),
    "zero3": (2, 3, {}, "one"),
    "split": (2, 3, {"batch.max_tokens_per_micro_batch": 90, "data.max_length": 90}, "one"),
    "packed": (2, 2, {"batch.layout": "packed", "batch.max_tokens_per_micro_batch": 600}, "one"),
    "padded": (2, 0, {"batch.layout": "padded", "batch.max_tokens_per_micro_batch": 600}, "one"),
    "by comparison": (1, 0, {"objective.normalize_by": "comparison"}, None),
    "by comparison, split": (
        2,
        0,
        {"objective.normalize_by": "comparison", "batch.max_tokens_per_micro_batch": 90, "data.max_length": 90},
        "by comparison",
    ),
    "plackett-luce": (1, 0, {"objective.ranking_loss": "plackett_luce"}, None),
    "plackett-luce, zero3": (2, 3, {"objective.ranking_loss": "plackett_luce"}, "plackett-luce"),
    "attributes": (1, 0, ATTRIBUTES, None),
    "attributes, zero3": (2, 3, ATTRIBUTES, "attributes"),
}
STOPPED = [2, 1, "SIGTERM"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The folder of all runs; `stopped` was stopped after its second step under stage 2 and resumed under stage 3."""
    folder = tmp_path_factory.mktemp("groups")
    model = save_tiny_model(folder / "model")
    train_file, test_file = write_groups(folder / "train.jsonl", 24), write_groups(folder / "test.jsonl", 6, seed=1)
    write_stages(folder)

    def options(name: str, ranks: int, stage: int, changes: dict) -> list[str]:
        chosen = TINY_RUN | {
            "output_dir": folder / name,
            "deepspeed": folder / f"zero{stage}.json",
            "max_steps": STEPS,
            "model.name_or_path": model,
            "data.train": train_file,
            "data.eval": f"{{held_out: {test_file}}}",
            "batch.max_tokens_per_micro_batch": 400,
            "optimizer.learning_rate": 1e-2,
            OWN_STORE: folder / f"store of {ranks}",
        }
        return as_options(chosen | changes)

    for ranks in (1, 2):
        cases: list = [
            [options(name, ranks, stage, changes), None]
            for name, (wanted, stage, changes, _) in RUNS.items()
            if wanted == ranks
        ]
        if ranks == 2:
            cases += [[options("stopped", 2, 2, ATTRIBUTES), STOPPED], [options("stopped", 2, 3, ATTRIBUTES), None]]
        run_cases(ranks, cases)
    return folder


@pytest.mark.parametrize("name", [name for name, (*_, expected) in RUNS.items() if expected])
def test_a_run_has_the_weights_and_losses_of_one_process(runs, name):
    expected = runs / RUNS[name][3]
    assert largest_difference(final_weights(runs / name), final_weights(expected)) < 1e-3
    for kind in ("train", "eval"):
        for ours, theirs in zip(rows(runs / name, kind), rows(expected, kind), strict=True):
            for measure in ("loss/reward", "loss/policy", "accuracy/reward", "margin/implicit"):
                assert ours[measure] == pytest.approx(theirs[measure], abs=1e-4), (kind, ours["step"], measure)
            for measure in ours.keys() & {"loss/attributes", "r2/vowels", "spearman/length"}:
                assert ours[measure] == pytest.approx(theirs[measure], rel=1e-3, abs=1e-3)


def test_attributes_start_at_their_means_and_are_learned(runs):
    """And a run of the same rows that names none has nothing of them."""
    first, last = rows(runs / "attributes", "eval")[0], rows(runs / "attributes", "eval")[-1]
    assert {name for name in last.keys() - rows(runs / "one", "eval")[-1].keys()} == {
        "loss/attributes",
        *(f"{kind}/{name}" for kind in ("r2", "spearman") for name in ("vowels", "length")),
    }
    assert -0.1 < first["r2/length"] < 0.01 and last["r2/length"] > first["r2/length"]
    assert last["loss/attributes"] < first["loss/attributes"]
    train = rows(runs / "attributes", "train")[0]
    parts = train["loss/reward"] + 0.2 * train["loss/policy"] + 0.05 * train["loss/attributes"]
    assert train["loss/total"] == pytest.approx(parts, rel=1e-5)
    assert not list((runs / "one/final").glob("attribute*"))
    assert final_weights(runs / "attributes").keys() - final_weights(runs / "one").keys() == {
        "attribute_head.weight",
        "attribute_head.bias",
    }


def test_the_objectives_differ(runs):
    losses = [rows(runs / name, "train")[0]["loss/reward"] for name in ("one", "by comparison", "plackett-luce")]
    assert len({round(loss, 4) for loss in losses}) == 3


def test_a_stopped_run_is_resumed_under_another_stage(runs):
    assert largest_difference(final_weights(runs / "stopped"), final_weights(runs / "attributes, zero3")) < 1e-3
    steps = [row["step"] for row in rows(runs / "stopped", "train")]
    assert steps == list(range(1, STEPS + 1))


def test_the_reference_pass_stores_each_answer_once_on_any_number_of_ranks(runs):
    one, two = (stored_values(runs / f"store of {ranks}") for ranks in (1, 2))
    assert one.keys() == two.keys()
    values = [torch.tensor([store[key] for key in one]) for store in (one, two)]
    assert (values[0] - values[1]).abs().max() < 1e-4
