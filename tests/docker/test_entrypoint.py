"""The entry point of the images, with stand-ins for launcher and ranks. build_cpu_image.sh tries it inside an image."""

import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ENTRY_POINT = Path(__file__).parents[2] / "docker/entrypoint.py"

LAUNCHER = """\
# Like torchrun it gives each rank a session of its own; like deepspeed as PID 1 it ignores SIGTERM.
import os, signal, subprocess, sys
command = [sys.executable, *sys.argv[1:]]
ranks = [
    subprocess.Popen(command, env=os.environ | {"LOCAL_RANK": str(rank)}, start_new_session=True) for rank in range(2)
]
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.exit(max(rank.wait() for rank in ranks))
"""
RANK = """\
# run_entry(main): the mark of a file for several processes. The worker inherits LOCAL_RANK and must live on.
import os, signal, subprocess, sys, time
worker = subprocess.Popen(["sleep", "60"])
def save(number, frame):
    time.sleep(0.1)
    os.write(1, f"saved on {signal.Signals(number).name} worker {worker.poll()} {sys.argv[1:]}\\n".encode())
    worker.kill()
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, save)
os.write(1, f"ready {os.getppid()} {os.getpid()}\\n".encode())
while True:
    signal.pause()
"""


@pytest.fixture
def image(tmp_path) -> Path:
    """A folder laid out as in an image, with stand-ins."""
    for folder in ("docker", "launch"):
        (tmp_path / folder).mkdir()
    shutil.copy(ENTRY_POINT, tmp_path / "docker")
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    (tmp_path / "launch/train.py").write_text(RANK)
    (tmp_path / "launch/inspect_data.py").write_text("import os, sys; print(os.getpid(), *sys.argv[1:])")
    return tmp_path


def start(image: Path, *arguments: str, launcher: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, image / "docker/entrypoint.py", *arguments],
        env=os.environ | {"LAUNCHER": launcher},
        stdout=subprocess.PIPE,
        text=True,
    )


def start_ranks(image: Path) -> tuple[subprocess.Popen, int, list[int]]:
    """-> (entry point, process id of the launcher, those of its two ranks)."""
    job = start(image, "train", "--seed", "1", launcher=shlex.join([sys.executable, str(image / "launcher.py")]))
    ready = [job.stdout.readline().split() for _ in range(2)]
    assert [line[0] for line in ready] == ["ready", "ready"]
    return job, int(ready[0][1]), [int(line[2]) for line in ready]


def test_a_signal_reaches_each_rank_once_and_nothing_else(image):
    job, _, _ = start_ranks(image)
    job.send_signal(signal.SIGTERM)
    assert job.communicate(timeout=20)[0] == "saved on SIGTERM worker None ['--seed', '1']\n" * 2
    assert job.returncode == 75


def test_ranks_whose_launcher_has_died_are_waited_for(image):
    job, launcher, ranks = start_ranks(image)
    os.kill(launcher, signal.SIGKILL)
    for rank in ranks:
        os.kill(rank, signal.SIGTERM)
    assert job.communicate(timeout=20)[0].count("saved on SIGTERM") == 2
    assert job.returncode == 128 + signal.SIGKILL


def test_a_signal_before_there_are_ranks_ends_the_launcher(image):
    job = start(image, "train", launcher="bash -c 'echo starting; sleep 60; true'")
    assert job.stdout.readline() == "starting\n"
    job.send_signal(signal.SIGINT)
    assert job.wait(timeout=20) == 75


def test_a_file_for_one_process_takes_the_place_of_the_entry_point(image):
    job = start(image, "inspect", "--examples", "2", launcher="false")
    assert job.communicate(timeout=20)[0] == f"{job.pid} --examples 2\n"
    assert job.returncode == 0


@pytest.fixture(scope="module")
def entry_point():
    spec = importlib.util.spec_from_file_location("entrypoint", ENTRY_POINT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("word", "file"),
    [
        ("train", "train.py"),
        ("precompute", "precompute_reference.py"),
        ("inspect-data", "inspect_data.py"),
        ("inspect_data", "inspect_data.py"),
        ("quickstart", "quickstart.sh"),
    ],
)
def test_commands_are_the_files_of_launch(entry_point, word, file):
    assert entry_point.file_of(word).name == file


@pytest.mark.parametrize(
    ("word", "message"),
    [("fly", "'fly' is no command; there are agreement, benchmark"), ("e", "'e' may be evaluate or export")],
)
def test_a_word_that_is_not_one_command_is_refused(entry_point, word, message):
    with pytest.raises(SystemExit, match=message):
        entry_point.file_of(word)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, ["deepspeed"]),
        ({"NUM_GPUS": "2"}, ["deepspeed", "--num_gpus", "2"]),
        ({"LAUNCHER": "torchrun --nnodes 2"}, ["torchrun", "--nnodes", "2"]),
        ({"LAUNCHER": ""}, [sys.executable]),
    ],
)
def test_launcher(entry_point, monkeypatch, variables, words):
    for name in ("NUM_GPUS", "LAUNCHER"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert entry_point.launcher() == words


def test_two_numbers_of_processes_are_refused(entry_point, monkeypatch):
    monkeypatch.setenv("NUM_GPUS", "2")
    monkeypatch.setenv("LAUNCHER", "torchrun --nproc-per-node 8")
    with pytest.raises(SystemExit, match="NUM_GPUS=2: LAUNCHER='torchrun --nproc-per-node 8' takes the number"):
        entry_point.launcher()
