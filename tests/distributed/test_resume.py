"""Stopped and resumed equals uninterrupted: for every stage and dtype, on other numbers of ranks and other stages.

Every run has a learning rate of its own for the reward head: groups that lose their options are noticed only so.
HAFRM_RESUME=all tries every change of ranks and stage, and prints the differences:

    HAFRM_RESUME=all python -m pytest -s tests/distributed/test_resume.py
"""

import filecmp
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hafrm_ds.engine.checkpoint import CheckpointError
from hafrm_ds.errors import ModelError
from hafrm_ds.evaluation.pair_scores import load_all
from hafrm_ds.training.final import export_checkpoint
from tests.distributed.forked_ranks import run_cases
from tests.distributed.launching import TINY_RUN, as_options, rows, write_pairs
from tests.distributed.test_training import final_weights, largest_difference
from tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.distributed

STEPS, STOP = 8, 5
PATIENCE = 2
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")
COMBINATIONS = [(stage, dtype) for dtype in ("float32", "bfloat16") for stage in range(4)]
ALL = os.environ.get("HAFRM_RESUME") == "all"
# Name -> (ranks, stage) before, (ranks, stage) after, dtype.
CHANGES = {
    **{
        f"{a} to {b} ranks, stage {stage}": ((a, stage), (b, stage), "float32")
        for a, b in ((2, 1), (1, 2))
        for stage in range(4)
        if ALL or (a, stage) in ((2, 0), (2, 3), (1, 2))
    },
    **{
        f"stage {a} to {b}, {dtype}": ((2, a), (2, b), dtype)
        for dtype in ("float32", "bfloat16")
        for a, b in ((3, 2), (1, 3), (2, 3), (3, 1), (1, 2), (2, 1))
        if ALL or (a, b) in (((3, 2), (2, 3)) if dtype == "float32" else ((3, 1), (1, 3)))
    },
    "stage 3 to 2, 2 to 1 ranks": ((2, 3), (1, 2), "float32"),
    "stage 2 to 3, 1 to 2 ranks": ((1, 2), (2, 3), "float32"),
}
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
"""Largest relative difference of a loss from that of a straight run under stage 3."""
MEASURED = ("seconds", "tokens_per_second", "pairs_per_second", "mfu", "mfu_measured", "memory_gib")


def compared_rows(run: Path) -> list[dict]:
    """All rows of training and evaluation, without what depends on the machine."""
    all_rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [
        {name: value for name, value in row.items() if name not in MEASURED}
        for row in all_rows
        if row["kind"] in ("train", "eval")
    ]


def assert_same_run(actual: Path, expected: Path) -> None:
    """Rows of metrics and final weights, bit for bit."""
    assert compared_rows(actual) == compared_rows(expected)
    ours, theirs = final_weights(actual), final_weights(expected)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    model = save_tiny_model(folder / "model")
    gather_all = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    (folder / "gather_all.json").write_text(json.dumps(gather_all))
    sub_groups = {"zero_optimization": {"stage": 3, "sub_group_size": 1000}}
    (folder / "sub_groups.json").write_text(json.dumps(sub_groups))
    round_robin = {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}
    (folder / "round_robin.json").write_text(json.dumps(round_robin))
    train_file, test_file = write_pairs(folder / "train.jsonl", 60), write_pairs(folder / "test.jsonl", 10, seed=1)

    def options(name: str, stage: int, dtype: str = "float32", **changes) -> list[str]:
        chosen = TINY_RUN | {
            "output_dir": folder / name,
            "deepspeed": f"ds_configs/zero{stage}.json",
            "max_steps": STEPS,
            "model.name_or_path": model,
            "model.dtype": dtype,
            "data.train": train_file,
            "data.eval": f"{{held_out: {test_file}}}",
            "optimizer.learning_rate": 3e-3,
            "optimizer.reward_head_learning_rate": 1e-2,
            "optimizer.weight_decay": 0.01,
            "evaluation.every_steps": 4,
            "reference.store": folder / "store",
        }
        return as_options(chosen, **changes)

    return folder, options


