"""A run that is killed again and again, at any moment and during saves, ends as the run that was not; a disk that is
full ends it with one message and leaves the checkpoint before.

HAFRM_KILLS sets how many times each of the chosen combinations is killed at a random moment, 1 by default, and
HAFRM_SAVE_KILLS how many times a run is killed while it saves; with HAFRM_KILLS every stage and dtype is run:

    HAFRM_KILLS=5 HAFRM_SAVE_KILLS=30 python -m pytest -s tests/distributed/test_resume_faults.py
"""

import os
import random
import re
import time
from pathlib import Path

import pytest
import torch

from hafrm_ds.engine.checkpoint import damaged_file, read_manifest, saved_steps
from tests.distributed.forked_ranks import Ranks
from tests.distributed.launching import as_options, rows, write_pairs
from tests.distributed.test_reference_faults import mounted
from tests.distributed.test_resume import COMBINATIONS, assert_same_run
from tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.distributed

STEPS, SAVED_EVERY = 40, 3
KILLS, SAVE_KILLS = (int(os.environ.get(name, "1")) for name in ("HAFRM_KILLS", "HAFRM_SAVE_KILLS"))


def start(folder: Path, name: str, stage: int, dtype: str, every_steps: int) -> Ranks:
    options = {
        "output_dir": folder / name,
        "deepspeed": f"ds_configs/zero{stage}.json",
        "max_steps": STEPS,
        "model.name_or_path": folder / "model",
        "model.dtype": dtype,
        "data.train": folder / "train.jsonl",
        "data.eval": f"{{held_out: {folder / 'test.jsonl'}}}",
        "data.max_length": 120,
        "batch.global_batch_size": 8,
        "batch.max_tokens_per_micro_batch": 150,
        "optimizer.learning_rate": 1e-3,
        "optimizer.reward_head_learning_rate": 5e-3,
        "evaluation.every_steps": 10,
        "checkpoint.every_steps": every_steps,
        "reference.store": folder / "store",
        "logging.tensorboard": "false",
        "logging.report": "false",
        "resume": "auto",
    }
    return Ranks("launch/train.py", as_options(options), folder / f"{name.replace('/', '-')}.log")


def steps_logged(run: Path) -> int:
    return len(rows(run, "train")) if (run / "metrics.jsonl").exists() else 0


def wait_for_steps(ranks: Ranks, run: Path, number: int) -> None:
    """Wait until so many steps are in the file that this start, not an earlier one, writes."""
    metrics = run / "metrics.jsonl"

    def file_number() -> int:
        return metrics.stat().st_ino if metrics.exists() else 0

    before = file_number()
    ranks.wait(120, until=lambda: file_number() not in (0, before) and steps_logged(run) >= number)


def optimizer_state(run: Path) -> list[torch.Tensor]:
    """Every tensor that DeepSpeed has saved in the last checkpoint, in order."""
    folder = next(iter(saved_steps(run / "checkpoints").values())) / "deepspeed"
    tensors: list[torch.Tensor] = []

    def collect(value) -> None:
        if isinstance(value, torch.Tensor):
            tensors.append(value)
        elif isinstance(value, dict):
            for part in value.values():
                collect(part)
        elif isinstance(value, list | tuple):
            for part in value:
                collect(part)

    for path in sorted(folder.iterdir()):
        collect(torch.load(path, map_location="cpu", weights_only=False))
    return tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    save_tiny_model(folder / "model")
    write_pairs(folder / "train.jsonl", 60)
    write_pairs(folder / "test.jsonl", 10, seed=1)
    start(folder, "filling-the-store", 3, "float32", 0).finish()
    return folder


def straight_run(folder: Path, stage: int, dtype: str) -> tuple[Path, float]:
    """A run that nothing disturbs, and about how long a step takes in seconds."""
    run = folder / f"straight-{stage}-{dtype}"
    ranks = start(folder, run.name, stage, dtype, every_steps=SAVED_EVERY)
    ranks.wait(120, until=lambda: steps_logged(run) > 0)
    started = time.monotonic()
    ranks.finish()
    return run, (time.monotonic() - started) / STEPS


