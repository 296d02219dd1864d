"""Two and more GPUs against one, by the entry files under torchrun. All GPUs of the machine take part.

bash tests/gpu/run.sh tests/gpu/test_several_gpus.py
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from tests.distributed.launching import REPOSITORY, as_options, free_port, rows, write_pairs
from tests.distributed.test_reference import stored
from tests.distributed.test_training import final_weights, largest_difference
from tests.gpu.environment import IS_GPU
from tests.tiny_models import save_tiny_model

NUM_PROCESSES = torch.cuda.device_count() if IS_GPU else 2

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(NUM_PROCESSES < 2, reason="needs two GPUs and this machine has one"),
]

STEPS = 20
STAGES = (1, 2, 3)
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}
WEIGHT_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2}
"""Relative, for a weight to the largest of its tensor. bfloat16 weights round each step anew."""


@contextmanager
def torchrun(num_processes: int, script: str, options: dict) -> Iterator[tuple[subprocess.Popen, Path]]:
    """`torchrun --nproc_per_node N script options`, started, and the file that all it prints goes to."""
    command = ["-m", "torch.distributed.run", "--nproc_per_node", num_processes, "--master_port", free_port(), script]
    log = Path(f"{options['output_dir']}.log")
    with log.open("w") as file:
        launched = subprocess.Popen(
            [sys.executable, *map(str, command), *as_options(options)],
            cwd=REPOSITORY,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        yield launched, log
    finally:
        launched.terminate()  # what a failed test leaves running


def run(num_processes: int, script: str, options: dict) -> None:
    with torchrun(num_processes, script, options) as (launched, log):
        assert launched.wait(timeout=600) == 0, log.read_text()[-6000:]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """A function from the name of a run to its options; changes are given with __ for the dot."""
    folder = tmp_path_factory.mktemp("several_gpus")
    model = save_tiny_model(folder / "model")
    train_file, test_file = write_pairs(folder / "train.jsonl", 120), write_pairs(folder / "test.jsonl", 30, seed=1)
    # Parameters of fewer than 100,000 elements are never split unless told so, and this model has no others.
    gather_all = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    (folder / "zero3.json").write_text(json.dumps(gather_all))

    def named(name: str, stage: int, dtype: str, **changes) -> dict:
        return {
            "output_dir": folder / name,
            "deepspeed": folder / "zero3.json" if stage == 3 else f"ds_configs/zero{stage}.json",
            "max_steps": STEPS,
            "model.name_or_path": model,
            "model.dtype": dtype,
            "data.train": train_file,
            "data.eval": f"{{held_out: {test_file}}}",
            "data.max_length": 120,
            "batch.global_batch_size": max(8, 2 * NUM_PROCESSES),
            "batch.max_tokens_per_micro_batch": 150,
            "optimizer.learning_rate": 3e-3,
            "reference.store": folder / f"store-{name}",
        } | {key.replace("__", "."): value for key, value in changes.items()}

    return named


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def runs(request, options) -> tuple[str, Path, dict[int, Path]]:
    """(dtype, the run on one GPU, stage -> the run on all)."""
    dtype = request.param
    alone = options(f"alone-{dtype}", 3, dtype)
    run(1, "launch/train.py", alone)
    together = {stage: options(f"zero{stage}-{dtype}", stage, dtype) for stage in STAGES}
    for chosen in together.values():
        run(NUM_PROCESSES, "launch/train.py", chosen)
    return dtype, alone["output_dir"], {stage: chosen["output_dir"] for stage, chosen in together.items()}


@pytest.mark.parametrize("stage", STAGES)
def test_all_gpus_train_what_one_trains(runs, stage):
    dtype, alone, together = runs
    for name in ("loss/total", "loss/reward", "loss/policy"):
        columns = [torch.tensor([row[name] for row in rows(folder, "train")]) for folder in (together[stage], alone)]
        assert len(columns[0]) == STEPS
        tolerance = LOSS_TOLERANCE[dtype]
        torch.testing.assert_close(*columns, rtol=tolerance, atol=tolerance / 10)
    weights = [
        {name: weight.float() for name, weight in final_weights(folder).items()} for folder in (together[stage], alone)
    ]
    assert largest_difference(*weights) < WEIGHT_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_reference_pass_stores_what_one_gpu_stores(options, dtype):
    stores = []
    for number in (1, NUM_PROCESSES):
        chosen = options(f"pass-{number}-{dtype}", 3, dtype)
        run(number, "launch/precompute_reference.py", chosen)
        stores.append(stored(chosen["reference.store"]))
    alone, together = stores
    assert alone.keys() == together.keys()
    columns = [torch.tensor([values[key] for key in alone]) for values in (together, alone)]
    tolerance = 1e-4 if dtype == "float32" else 0.01
    torch.testing.assert_close(*columns, rtol=tolerance, atol=0)


def test_a_rank_that_dies_brings_the_others_down(options):
    chosen = options("dying", 3, "float32", max_steps=100_000)
    metrics, end = chosen["output_dir"] / "metrics.jsonl", time.monotonic() + 300
    with torchrun(NUM_PROCESSES, "launch/train.py", chosen) as (launched, log):
        while not (metrics.exists() and metrics.read_text().count('"train"') > 3):
            assert launched.poll() is None and time.monotonic() < end, log.read_text()[-6000:]
            time.sleep(0.2)
        children = psutil.Process(launched.pid).children()
        ranks = {process.environ()["RANK"]: process for process in children if "RANK" in process.environ()}
        assert len(ranks) == NUM_PROCESSES
        ranks["1"].kill()
        assert launched.wait(timeout=120) != 0, log.read_text()[-6000:]
        assert not psutil.wait_procs(ranks.values(), timeout=10)[1]
