"""One job at a time in a folder: the lock of a run, an evaluation, a comparison or a file of scores.

The first process of a job holds a lock on a small file that says who it is. The kernel takes the lock from a process
that dies, however it dies. Network file systems may not pass locks on to other hosts, so the owner also touches the
file every few seconds, and one on another host that has not done so for a minute counts as dead.
"""

import fcntl
import json
import os
import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from hafrm_ds.errors import UserError
from hafrm_ds.processes.ranks import Processes

TOUCH_SECONDS, DEAD_SECONDS = 5.0, 60.0
"""An owner touches its file so often; one on another host that has not for so long counts as dead."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""Tells kernels apart, where host names do not: containers of one host share it."""


@contextmanager
def sole_owner(output: Path, processes: Processes, option: str = "--output_dir") -> Iterator[None]:
    """Inside, no other job writes into `output`. All processes call it; the first one acts.

    Args:
        output: a folder, or a file of --output.
        option: that names it.

    Raises:
        UserError: another job is at work there, which the message names, or the disk cannot be written.
    """
    if not processes.is_first:
        yield
        return
    folder, name = (output.parent, f".{output.name}.owner") if option == "--output" else (output, ".owner")
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    lock = OwnerFile(folder / name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        owner = lock.take()
    except OSError as error:
        raise UserError(f"{option} {output} cannot be written: {error.strerror}") from error
    if owner is not None:
        raise UserError(
            f"{option} {output} is in use by {owner}. Wait until that has ended, stop it, or choose another {option}"
        )
    try:
        yield
    finally:
        lock.release()
        for each in made:  # of a job that was refused nothing is left
            with suppress(OSError):
                each.rmdir()


class OwnerFile:
    """The file that says who is at work in a folder."""

    def __init__(self, file: Path):
        self.file = file
        self.descriptor: int | None = None
        self.is_released = threading.Event()
        self.token = secrets.token_hex(8)

    def take(self) -> str | None:
        """Become the owner; or who else is, in words.

        Raises:
            OSError: the file cannot be written.
        """
        while True:
            descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                is_locked = lock_at_once(descriptor)
                owner = read_owner(descriptor)
                if is_locked is False or (owner and self.is_alive(owner, descriptor, is_locked)):
                    return in_words(owner)
                if not is_current(descriptor, self.file):  # its owner has removed it meanwhile
                    continue
                os.truncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(this_process() | {"token": self.token}).encode(), 0)
                os.fsync(descriptor)
                self.descriptor, descriptor = descriptor, -1
                break
            finally:
                if descriptor >= 0:
                    os.close(descriptor)
        os.register_at_fork(after_in_child=self.forget)  # a child that outlives this process must not keep the lock
        threading.Thread(target=self.keep_touching, name="owner of a folder", daemon=True).start()
        return None

    def is_alive(self, owner: dict[str, Any], descriptor: int, is_locked: bool | None) -> bool:
        """Whether the owner that the file names still runs, though its lock, if this disk has locks, is ours now."""
        here = this_process()
        if owner.get("boot") == here["boot"]:
            if is_locked:
                return False
            if owner.get("pids") == here["pids"]:
                return has_started(owner.get("process"), owner.get("started"))
        return seconds_since_touched(descriptor, self.file.parent) < DEAD_SECONDS

    def keep_touching(self) -> None:
        while not self.is_released.wait(TOUCH_SECONDS):
            with suppress(OSError):
                os.utime(self.file)

    def forget(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None

    def release(self) -> None:
        """Give the folder free, and leave nothing behind."""
        self.is_released.set()
        if self.descriptor is None:
            return
        with suppress(OSError):
            if read_owner(self.descriptor).get("token") == self.token and is_current(self.descriptor, self.file):
                self.file.unlink()
        self.forget()


def lock_at_once(descriptor: int) -> bool | None:
    """True: the lock is ours. False: another process has it. None: this disk has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def is_current(descriptor: int, file: Path) -> bool:
    """Whether a descriptor is that of the file which has this name now."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False


def read_owner(descriptor: int) -> dict[str, Any]:
    """What an owner has written of itself; {} if nothing or something else stands there."""
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def this_process() -> dict[str, Any]:
    """Who this is: host, kernel, process numbers' namespace, process, when it was started."""
    try:
        boot, pids = BOOT_ID.read_text().strip(), os.readlink("/proc/self/ns/pid")
    except OSError:
        boot, pids = socket.gethostname(), ""
    own = psutil.Process()
    return {
        "host": socket.gethostname(),
        "process": own.pid,
        "started": own.create_time(),
        "boot": boot,
        "pids": pids,
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def in_words(owner: dict[str, Any]) -> str:
    if not owner:  # it has the lock and has not written yet, or something else keeps the file open
        return "another process"
    return f"process {owner.get('process')} on {owner.get('host')} (since {owner.get('since')})"


def has_started(process: Any, started: Any) -> bool:
    """Whether a process of this number, started then, still runs: numbers are used again."""
    try:
        return abs(psutil.Process(process).create_time() - started) < 2
    except (psutil.NoSuchProcess, TypeError, ValueError):
        return False
    except psutil.Error:
        return True


def seconds_since_touched(descriptor: int, folder: Path) -> float:
    """Age of a file by the clock of its disk, which may differ from that of this host."""
    probe = folder / f".now.{secrets.token_hex(4)}"
    probe.touch()
    try:
        return probe.stat().st_mtime - os.fstat(descriptor).st_mtime
    finally:
        probe.unlink(missing_ok=True)