def refusals(folder: Path, options) -> dict[str, tuple[list, str]]:
    """Name -> (case that resumes from the checkpoint of "to be refused", pattern of its message)."""

    def resumed(name: str = "to be refused", stage: int = 3, **changes) -> list:
        return [options(name, stage, **changes), "refused"]

    other_pairs = write_pairs(folder / "other.jsonl", 60, seed=9)
    checkpoint = folder / "to be refused/checkpoints/step-000005"
    of_stage_2 = {"resume": folder / "resumed-2-float32/checkpoints/latest"}
    return {
        "options": (
            resumed(seed=4, optimizer__learning_rate=1e-3),
            r"other options: - optimizer.learning_rate: 0.003 there, 0.001 here - seed: 0 there, 4 here",
        ),
        "start weights": (
            resumed(model__name_or_path=save_tiny_model(folder / "other model", "llama")),
            r"model.name_or_path: the start weights are those of \w+\S* here, of \w+\S* there",
        ),
        "pairs": (resumed(data__train=other_pairs), r"data.train: the pairs of 'train' have changed"),
        "stage 0": (resumed(stage=0), r"written under ZeRO stage 3, and this run has stage 0"),
        "another order of shards": (
            resumed("refused", 2, deepspeed=folder / "round_robin.json", **of_stage_2),
            r"with zero_optimization.round_robin_gradients .* only under the DeepSpeed JSON",
        ),
        "missing reference": (
            resumed(reference__store=folder / "empty store", reference__on_missing="stop"),
            r"lacks 140 of 140 .* Run launch/precompute_reference.py with this config",
        ),
        "no such checkpoint": (resumed(resume=folder / "none"), r"none cannot be resumed: its manifest.json"),
        "a folder with a run": (resumed(resume="none"), r"already holds a run .* --resume auto"),
        "a full disk": (
            [options("to be refused", 3, checkpoint__every_steps=1, resume=checkpoint), [7, 1, 4096]],
            r"could not be saved: rank 1 cannot write its part: File too large \(the one after step 6 is good\)",
        ),
    }


@pytest.fixture(scope="module")
def runs(setting) -> tuple[Path, dict[int, str]]:
    """Straight runs on one and two ranks; runs that are stopped after STOP steps; and their second halves."""
    folder, options = setting
    stop = [STOP, 0, "SIGTERM"]

    def changed(place: int, num_ranks: int, fault: list | None) -> list:
        """The halves before (0) or after (1) a change that run on so many ranks."""
        ways = ((name, (before, after)[place], dtype) for name, (before, after, dtype) in CHANGES.items())
        return [[options(name, stage, dtype), fault] for name, (ranks, stage), dtype in ways if ranks == num_ranks]

    run_cases(1, changed(0, 1, stop))
    at_the_end = {"checkpoint__every_steps": STEPS}
    cases = [[options(f"straight-{stage}-{dtype}", stage, dtype, **at_the_end), None] for stage, dtype in COMBINATIONS]
    for number, (stage, dtype) in enumerate(COMBINATIONS):
        # Also the other rank, the other signals, and the step that an evaluation follows, and inside that.
        where = [STOP - number % 2, number % 2, SIGNALS[number % 3] + " evaluating" * (number % 4 == 1)]
        run = options(f"resumed-{stage}-{dtype}", stage, dtype)
        cases += [[run, where], [run, None]]
    gathered = {"deepspeed": folder / "gather_all.json"}
    cases += [[options("gathered", 3, **gathered), stop], [options("gathered", 3, **gathered), None]]
    in_turns = {"deepspeed": folder / "round_robin.json"}
    cases += [[options("in turns", 2, **in_turns), stop], [options("in turns", 2, **in_turns), None]]
    cases += changed(0, 2, stop) + changed(1, 2, None)
    patient = {"evaluation__every_steps": 1, "evaluation__patience": PATIENCE, "checkpoint__final": "best"}
    cases += [[options(f"patient-{stage}", stage, **patient), None] for stage in (0, 3)]
    cases += [[options("patient, resumed", 3, **patient), fault] for fault in ([2, 1, "SIGTERM"], None)]
    cases += [[options("to be refused", 3), stop]]
    refused_from = len(cases)
    cases += [case for case, _ in refusals(folder, options).values()]
    # On from the checkpoint of another run: the same stage lays its shards out otherwise and the store is lost, or
    # gradients are clipped harder.
    stopped = {"resume": folder / "resumed-3-float32/checkpoints/latest", "reference__store": folder / "another store"}
    cases += [[options("sub-groups", 3, deepspeed=folder / "sub_groups.json", **stopped), None]]
    stopped = {"resume": folder / "resumed-2-float32/checkpoints/latest"}
    clipped = {"optimizer__max_gradient_norm": 1e-3, "checkpoint__allow_changed": "[optimizer.max_gradient_norm]"}
    cases += [[options("clipped harder", 2, **stopped, **clipped), None]]
    # What was refused has harmed nothing; an option may change by name, and the start weights may be moved.
    allowed = {"optimizer__learning_rate": 1e-3, "checkpoint__allow_changed": "[optimizer.learning_rate]"}
    allowed |= {"model__name_or_path": shutil.copytree(folder / "model", folder / "moved model")}
    cases += [[options("to be refused", 3, **allowed), None]]
    output = run_cases(2, cases)
    run_cases(1, changed(1, 1, None))
    refused = re.findall(r"^refused (\d+): (.*)$", output, re.MULTILINE)
    return folder, {int(number) - refused_from: message for number, message in refused}


