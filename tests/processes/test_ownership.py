"""One job at a time in a folder: who is refused, what a dead owner leaves, and that an ended one leaves nothing."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from hafrm_ds.errors import UserError
from hafrm_ds.processes import ownership
from hafrm_ds.processes.ownership import OwnerFile, sole_owner, this_process
from hafrm_ds.processes.ranks import Processes
from tests.distributed.launching import REPOSITORY

HOLDER = """
import sys, time, torch.distributed as dist
from pathlib import Path
from hafrm_ds.processes.ownership import sole_owner
from hafrm_ds.processes.ranks import Processes
with sole_owner(Path(sys.argv[1]), Processes(0, 0, 1, dist.HashStore())):
    print("owns", flush=True)
    time.sleep(60)
"""


def rank(number: int = 0) -> Processes:
    return Processes(number, number, 2, dist.HashStore())


@pytest.fixture
def holder(tmp_path):
    """A process that owns tmp_path/run."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "owns\n"
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def without_locks(monkeypatch):
    """A disk that knows no locks."""

    def refuse(descriptor: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def leave_owner(folder: Path, **changes) -> Path:
    """What an owner that died has left."""
    folder.mkdir()
    (folder / ".owner").write_text(json.dumps(this_process() | changes))
    return folder / ".owner"


def test_the_second_is_refused_by_name_until_the_first_is_killed(tmp_path, holder):
    with (
        pytest.raises(UserError, match=rf"--output_dir .*run is in use by process {holder.pid} on \S+ \(since"),
        sole_owner(tmp_path / "run", rank()),
    ):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with sole_owner(tmp_path / "run", rank()):
        assert json.loads((tmp_path / "run" / ".owner").read_text())["process"] == os.getpid()
    assert not (tmp_path / "run" / ".owner").exists()


@pytest.mark.usefixtures("without_locks")
def test_without_locks_the_process_tells(tmp_path, holder):
    with pytest.raises(UserError, match=f"in use by process {holder.pid}"), sole_owner(tmp_path / "run", rank()):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with sole_owner(tmp_path / "run", rank()):
        pass


@pytest.mark.usefixtures("without_locks")
def test_a_process_number_that_is_used_again_is_another_process(tmp_path):
    leave_owner(tmp_path / "run", process=os.getpid(), started=this_process()["started"] - 1000)
    with sole_owner(tmp_path / "run", rank()):
        pass


def test_an_owner_on_another_host_is_alive_while_it_touches_its_file(tmp_path):
    """Its lock may not be seen here."""
    file = leave_owner(tmp_path / "run", host="elsewhere", boot="another kernel", process=7)
    with pytest.raises(UserError, match="in use by process 7 on elsewhere"), sole_owner(tmp_path / "run", rank()):
        pass
    assert file.exists() and len(list(file.parent.iterdir())) == 1
    long_ago = file.stat().st_mtime - ownership.DEAD_SECONDS - 1
    os.utime(file, (long_ago, long_ago))
    with sole_owner(tmp_path / "run", rank()):
        pass


def test_an_owner_touches_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(ownership, "TOUCH_SECONDS", 0.05)
    with sole_owner(tmp_path / "run", rank()):
        file = tmp_path / "run" / ".owner"
        os.utime(file, (1, 1))
        for _ in range(100):
            if file.stat().st_mtime > 1:
                break
            ownership.threading.Event().wait(0.05)
        assert file.stat().st_mtime > 1


@pytest.mark.parametrize("left", ["", "no JSON", "[1]", '{"process": "seven", "boot": 3}'])
def test_a_damaged_file_of_a_dead_owner_is_taken_over(tmp_path, left):
    file = leave_owner(tmp_path / "run")
    file.write_text(left)
    os.utime(file, (1, 1))
    with sole_owner(tmp_path / "run", rank()):
        pass


def test_an_error_leaves_no_lock_and_no_empty_folder(tmp_path):
    with pytest.raises(UserError, match="of the job"), sole_owner(tmp_path / "a" / "run", rank()):
        raise UserError("of the job")
    assert not list(tmp_path.iterdir())


def test_files_have_owners_of_their_own(tmp_path):
    said = r"--output .*a.jsonl is in use by process \d+ on .*choose another --output"
    with sole_owner(tmp_path / "a.jsonl", rank(), "--output"), sole_owner(tmp_path / "b.jsonl", rank(), "--output"):
        again = sole_owner(tmp_path / "a.jsonl", rank(), "--output")
        with pytest.raises(UserError, match=said):
            again.__enter__()
    assert not list(tmp_path.iterdir())


def test_the_other_ranks_have_nothing_to_do(tmp_path, holder):
    with sole_owner(tmp_path / "run", rank(1)):
        pass


def test_a_child_that_outlives_the_owner_does_not_keep_the_lock(tmp_path):
    lock = OwnerFile(tmp_path / ".owner")
    assert lock.take() is None
    has_begun, begins = os.pipe()
    child = os.fork()
    if not child:
        os.write(begins, b".")
        signal.pause()
    os.read(has_begun, 1)
    try:
        lock.forget()  # as the kernel does when the owner is killed
        assert OwnerFile(tmp_path / ".owner").take() is None
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_folder_that_cannot_be_written_is_one_message():
    with (
        pytest.raises(UserError, match=r"^--output_dir /proc/nope cannot be written: "),
        sole_owner(Path("/proc/nope"), rank()),
    ):
        pass
