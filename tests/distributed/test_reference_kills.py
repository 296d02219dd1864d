"""A reference pass that is killed again and again ends with the store of an undisturbed one.

HAFRM_KILLS sets how many times, 3 by default:

    HAFRM_KILLS=50 python -m pytest -s tests/distributed/test_reference_kills.py
"""

import os
import random
import time
from pathlib import Path

import pytest
import torch

from tests.distributed.forked_ranks import Ranks
from tests.distributed.launching import as_options, write_pairs
from tests.distributed.test_reference import stored
from tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.distributed

KILLS = int(os.environ.get("HAFRM_KILLS", "3"))
NUM_PAIRS = 400


def start_pass(store: Path, folder: Path) -> Ranks:
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
    return Ranks("launch/precompute_reference.py", as_options(options), folder / "log")


def shards(store: Path) -> int:
    return len(list(store.glob("*/*.arrow")))


def test_killed_passes_finish_with_the_same_store(tmp_path):
    save_tiny_model(tmp_path / "model")
    write_pairs(tmp_path / "pairs.jsonl", NUM_PAIRS)
    undisturbed = tmp_path / "undisturbed"
    ranks = start_pass(undisturbed, tmp_path)
    ranks.wait(120, until=lambda: shards(undisturbed) > 0)
    started = time.monotonic()
    ranks.finish()
    writing = time.monotonic() - started
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
                ranks.wait(120, until=lambda store=store, before=before: shards(store) > before)
            if not ranks.wait(source.uniform(0, writing)):
                ranks.kill(source.randrange(2), source.uniform(0, 0.5))
                kills += 1
                continue
        ranks.finish()
        actual = stored(store)
        assert actual.keys() == expected.keys()
        pair = torch.tensor([(actual[key], expected[key]) for key in expected], dtype=torch.float64)
        worst = max(worst, ((pair[:, 0] - pair[:, 1]).abs() / pair[:, 1].abs()).max().item())
        finished += 1
    print(f"{kills} kills, {finished} finished stores, largest relative difference of a value {worst:.2g}")
    assert worst < 1e-5