@pytest.mark.parametrize(("stage", "dtype"), COMBINATIONS)
def test_a_resumed_run_is_the_straight_run_bit_for_bit(runs, stage, dtype):
    folder, _ = runs
    straight, resumed = (folder / f"{kind}-{stage}-{dtype}" for kind in ("straight", "resumed"))
    assert len(rows(straight, "train")) == STEPS
    assert len(rows(resumed, "check")) == 1, "the reference is checked again, and logged once"
    assert_same_run(resumed, straight)


@pytest.mark.parametrize(("stage", "dtype"), COMBINATIONS)
def test_the_last_checkpoint_is_exported_as_final_bit_for_bit(runs, tmp_path, stage, dtype):
    folder, _ = runs
    straight = folder / f"straight-{stage}-{dtype}"
    assert export_checkpoint(straight / "checkpoints/latest", tmp_path / "export") == STEPS
    assert_same_files(tmp_path / "export", straight / "final")


def assert_same_files(actual: Path, expected: Path) -> None:
    names = [sorted(str(file.relative_to(folder)) for file in folder.rglob("*")) for folder in (actual, expected)]
    assert names[0] == names[1]
    files = [name for name in names[0] if (expected / name).is_file()]
    _, different, unreadable = filecmp.cmpfiles(actual, expected, files, shallow=False)
    assert not different and not unreadable


def test_an_export_of_a_checkpoint_needs_the_weights_that_the_run_started_from(runs, tmp_path):
    folder, _ = runs
    straight = folder / "straight-3-float32"
    checkpoint = straight / "checkpoints/latest"
    other = save_tiny_model(tmp_path / "other", "llama")
    with pytest.raises(CheckpointError, match=r"trained from other weights than .*other holds: give --base"):
        export_checkpoint(checkpoint, tmp_path / "export", base=str(other))
    with pytest.raises(ModelError, match=r"step-000008 started from are needed \(--base\)"):
        export_checkpoint(checkpoint, tmp_path / "export", base=str(tmp_path / "none"))
    moved = shutil.copytree(folder / "model", tmp_path / "moved")
    export_checkpoint(checkpoint, tmp_path / "export", base=str(moved))
    expected, actual = final_weights(straight), load_file(tmp_path / "export/model.safetensors")
    assert all(torch.equal(expected[name], actual[name]) for name in actual)
    with pytest.raises(ModelError, match=r"export is already there"):
        export_checkpoint(checkpoint, tmp_path / "export")
    shutil.copytree(checkpoint.resolve(), tmp_path / "step-000008")
    (file,) = (tmp_path / "step-000008").glob("deepspeed/*rank_1*optim*")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"step-000008 is no whole checkpoint: deepspeed/.* bytes instead of"):
        export_checkpoint(tmp_path / "step-000008", tmp_path / "none")


