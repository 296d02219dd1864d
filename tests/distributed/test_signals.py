"""Stopping a run of the real launcher from outside: what is saved, how soon all is down, and that nothing is left.

HAFRM_SIGNALS=all runs every way to stop, and prints the seconds:

    HAFRM_SIGNALS=all python -m pytest -s tests/distributed/test_signals.py
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from hafrm_ds.engine.checkpoint import read_state, saved_steps
from hafrm_ds.processes.stopping import LAUNCHER_LOST, STOPPED_STATUS
from tests.distributed.launching import LAUNCHER, REPOSITORY, as_options, free_port, rows, write_pairs
from tests.tiny_models import save_tiny_model

pytestmark = [pytest.mark.distributed, pytest.mark.alone]

Target = Callable[["Run"], None]


@dataclass
class Run:
    """A training of two ranks under `deepspeed`, in a session of its own."""

    process: subprocess.Popen
    folder: Path
    output: Path

    @classmethod
    def start(cls, folder: Path, name: str, **changes) -> "Run":
        options = {
            "output_dir": folder / name,
            "deepspeed": "ds_configs/zero3.json",
            "max_steps": 100000,
            "model.name_or_path": folder / "model",
            "model.dtype": "float32",
            "data.train": folder / "train.jsonl",
            "data.max_length": 120,
            "batch.global_batch_size": 8,
            "batch.max_tokens_per_micro_batch": 150,
            "reference.store": folder / "store",
            "logging.tensorboard": "false",
            "resume": "auto",
        }
        output = folder / f"{name}.log"
        process = subprocess.Popen(
            [
                str(word)
                for word in (LAUNCHER, "--num_gpus", 2, "--master_port", free_port(), "launch/train.py")
                + tuple(as_options(options, **changes))
            ],
            cwd=REPOSITORY,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            stdout=output.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        return cls(process, folder / name, output)

    def members(self) -> list[psutil.Process]:
        """All processes of the run that are alive."""
        alive = []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    alive.append(process)
            except (psutil.Error, OSError):
                continue
        return alive

    def find(self, *words: str) -> psutil.Process:
        (found,) = (p for p in self.members() if all(word in p.cmdline() for word in words))
        return found

    def rank(self, number: int) -> psutil.Process:
        return self.find("launch/train.py", f"--local_rank={number}")

    def wait_for(self, condition: Callable[[], bool], seconds: float = 90) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.output.read_text()[-4000:]
            assert time.monotonic() < end, self.output.read_text()[-4000:]
            time.sleep(0.01)

    def wait_for_steps(self, number: int) -> None:
        def steps() -> int:
            return len(rows(self.folder, "train")) if (self.folder / "metrics.jsonl").exists() else 0

        before = steps()
        self.wait_for(lambda: steps() >= before + number)

    def seconds_until_down(self, limit: float = 60) -> float:
        started = time.monotonic()
        while self.process.poll() is None or self.members():
            if time.monotonic() - started > limit:
                left = [process.cmdline() for process in self.members()]
                os.killpg(self.process.pid, signal.SIGKILL)
                raise AssertionError(f"still there: {left}\n{self.output.read_text()[-4000:]}")
            time.sleep(0.1)
        return time.monotonic() - started


def to_command(number: int) -> Target:
    return lambda run: run.process.send_signal(number)


def to_group(number: int) -> Target:
    return lambda run: os.killpg(run.process.pid, number)


def to_rank(rank: int, number: int) -> Target:
    return lambda run: run.rank(rank).send_signal(number)


WAYS: dict[str, tuple[Target, str, int | None]] = {  # name -> (what is done, reason that is noted, exit status)
    "SIGTERM to the deepspeed command": (to_command(signal.SIGTERM), LAUNCHER_LOST, -signal.SIGTERM),
    "Ctrl-C": (to_group(signal.SIGINT), "SIGINT", None),
    "SIGUSR1 to a rank": (to_rank(1, signal.SIGUSR1), "SIGUSR1", STOPPED_STATUS),
    "SIGTERM to the process group": (to_group(signal.SIGTERM), "SIGTERM", -signal.SIGTERM),
    "SIGTERM to a rank": (to_rank(0, signal.SIGTERM), "SIGTERM", STOPPED_STATUS),
    "SIGUSR1 to the process group": (to_group(signal.SIGUSR1), "SIGUSR1", -signal.SIGUSR1),
    "SIGKILL to the deepspeed command": (to_command(signal.SIGKILL), LAUNCHER_LOST, -signal.SIGKILL),
    "SIGKILL to its launch process": (
        lambda run: run.find("deepspeed.launcher.launch").send_signal(signal.SIGKILL),
        LAUNCHER_LOST,
        None,
    ),
}
WAYS_OF_CI = 2
ALL = os.environ.get("HAFRM_SIGNALS") == "all"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("signals")
    save_tiny_model(folder / "model")
    write_pairs(folder / "train.jsonl", 60)
    write_pairs(folder / "test.jsonl", 2000, seed=1)
    return folder


@pytest.mark.parametrize("way", list(WAYS) if ALL else list(WAYS)[:WAYS_OF_CI])
def test_a_run_is_saved_and_down_and_resumes(folder, way):
    """One run, stopped in one way after another."""
    act, reason, status = WAYS[way]
    run = Run.start(folder, "run")
    run.wait_for_steps(3)
    act(run)
    seconds = run.seconds_until_down()
    stopped = json.loads((run.folder / "stopped.json").read_text())
    print(f"{way}: down after {seconds:.1f} s, exit status {run.process.returncode}, saved {stopped['checkpoint']}")
    assert stopped["reason"].startswith(reason) or reason in stopped["reason"]
    assert next(iter(saved_steps(run.folder / "checkpoints"))) == stopped["step"]
    assert [row["step"] for row in rows(run.folder, "train")] == list(range(1, stopped["step"] + 1))
    assert status is None or run.process.returncode == status
    assert seconds < 15
    output = run.output.read_text()
    assert "error:" not in output and "frame #" not in output, output[-4000:]
    assert f"stopped: {stopped['reason']} after step {stopped['step']}" in output
    assert f"stopped by {stopped['reason']} after step {stopped['step']}" in (run.folder / "report.html").read_text()


@pytest.mark.parametrize("victim", [0, 1] if ALL else [1])
def test_the_death_of_a_rank_ends_the_other_without_a_save(folder, victim):
    run = Run.start(folder, f"death-of-{victim}")
    run.wait_for_steps(3)
    other = run.rank(1 - victim)
    started = time.monotonic()
    run.rank(victim).send_signal(signal.SIGKILL)
    psutil.wait_procs([other], timeout=30)
    seconds = time.monotonic() - started
    down = seconds + run.seconds_until_down()
    print(f"death of rank {victim}: the other is down after {seconds:.1f} s, all after {down:.1f} s")
    assert seconds < 10
    output = run.output.read_text()
    assert output.count(f"rank {1 - victim} stops: ") == 1, output[-4000:]
    assert "Traceback" not in output and "frame #" not in output, output[-4000:]
    assert not saved_steps(run.folder / "checkpoints")


@pytest.mark.skipif(not ALL, reason="HAFRM_SIGNALS=all")
def test_a_signal_cuts_an_evaluation_short_which_is_made_up_for(folder):
    changes = {"data__eval": f"{{held_out: {folder / 'test.jsonl'}}}", "evaluation__every_steps": 2}
    run = Run.start(folder, "evaluating", evaluation__at_start="false", **changes)
    run.wait_for_steps(2)
    time.sleep(0.3)
    run.rank(0).send_signal(signal.SIGTERM)
    seconds = run.seconds_until_down()
    stopped = json.loads((run.folder / "stopped.json").read_text())
    print(f"SIGTERM while evaluating: down after {seconds:.1f} s, saved {stopped['checkpoint']}")
    assert stopped["step"] == 2
    assert read_state(run.folder / "checkpoints/step-000002").evaluation_is_due
    assert rows(run.folder, "eval") == []
    run = Run.start(folder, "evaluating", evaluation__at_start="false", **changes)
    run.wait_for(lambda: len(rows(run.folder, "train")) >= 3)
    os.killpg(run.process.pid, signal.SIGKILL)
    run.process.wait()
    assert [row["step"] for row in rows(run.folder, "eval")] == [2]


@pytest.mark.skipif(not ALL, reason="HAFRM_SIGNALS=all")
def test_a_signal_while_data_is_prepared_ends_a_run_at_once(folder):
    write_pairs(folder / "many.jsonl", 150_000)
    run = Run.start(folder, "preparing", data__train=folder / "many.jsonl", data__cache_dir=folder / "cache")
    run.wait_for(lambda: "Tokenising" in run.output.read_text() or list((folder / "cache").glob("**/*")))
    time.sleep(1)
    assert not (run.folder / "metrics.jsonl").exists()
    os.killpg(run.process.pid, signal.SIGTERM)
    seconds = run.seconds_until_down()
    print(f"SIGTERM while data is prepared: down after {seconds:.1f} s")
    assert seconds < 10
    assert json.loads((run.folder / "stopped.json").read_text())["checkpoint"] is None
    assert "Traceback" not in run.output.read_text()
