"""A reference pass that is killed again and again ends with the store of an undisturbed one.

HAFRM_KILLS sets how many times, 3 by default:

    HAFRM_KILLS=50 python -m pytest -s tests/distributed/test_reference_kills.py
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.distributed.launching import REPOSITORY, as_options, free_port, write_pairs
from tests.distributed.test_reference import stored
from tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.distributed

KILLS = int(os.environ.get("HAFRM_KILLS", "3"))
NUM_PAIRS = 400


def start_pass(store: Path, folder: Path) -> list[subprocess.Popen]:
    """Two ranks of a pass that writes a shard every few micro-batches."""
    options = {
        "output_dir": folder / "unused",
        "deepspeed": "ds_configs/zero3.json",
        "model.name_or_path": folder / "model",
        "model.dtype": "float32",
        "data.train": folder / "pairs.jsonl",
        "data.max_length": 100,
        "batch.max_tokens_per_micro_batch": 120,
        "reference.store": store,
        "reference.flush_seconds": 0.05,
    }
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        subprocess.Popen(
            [sys.executable, "launch/precompute_reference.py", *as_options(options)],
            cwd=REPOSITORY,
            env=os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=(folder / f"rank{rank}.log").open("w"),
        )
        for rank in (0, 1)
    ]


def wait(ranks: list[subprocess.Popen], seconds: float, until=lambda: False) -> bool:
    """Wait until all ranks have ended or the condition holds; True if they have ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not until():
        if all(rank.poll() is not None for rank in ranks):
            return True
        time.sleep(0.01)
    return False


def shards(store: Path) -> int:
    return len(list(store.glob("*/*.arrow")))


def test_killed_passes_finish_with_the_same_store(tmp_path):
    save_tiny_model(tmp_path / "model")
    write_pairs(tmp_path / "pairs.jsonl", NUM_PAIRS)
    undisturbed = tmp_path / "undisturbed"
    ranks = start_pass(undisturbed, tmp_path)
    wait(ranks, 120, until=lambda: shards(undisturbed) > 0)
    started = time.monotonic()
    assert wait(ranks, 300)
    writing = time.monotonic() - started
    assert [rank.returncode for rank in ranks] == [0, 0], (tmp_path / "rank0.log").read_text()
    expected = stored(undisturbed)
    assert len(expected) == 2 * NUM_PAIRS

    source = random.Random(0)
    kills, finished, worst = 0, 0, 0.0
    while kills < KILLS or finished == 0:
        store = tmp_path / f"store-{finished}"
        ranks = start_pass(store, tmp_path)
        if kills < KILLS:
            # Anywhere from the start of computing to its end; one kill in five while the model is loaded.
            before = shards(store)
            if source.random() > 0.2:
                wait(ranks, 120, until=lambda store=store, before=before: shards(store) > before)
            ended = wait(ranks, source.uniform(0, writing))
        else:
            ended = wait(ranks, 300)
        if not ended:
            source.choice(ranks).send_signal(signal.SIGKILL)
            kills += 1
            time.sleep(source.uniform(0, 0.5))
            for rank in ranks:
                rank.kill()
                rank.wait()
            continue
        assert [rank.returncode for rank in ranks] == [0, 0], (tmp_path / "rank0.log").read_text()
        actual = stored(store)
        assert actual.keys() == expected.keys()
        pair = torch.tensor([(actual[key], expected[key]) for key in expected], dtype=torch.float64)
        worst = max(worst, ((pair[:, 0] - pair[:, 1]).abs() / pair[:, 1].abs()).max().item())
        finished += 1
    print(f"{kills} kills, {finished} finished stores, largest relative difference of a value {worst:.2g}")
    assert worst < 1e-5
