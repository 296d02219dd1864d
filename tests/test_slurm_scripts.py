"""The scripts of launch/slurm/ with a srun, sbatch and scontrol that only write down what they were asked for.

Under a real Slurm: tests/clusters/slurm.py.
"""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SCRIPTS = REPOSITORY / "launch/slurm"
PRETENDED = """#!/bin/bash
printf '%q ' "$(basename "$0")" "$@" >>"$CALLS"
echo >>"$CALLS"
[[ "$0" != */sbatch ]] || wc -l <"$CALLS"
[[ "$0" != */srun ]] || exit "$STATUS"
"""
JOB = {"SLURM_JOB_ID": "70", "SLURM_JOB_NAME": "hafrm-train", "SLURM_JOB_NODELIST": "n[1-2]"}


@pytest.fixture
def run(tmp_path):
    """Runs a script; returns its exit status and the commands that it has called, as words."""
    for name in ("srun", "sbatch", "scontrol"):
        (tmp_path / name).write_text(PRETENDED)
        (tmp_path / name).chmod(0o755)

    def run(script: str, *arguments: str, status: int = 0, **environment: str) -> tuple[int, list[list[str]]]:
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "HAFRM_"))}
        own = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls), "STATUS": str(status)}
        result = subprocess.run(
            ["bash", SCRIPTS / script, *arguments],
            cwd=REPOSITORY,
            env=inherited | JOB | {"HAFRM_LOGS": str(tmp_path)} | own | environment,
            capture_output=True,
        )
        lines = calls.read_text().splitlines() if calls.exists() else []
        return result.returncode, [shlex.split(line) for line in lines]

    return run


def test_srun_starts_the_ranks_with_a_log_each(run, tmp_path):
    status, ((*words,),) = run("train.sbatch", "--config", "a b.yaml")
    assert status == 0
    assert (tmp_path / "hafrm-train-70").is_dir()
    assert f"--output={tmp_path}/hafrm-train-70/rank-%4t.log" in words
    assert words[-5:] == ["launch/train.py", "--config", "a b.yaml", "--resume", "auto"]
    assert words[-6] == "python"


@pytest.mark.parametrize(
    ("status", "environment", "requeued"),
    [
        (75, {}, "70"),
        (75, {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3"}, "70_3"),  # 70 would be the whole array
        (75, {"SLURM_RESTART_COUNT": "2", "HAFRM_MAX_REQUEUES": "2"}, None),
        (1, {}, None),
        (0, {}, None),
    ],
)
def test_only_a_job_that_was_asked_to_stop_is_requeued(run, status, environment, requeued):
    returned, calls = run("train.sbatch", status=status, **environment)
    assert returned == status
    assert calls[1:] == ([["scontrol", "requeue", requeued]] if requeued else [])


def test_a_container_is_srun_s_or_apptainer_s(run):
    image = {"HAFRM_CONTAINER_IMAGE": "hafrm.sqsh", "HAFRM_CONTAINER_MOUNTS": "/data,/models:/m"}
    _, ((*words,),) = run("evaluate.sbatch", "--model", "M", **image)
    here = str(REPOSITORY)
    assert f"--container-mounts={here}:{here},/data:/data,/models:/m" in words
    assert words[-4:] == ["python", "launch/evaluate.py", "--model", "M"]
    _, ((*words,),) = run("evaluate.sbatch", **image, HAFRM_CONTAINER_RUNTIME="apptainer")
    inside = ["apptainer", "exec", "--nv", "--bind", f"{here},/data,/models:/m", "--pwd", here, "hafrm.sqsh", "python"]
    assert words[-10:] == [*inside, "launch/evaluate.py"]
    assert run("evaluate.sbatch", **image, HAFRM_CONTAINER_RUNTIME="docker") == (2, [])


def test_each_stage_of_the_pipeline_waits_for_the_one_before(run):
    arguments = ("runs/a", "x.jsonl?split=test", "y z.jsonl", "--", "--config", "c.yaml")
    status, calls = run("pipeline.sh", *arguments, HAFRM_SBATCH="--nodes 4")
    assert status == 0
    always = ["sbatch", "--parsable", "--kill-on-invalid-dep=yes", "--nodes", "4"]
    options = ["--config", "c.yaml", "--output_dir", "runs/a"]
    assert calls[0] == [*always, "launch/slurm/precompute_reference.sbatch", *options]
    assert calls[1] == [*always, "--dependency=afterok:1", "launch/slurm/train.sbatch", *options]
    evaluated = ["--model", "runs/a/final", "--data", "x.jsonl?split=test", "y z.jsonl"]
    assert calls[2][:7] == [*always, "--dependency=afterok:2", "launch/slurm/evaluate.sbatch"]
    assert calls[2][7:] == [*evaluated, "--output_dir", "runs/a/evaluated"]
    assert run("pipeline.sh", "runs/a", "--", "--config", "c.yaml") == (2, [])


def test_a_task_of_a_sweep_takes_its_value(run):
    arguments = ("objective.alpha", "0 0.1 0.2", "runs/alpha", "--config", "c.yaml")
    task = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "1"}
    _, ((*words,),) = run("sweep.sbatch", *arguments, **task)
    own = ["--objective.alpha", "0.1", "--output_dir", "runs/alpha/0.1", "--resume", "auto"]
    assert words[-9:] == ["launch/train.py", "--config", "c.yaml", *own]
    assert run("sweep.sbatch", *arguments, **{**task, "SLURM_ARRAY_TASK_ID": "3"}) == (2, [])
    assert run("sweep.sbatch", *arguments) == (2, [])  # no array, which would be the first value alone


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    files = sorted(SCRIPTS.iterdir())
    result = subprocess.run(["shellcheck", "-x", *files], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
