"""Reference passes through the launcher when something is wrong with the store, the weights or the disk."""

import os
import re
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.distributed.forked_ranks import Ranks, run_ranks
from tests.distributed.launching import as_options, launch, write_pairs
from tests.distributed.test_reference import computed, stored
from tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.distributed

PASS = "launch/precompute_reference.py"
NUM_PAIRS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    save_tiny_model(folder / "model")
    write_pairs(folder / "pairs.jsonl", NUM_PAIRS)
    return folder


def options(folder: Path, store: Path, **changes) -> list[str]:
    chosen = {
        "output_dir": folder / "unused",
        "deepspeed": "ds_configs/zero3.json",
        "model.name_or_path": folder / "model",
        "model.dtype": "float32",
        "data.train": folder / "pairs.jsonl",
        "data.max_length": 120,
        "batch.max_tokens_per_micro_batch": 150,
        "reference.store": store,
        "reference.flush_seconds": 0.05,
    }
    return as_options(chosen, **changes)


def run_pass(folder: Path, store: Path, num_ranks: int = 2, **changes) -> str:
    """Returns what it printed."""
    return run_ranks(num_ranks, PASS, *options(folder, store, **changes), seconds=240)


def test_two_jobs_fill_one_store_at_once(folder):
    alone, shared = folder / "alone", folder / "shared"
    run_pass(folder, alone, num_ranks=1)
    for job in [Ranks(PASS, options(folder, shared), folder / f"log {number}", 1) for number in range(2)]:
        job.finish()
    expected, actual = stored(alone), stored(shared)
    assert actual.keys() == expected.keys()
    torch.testing.assert_close(
        torch.tensor([actual[key] for key in expected]), torch.tensor(list(expected.values())), rtol=1e-5, atol=0
    )
    assert computed(run_pass(folder, shared, num_ranks=1)) == [0]


def test_other_weights_under_the_same_path_and_another_max_length_find_nothing_of_the_old(folder):
    store = folder / "changing"
    assert computed(run_pass(folder, store)) == [2 * NUM_PAIRS]
    shorter = run_pass(folder, store, data__max_length=40, data__max_dropped_share=1)
    (changed,) = computed(shorter)
    assert 0 < changed < 2 * NUM_PAIRS  # pairs that were short enough are the same pairs still
    assert "others of these weights: the data is new, or the chat template, data.max_length" in shorter
    file = folder / "model" / "model.safetensors"
    original = file.read_bytes()
    weights = load_file(file)
    weights["model.norm.weight"] *= 1.01
    save_file(weights, file, metadata={"format": "pt"})
    try:
        output = run_pass(folder, store)
    finally:
        file.write_bytes(original)
    assert computed(output) == [2 * NUM_PAIRS]
    assert "other weights" in output
    assert len(list(store.iterdir())) == 2
    assert computed(run_pass(folder, store)) == [0]


@contextmanager
def mounted(folder: Path, options: str):
    """A tmpfs at `folder`; skips the test where it cannot be mounted."""
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=False).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize(
    ("mount", "pattern"),
    [("size=24k", r"cannot be written: the disk is full. What was stored before is good"), ("ro", r"cannot be made")],
)
def test_a_full_or_read_only_disk_ends_all_ranks_with_one_message(folder, tmp_path, mount, pattern):
    with mounted(tmp_path / "small", mount):
        started = time.monotonic()
        result = launch(2, PASS, *options(folder, tmp_path / "small" / "store"), timeout=240)
        seconds = time.monotonic() - started
        assert result.returncode != 0
        assert result.stdout.count("\nerror: ") == 1, result.stdout[-4000:]
        assert re.search(pattern, result.stdout)
        assert "Traceback" not in result.stdout, result.stdout[-4000:]
        assert seconds < 120
        if mount != "ro":
            assert 0 < len(stored(tmp_path / "small" / "store")) < 2 * NUM_PAIRS
