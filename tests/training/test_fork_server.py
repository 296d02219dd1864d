"""Entry files that run in forks: what they are given, how they end, and who is asked to stop."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from hafrm_ds.errors import UserError
from hafrm_ds.training.fork_server import ForkServer

ENTRY = """
import json, os, signal, sys, time
import torch
file, how, *rest = sys.argv[1:]
facts = {"learned": "zipapp" in sys.modules,
         "threads": len(os.listdir("/proc/self/task")), "variable": os.environ.get("OWN"), "path": sys.path[0],
         "argv": sys.argv, "parent": os.getppid(), "imported": "hafrm_ds.training.run" in sys.modules,
         "stdin": sys.stdin.read()}
def stop(number, frame):
    open(file, "a").write("stopped")
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
import zipapp
open(file, "w").write(json.dumps(facts))
if how == "fail":
    sys.exit(3)
if how == "raise":
    raise RuntimeError("a fault of its own")
if how == "die":
    os.kill(os.getpid(), signal.SIGKILL)
while how == "wait":
    time.sleep(0.05)
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    file = tmp_path_factory.mktemp("entry") / "entry.py"
    file.write_text(ENTRY)
    return file


@pytest.fixture(scope="module")
def server(script):
    server = ForkServer(script)
    yield server
    server.close()


def wait_for(file, text: str) -> None:
    deadline = time.monotonic() + 60
    while not (file.exists() and text in file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert text in file.read_text()


def test_a_fork_is_as_if_python_had_started_the_file(server, script, tmp_path):
    file = tmp_path / "facts.json"
    assert server.start([str(file), "end"], {"OWN": "one"}).wait() == 0
    facts = json.loads(file.read_text())
    assert facts["argv"] == [str(script), str(file), "end"] and facts["path"] == str(script.parent)
    assert (facts["variable"], facts["imported"], facts["threads"], facts["stdin"]) == ("one", True, 1, "")
    assert server.start([str(file), "end"], {}).wait() == 0
    again = json.loads(file.read_text())
    assert (facts["learned"], again["learned"]) == (False, True)
    assert again["variable"] is None and again["parent"] == facts["parent"] == server.process.pid


@pytest.mark.parametrize(("how", "status"), [("fail", 3), ("raise", 1), ("die", -9)])
def test_the_status_comes_back(server, tmp_path, how, status):
    assert server.start([str(tmp_path / "facts"), how], {}).wait() == status


def test_a_signal_is_handed_on_and_the_server_outlives_those_of_its_group(server, tmp_path):
    file = tmp_path / "facts"
    fork = server.start([str(file), "wait"], {})
    wait_for(file, "}")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(server.process.pid, number)
    fork.terminate()
    assert fork.wait() == 75 and file.read_text().endswith("stopped")
    assert server.start([str(file), "end"], {}).wait() == 0


def test_a_training_is_stopped_when_its_starter_is_gone(script, tmp_path):
    file = tmp_path / "facts"
    code = (
        "import sys; from pathlib import Path; from hafrm_ds.training.fork_server import ForkServer\n"
        "ForkServer(Path(sys.argv[1])).start([sys.argv[2], 'wait'], {}).wait()"
    )
    starter = subprocess.Popen([sys.executable, "-c", code, str(script), str(file)])
    wait_for(file, "}")
    starter.kill()
    starter.wait()
    wait_for(file, "stopped")


@pytest.mark.skipif(sys.platform != "linux", reason="no other system tells a process that its parent has ended")
def test_a_training_is_stopped_when_its_server_is_killed(script, tmp_path):
    server, file = ForkServer(script), tmp_path / "facts"
    server.start([str(file), "wait"], {})
    wait_for(file, "}")
    server.process.kill()
    wait_for(file, "stopped")
    server.close()


def test_a_server_that_is_gone_is_said_so(script, tmp_path):
    server = ForkServer(script)
    server.process.kill()
    with pytest.raises(UserError, match=r"trainings are forked from has ended \(exit status -9\)"):
        server.start([str(tmp_path / "facts"), "end"], {}).wait()
    server.close()
