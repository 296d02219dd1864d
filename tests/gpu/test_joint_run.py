"""The quickstart's pairs and model on one GPU: the reference pass twice, then a run of the joint objective that is
stopped by SIGTERM half way, and resumed. On a CPU a few pairs and steps."""

import json
import math
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from hafrm_ds import quickstart
from hafrm_ds.model.attention import choose_kernel
from tests.distributed.launching import COMMAND, REPOSITORY, as_options, free_port, launch, rows
from tests.gpu.environment import DEVICE, IS_GPU

pytestmark = [pytest.mark.gpu, pytest.mark.distributed]

STEPS, PAIRS = (200, None) if IS_GPU else (10, 64)
LEAST_ACCURACY = 0.8
"""Of the reward head on held-out pairs. The best reachable is 0.9, the best judge by a single feature has 0.68."""


def shorten(path: Path) -> Path:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:PAIRS]))
    return path


def run_until(step: int, run: Path, *options: str) -> str:
    """Start a training, send it SIGTERM after this step, and wait until it is down; returns what it printed."""
    command = [*COMMAND, "--num_gpus", 1, "--master_port", free_port(), "launch/train.py", *options]
    output = run.with_name("interrupted.log")
    with output.open("w") as file:
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=REPOSITORY,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    while not (run / "metrics.jsonl").exists() or len(rows(run, "train")) < step:
        assert process.poll() is None, output.read_text()[-6000:]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.wait()
    deadline = time.monotonic() + 60  # the launcher is down first
    while not (run / "stopped.json").exists():
        assert time.monotonic() < deadline, output.read_text()[-6000:]
        time.sleep(0.05)
    return output.read_text()


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """The folder of the run, what its commands printed, and how it was stopped."""
    folder = tmp_path_factory.mktemp("joint_run")
    quickstart.main([str(folder)])
    options = as_options(
        {
            "config": "launch/recipes/quickstart.yaml",
            "deepspeed": "ds_configs/zero3.json",
            "output_dir": folder / "run",
            "max_steps": STEPS,
            "model.name_or_path": folder / "model",
            "model.dtype": "bfloat16" if IS_GPU else "float32",
            "data.train": shorten(folder / "data/train.jsonl"),
            "data.eval": f"{{held_out: {shorten(folder / 'data/test.jsonl')}}}",
            "batch.max_tokens_per_micro_batch": "auto" if IS_GPU else 4096,
            "reference.store": folder / "reference",
            "logging.every_steps": 1,
            "resume": "auto",
        }
    )
    printed = []
    for job in ("precompute_reference", "precompute_reference", "train"):
        if job == "train":
            run_until(STEPS // 2, folder / "run", *options)
            stopped = json.loads((folder / "run" / "stopped.json").read_text())
            print(f"stopped: {stopped}", flush=True)
        result = launch(1, f"launch/{job}.py", *options)
        assert result.returncode == 0, result.stdout[-6000:]
        printed.append(result.stdout)
    return folder / "run", printed, stopped


def computed(output: str) -> int:
    found = re.search(r"different responses: ([\d,]+) computed", output)
    assert found is not None, output[-6000:]
    return int(found[1].replace(",", ""))


def test_the_second_reference_pass_computes_nothing(outputs):
    _, (first, second, train), _ = outputs
    assert computed(first) > 0
    assert computed(second) == 0
    assert "reference log-probs found in" in train


def test_it_runs_under_the_best_kernel_without_padding(outputs):
    run, (first, _, train), _ = outputs
    kernel = choose_kernel("auto", DEVICE, torch.bfloat16, AutoConfig.from_pretrained(run.parent / "model"))
    for output in (first, train):
        assert f"layout shared_prefix, attention {kernel.implementation}" in output
        assert not IS_GPU or "token budget of a micro-batch, from memory" in output
    assert {row["padding_share"] for row in rows(run, "train")} == {0}


def test_the_policy_is_its_reference_at_the_first_step(outputs):
    run, _, _ = outputs
    (check,) = rows(run, "check")
    assert check["reference/pairs_checked"] == 16
    assert check["reference/mean_difference_per_token"] < 0.02
    assert rows(run, "eval")[0]["loss/policy"] == pytest.approx(math.log(2), abs=0.01)


def test_it_is_stopped_half_way_and_resumes(outputs):
    run, (_, _, train), stopped = outputs
    assert STEPS // 2 <= stopped["step"] < STEPS and stopped["checkpoint"]
    assert f"step {stopped['step']}" in train
    assert [row["step"] for row in rows(run, "train")] == list(range(1, STEPS + 1))


def test_it_learns(outputs):
    run, _, _ = outputs
    train = rows(run, "train")
    assert all(math.isfinite(row["loss/total"]) and math.isfinite(row["grad_norm"]) for row in train)
    assert not IS_GPU or rows(run, "eval")[-1]["accuracy/reward"] > LEAST_ACCURACY
