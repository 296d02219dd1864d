"""Stopped and resumed equals uninterrupted: for every stage and dtype, on other numbers of ranks and other stages.

Every run has a learning rate of its own for the reward head: groups that lose their options are noticed only so.
"""

import json
import re
from pathlib import Path

import pytest
import torch

from tests.distributed.launching import as_options, launch, rows, write_pairs
from tests.distributed.test_training import final_weights, largest_difference
from tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.distributed

STEPS, STOP = 8, 5
COMBINATIONS = [(stage, dtype) for dtype in ("float32", "bfloat16") for stage in range(4)]
CHANGES = {  # name -> (ranks, stage) before, (ranks, stage) after
    **{f"2 to 1 ranks, stage {stage}": ((2, stage), (1, stage)) for stage in range(4)},
    **{f"1 to 2 ranks, stage {stage}": ((1, stage), (2, stage)) for stage in range(4)},
    **{f"stage {a} to {b}": ((2, a), (2, b)) for a in (1, 2, 3) for b in (1, 2, 3) if a != b},
    "stage 3 to 2, 2 to 1 ranks": ((2, 3), (1, 2)),
    "stage 2 to 3, 1 to 2 ranks": ((1, 2), (2, 3)),
}
MEASURED = ("seconds", "tokens_per_second", "pairs_per_second", "mfu", "memory_gib")


def compared_rows(run: Path) -> list[dict]:
    """All rows of training and evaluation, without what depends on the machine."""
    all_rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [
        {name: value for name, value in row.items() if name not in MEASURED}
        for row in all_rows
        if row["kind"] in ("train", "eval")
    ]


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    model = save_tiny_model(folder / "model")
    gather_all = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    (folder / "gather_all.json").write_text(json.dumps(gather_all))
    train_file, test_file = write_pairs(folder / "train.jsonl", 60), write_pairs(folder / "test.jsonl", 10, seed=1)

    def options(name: str, stage: int, dtype: str = "float32", **changes) -> list[str]:
        chosen = {
            "output_dir": folder / name,
            "deepspeed": f"ds_configs/zero{stage}.json",
            "max_steps": STEPS,
            "model.name_or_path": model,
            "model.dtype": dtype,
            "data.train": train_file,
            "data.eval": f"{{held_out: {test_file}}}",
            "data.max_length": 120,
            "batch.global_batch_size": 8,
            "batch.max_tokens_per_micro_batch": 150,
            "optimizer.learning_rate": 3e-3,
            "optimizer.reward_head_learning_rate": 1e-2,
            "optimizer.weight_decay": 0.01,
            "evaluation.every_steps": 4,
            "reference.store": folder / "store",
            "logging.tensorboard": "false",
            "resume": "auto",
        } | {key.replace("__", "."): value for key, value in changes.items()}
        return as_options(chosen)

    return folder, options


def run_cases(num_ranks: int, cases: list) -> str:
    result = launch(num_ranks, "tests/distributed/resume_cases.py", json.dumps(cases), timeout=900)
    assert result.returncode == 0, result.stdout[-6000:]
    return result.stdout


@pytest.fixture(scope="module")
def runs(setting) -> tuple[Path, str]:
    """Straight runs on one and two ranks; runs that are stopped after STOP steps; and their second halves."""
    folder, options = setting
    stop = [STOP, 0, "SIGTERM"]

    def name(kind: str, stage: int, dtype: str) -> str:
        return f"{kind}-{stage}-{dtype}"

    run_cases(1, [[options(case, stage), stop] for case, ((ranks, stage), _) in CHANGES.items() if ranks == 1])
    on_two = [[options(name("straight", *pair), *pair), None] for pair in COMBINATIONS]
    for number, pair in enumerate(COMBINATIONS):
        # Also the other rank, the other signals, and the step that is followed by an evaluation.
        where = [STOP - number % 2, number % 2, ("SIGTERM", "SIGINT", "SIGUSR1")[number % 3]]
        on_two += [[options(name("resumed", *pair), *pair), where], [options(name("resumed", *pair), *pair), None]]
    gathered = {"deepspeed": folder / "gather_all.json"}
    on_two += [[options("gathered", 3, **gathered), stop], [options("gathered", 3, **gathered), None]]
    on_two += [[options(case, stage), stop] for case, ((ranks, stage), _) in CHANGES.items() if ranks == 2]
    on_two += [[options(case, stage), None] for case, (_, (ranks, stage)) in CHANGES.items() if ranks == 2]
    output = run_cases(2, on_two)
    run_cases(1, [[options(case, stage), None] for case, (_, (ranks, stage)) in CHANGES.items() if ranks == 1])
    return folder, output


@pytest.mark.parametrize(("stage", "dtype"), COMBINATIONS)
def test_a_resumed_run_is_the_straight_run_bit_for_bit(runs, stage, dtype):
    folder, _ = runs
    straight, resumed = (folder / f"{kind}-{stage}-{dtype}" for kind in ("straight", "resumed"))
    assert len(rows(straight, "train")) == STEPS
    assert len(rows(resumed, "check")) == 1, "the reference is checked again, and logged once"
    assert compared_rows(resumed) == compared_rows(straight)
    expected, actual = final_weights(straight), final_weights(resumed)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("change", [*CHANGES, "gathered"])
def test_other_ranks_and_stages_go_on_with_the_same_losses(runs, change):
    folder, _ = runs
    losses = [
        torch.tensor([row["loss/total"] for row in rows(folder / name, "train")])
        for name in ("straight-3-float32", change)
    ]
    assert len(losses[1]) == STEPS
    difference = ((losses[1] - losses[0]).abs() / losses[0].abs()).max().item()
    print(f"{change}: largest relative difference of a loss {difference:.2g}")
    assert difference < 1e-5
    assert largest_difference(final_weights(folder / change), final_weights(folder / "straight-3-float32")) < 1e-4


def test_what_stopped_a_run_is_a_file_until_it_goes_on(runs):
    folder, output = runs
    assert not (folder / "resumed-3-float32/stopped.json").exists()
    assert re.search("going on after step 5 from .*, written under ZeRO stage 3", output)