@pytest.mark.parametrize(
    ("stage", "dtype"), COMBINATIONS if "HAFRM_KILLS" in os.environ else [(3, "bfloat16")], ids=str
)
def test_killed_at_random_moments_and_resumed_is_the_straight_run(folder, stage, dtype):
    straight, seconds_a_step = straight_run(folder, stage, dtype)
    source, run, resumed_from = random.Random(stage), folder / f"killed-{stage}-{dtype}", []
    for _ in range(KILLS):
        resumed_from.append(next(iter(saved_steps(run / "checkpoints")), 0))
        ranks = start(folder, run.name, stage, dtype, every_steps=SAVED_EVERY)
        # One kill in five comes while the run starts.
        if source.random() > 0.2:
            wait_for_steps(ranks, run, resumed_from[-1] + source.randrange(2 * STEPS // (KILLS + 1)))
        ranks.wait(source.uniform(0, 2 * seconds_a_step))
        ranks.kill(source.randrange(2), 0.1)
    resumed_from.append(next(iter(saved_steps(run / "checkpoints")), 0))
    start(folder, run.name, stage, dtype, every_steps=SAVED_EVERY).finish()
    print(f"ZeRO {stage}, {dtype}: {KILLS} kills, the starts resumed from the steps {resumed_from}")
    assert_same_run(run, straight)
    pairs = list(zip(optimizer_state(run), optimizer_state(straight), strict=True))
    assert pairs and all(torch.equal(*pair) for pair in pairs)


def test_killed_during_saves_the_newest_whole_checkpoint_loads(folder):
    """Every step is saved, and the kill comes while a draft is there."""
    source, run, kills = random.Random(0), folder / "saving", 0
    while kills < SAVE_KILLS:
        ranks = start(folder, run.name, 3, "float32", every_steps=1)
        root = run / "checkpoints"
        newest = next(iter(saved_steps(root)), 0)
        ended = ranks.wait(
            120,
            until=lambda newest=newest, root=root: next(iter(saved_steps(root)), 0) > newest and list(root.glob(".*")),
        )
        time.sleep(source.uniform(0, 0.03))
        if ended:  # all steps are done: begin again
            ranks.finish()
            run = folder / f"saving-{kills}"
            continue
        ranks.kill(source.randrange(2), 0.1)
        kills += 1
        folder_of_newest = next(iter(saved_steps(root).values()))
        assert damaged_file(folder_of_newest, read_manifest(folder_of_newest).items()) is None
    start(folder, run.name, 3, "float32", every_steps=1).finish()
    log = "".join(path.read_text() for path in folder.glob("saving*.log"))
    resumed = log.count("resuming after step")
    print(f"{kills} kills during saves: every newest checkpoint was whole, {resumed} starts from one of them")
    assert "is passed over" not in log
    assert [row["step"] for row in rows(run, "train")] == list(range(1, STEPS + 1))


def test_a_full_disk_ends_all_ranks_with_one_message_and_the_checkpoint_before_is_good(folder):
    """The first checkpoint fits, and for the second there is too little space. (One that fits by its estimate and then
    fails on one rank is among the faults of test_resume.)"""
    disk = folder / "disk"
    with mounted(disk, "size=500k"):
        ranks = start(folder, f"{disk.name}/run", 3, "float32", every_steps=1)
        assert ranks.wait(120)
        assert ranks.statuses == [1, 1]
        output = ranks.log.read_text()
        assert output.count("error: ") == 1 and "Traceback" not in output, output[-4000:]
        said = r"needs about [\d,]+ bytes, and .* has [\d,]+ free: make room.* \(the one after step 1 is good\)"
        assert re.search(said, output)
        root = disk / "run/checkpoints"
        assert list(saved_steps(root)) == [1] and not list(root.glob(".step*"))
        assert damaged_file(root / "step-000001", read_manifest(root / "step-000001").items()) is None
