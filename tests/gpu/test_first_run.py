"""tests/gpu/first_run.sh in small sizes on a CPU, where nothing can be imported that its slim list of wheels lacks."""

import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.distributed.launching import free_port
from tests.gpu.test_slim_wheels import FOLDER, WITH_TORCH_AND_TRANSFORMERS, canonical
from tests.without_gpu.package_index import requirements

pytestmark = pytest.mark.distributed  # for its seconds, and the processes that it starts

SCRIPT = FOLDER / "first_run.sh"
MISSING = """
from importlib.machinery import PathFinder

find = PathFinder.find_spec

def find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in {names} else find(name, path, target)

PathFinder.find_spec = classmethod(find_spec)
"""


@pytest.fixture
def variables(tmp_path) -> dict[str, str]:
    """Of an environment that has torch, transformers and the slim list."""
    lines = (FOLDER / "slim_wheels.txt").read_text().splitlines()
    slim = {canonical(line.partition("==")[0]) for line in lines if not line.startswith("#")}
    missing = {canonical(name) for name in requirements()} - slim - WITH_TORCH_AND_TRANSFORMERS
    assert {"datasets", "pyarrow", "matplotlib", "tensorboard"} <= missing
    # sitecustomize is imported at the start of every python, also of those that python starts.
    (tmp_path / "sitecustomize.py").write_text(MISSING.format(names=sorted({*missing, "pandas"})))
    return os.environ | {
        "HAFRM_GPU_TESTS_ON_CPU": "1",
        "OUT": str(tmp_path / "out"),
        "OMP_NUM_THREADS": "1",
        "MASTER_PORT": str(free_port()),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(tmp_path),
    }


def summary(out: str) -> dict[str, str]:
    """Part -> its result."""
    return dict(re.findall(r"^\| (\w+) \| ([^|]+) \| \d+ \|$", Path(out, "summary.md").read_text(), re.MULTILINE))


def test_it_runs_through_with_the_slim_list_alone(variables):
    command = ["bash", str(SCRIPT), "nccl", "kernels", "families", "small", "joint"]
    result = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:]
    passed = dict.fromkeys(("nccl", "kernels", "families", "small"), "passed")
    assert summary(variables["OUT"]) == passed | {"joint": "skipped"}
    text = {part: Path(variables["OUT"], f"{part}.txt").read_text() for part in passed}
    assert all(f"one step under ZeRO {stage}: loss" in text["nccl"] for stage in (0, 2, 3))
    assert "[gemma2-shared_prefix-segmented] PASSED" in text["families"]
    assert "| shared_prefix | hafrm_segmented |" in text["small"]


def test_what_was_seen_before_a_run_is_cut_short_stays(variables):
    """A part that takes too long, then one in which the whole run is killed."""
    limited = variables | {"PART_SECONDS": "3"}
    result = subprocess.run(["bash", SCRIPT, "nccl"], env=limited, capture_output=True, text=True)
    assert result.returncode == 1
    assert summary(variables["OUT"]) == {"nccl": "cut short"}

    run = subprocess.Popen(
        ["bash", SCRIPT, "stages"],
        env=variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    seen = Path(variables["OUT"], "stages.txt")
    deadline = time.monotonic() + 120
    while not (seen.exists() and "ZeRO 0:" in seen.read_text()):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    for process in psutil.process_iter():  # `timeout` makes a process group of its own
        with suppress(OSError, psutil.Error):
            if os.getsid(process.pid) == run.pid:
                process.kill()
    run.wait()
    assert re.search(r"ZeRO 0: [\d.]+ s a step", seen.read_text())
    assert summary(variables["OUT"]) == {"nccl": "cut short"}