@pytest.mark.parametrize("name", ["patient-0", "patient-3"])
def test_a_run_ends_when_patience_is_lost_and_final_is_the_best_step(runs, tmp_path, name):
    folder, _ = runs
    run = folder / name
    summary = json.loads((run / "summary.json").read_text())
    values = {row["step"]: row["accuracy/reward"] for row in rows(run, "eval") if row["step"]}
    best = max(values, key=lambda step: (values[step], -step))
    assert best + PATIENCE == max(values) < STEPS, values
    assert (summary["steps"], summary["final_step"], summary["ended_early"]) == (best + PATIENCE, best, True)
    assert {scores.step for scores in load_all(run / "evaluation").values()} == {best}
    assert export_checkpoint(run / f"checkpoints/step-{best:06}", tmp_path / "best") == best
    assert_same_files(tmp_path / "best", run / "final")
    export_checkpoint(folder / "patient, resumed/checkpoints/latest", tmp_path / "later")
    assert not torch.equal(
        *(load_file(tmp_path / side / "reward_head.safetensors")["weight"] for side in ("best", "later"))
    )


def test_patience_survives_a_stop(runs):
    folder, _ = runs
    straight, resumed = folder / "patient-3", folder / "patient, resumed"
    assert_same_run(resumed, straight)


@pytest.mark.parametrize("change", [*CHANGES, "gathered", "in turns"])
def test_other_ranks_and_stages_go_on_with_the_same_losses(runs, change):
    folder, _ = runs
    dtype = CHANGES[change][2] if change in CHANGES else "float32"
    straight = folder / f"straight-3-{dtype}"
    losses = [torch.tensor([row["loss/total"] for row in rows(run, "train")]) for run in (straight, folder / change)]
    assert len(losses[1]) == STEPS
    difference = ((losses[1] - losses[0]).abs() / losses[0].abs()).max().item()
    print(f"{change}: largest relative difference of a loss {difference:.2g}")
    assert difference < TOLERANCE[dtype]
    assert largest_difference(final_weights(folder / change), final_weights(straight)) < 10 * TOLERANCE[dtype]


def test_other_settings_of_a_stage_go_on_with_the_same_losses(runs):
    """Although the reference log-probs are computed anew: the weights are those of the start at that time."""
    folder, _ = runs
    before, after = losses_of_both(folder / "resumed-3-float32", folder / "sub-groups")
    assert after == pytest.approx(before, rel=TOLERANCE["float32"])


def losses_of_both(straight: Path, resumed: Path) -> tuple[list[float], list[float]]:
    """Losses of the steps that a run has made after it was resumed, and of the same in the run that it comes from."""
    found = [{row["step"]: row["loss/total"] for row in rows(run, "train")} for run in (straight, resumed)]
    steps = sorted(found[1])
    assert 3 <= len(steps) < STEPS == steps[-1]
    return [found[0][step] for step in steps], [found[1][step] for step in steps]


def test_gradients_are_clipped_as_the_resumed_run_says(runs):
    folder, _ = runs
    before, after = losses_of_both(folder / "resumed-2-float32", folder / "clipped harder")
    assert after[0] == before[0]
    assert all(abs(a - b) > 10 * TOLERANCE["float32"] * b for a, b in zip(after[1:], before[1:]))


def test_what_does_not_fit_is_refused_by_one_message_that_names_it(setting, runs):
    folder, options = setting
    _, messages = runs
    table = refusals(folder, options)
    assert len(messages) == len(table), messages
    for number, (name, (_, pattern)) in enumerate(table.items()):
        assert re.search(pattern, messages[number]), (name, messages[number])


def test_a_refused_run_is_as_it_was_and_can_be_resumed(runs):
    folder, _ = runs
    run = folder / "to be refused"
    assert [row["step"] for row in rows(run, "train")] == list(range(1, STEPS + 1))
    assert not (run / "stopped.json").exists()
    assert not list((run / "checkpoints").glob(".*")), "the draft of a failed save"
    straight = rows(folder / "straight-3-float32", "train")
    # The full disk came after step 7, and the last start resumed from step 6 under another learning rate.
    rates = [row["learning_rate"] / other["learning_rate"] for row, other in zip(rows(run, "train"), straight)]
    assert rates == pytest.approx([1] * 6 + [1 / 3] * 2)
