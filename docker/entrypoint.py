#!/usr/bin/env python
"""Entry point of the images: starts a file of launch/ and hands it the signals that the container gets.

    docker run [options of docker] IMAGE COMMAND [options of the command]

COMMAND is a file of launch/ (train, evaluate, ...); a beginning that no other has is enough (precompute). A file that
runs as several processes is started by a launcher; two environment variables say how:

    NUM_GPUS   processes in this container (default: one for each GPU)
    LAUNCHER   launcher and options, as in "torchrun --nnodes 2 --node-rank 0 --nproc-per-node 8 ..." (default:
               deepspeed); empty for one process without a launcher, as where srun starts the containers

SIGTERM, SIGINT and SIGUSR1 go to the ranks, which save and leave with status 75. `docker stop` sends SIGTERM and, after
--stop-timeout (10 seconds unless given), SIGKILL.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil

from hafrm_ds.processes.stopping import STOPPED_STATUS

LAUNCH = Path(__file__).resolve().parents[1] / "launch"
OWNER = "HAFRM_ENTRY_POINT"
"""Environment variable that all descendants of an entry point inherit: its process id."""


def commands() -> dict[str, Path]:
    """Command -> its file."""
    files = sorted([*LAUNCH.glob("*.py"), LAUNCH / "quickstart.sh"])
    return {file.stem.replace("_", "-"): file for file in files}


def file_of(word: str) -> Path:
    """The file of the command that is called `word`, or of the only one that begins like this."""
    known, word = commands(), word.replace("_", "-")
    matches = [word] if word in known else [name for name in known if name.startswith(word)]
    if len(matches) != 1:
        found = f"may be {' or '.join(matches)}" if matches else f"is no command; there are {', '.join(known)}"
        sys.exit(f"{word!r} {found}")
    return known[matches[0]]


def launcher() -> list[str]:
    """The words in front of a file that runs as several processes."""
    words, processes = shlex.split(os.environ.get("LAUNCHER", "deepspeed")), os.environ.get("NUM_GPUS")
    if processes and words != ["deepspeed"]:
        sys.exit(f"NUM_GPUS={processes}: LAUNCHER={shlex.join(words)!r} takes the number as an option of its own")
    return [*words, "--num_gpus", processes] if processes else words or [sys.executable]


def ranks() -> Iterator[psutil.Process]:
    """The processes that launchers below this entry point have started.

    They have LOCAL_RANK and their parents have not; workers that a rank forks inherit it. They are found by their
    environment: torchrun gives each a session of its own, and a launcher that dies leaves them without a parent.
    """

    def is_of_a_rank(process: psutil.Process | None) -> bool:
        with suppress(psutil.Error):
            environment = process.environ() if process else {}
            return environment.get(OWNER) == str(os.getpid()) and "LOCAL_RANK" in environment
        return False

    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if is_of_a_rank(process) and not is_of_a_rank(process.parent()):
                yield process


def supervise(command: list[str]) -> int:
    """Run a launcher, hand the signals that come meanwhile to its ranks, and return its exit status.

    The launcher has a process group of its own, so that Ctrl-C, too, reaches the ranks by this way alone: a launcher
    would give them 30 seconds to save. Before there are ranks, the group is ended.
    """
    job: subprocess.Popen | None = None
    sent: set[int] = set()

    def forward(number: int, frame: FrameType | None = None) -> None:
        sent.add(number)
        targets = list(ranks())
        for rank in targets:
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(number)
        if job is not None and not targets:
            with suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, forward)
    job = subprocess.Popen(command, env=os.environ | {OWNER: str(os.getpid())}, start_new_session=True)
    for number in tuple(sent):  # came while the launcher was being started
        forward(number)
    status = job.wait()
    while any(ranks()):  # their launcher has died: they save, and the end of PID 1 would kill them
        time.sleep(0.1)
    if any(status in (-number, 128 + number, 256 - number) for number in sent and sent | {signal.SIGTERM}):
        return STOPPED_STATUS  # the signal came before the ranks could catch it: they had done nothing
    return status if status >= 0 else 128 - status


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("--help", "-h"):
        print(f"{__doc__}\nCommands: {', '.join(commands())}")
        return 0
    file, options = file_of(arguments[0]), arguments[1:]
    if file.suffix == ".sh":
        return supervise(["bash", str(file), *options])
    if "run_entry(" in file.read_text():
        return supervise([*launcher(), str(file), *options])
    os.execv(sys.executable, [sys.executable, str(file), *options])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
