"""Ranks that are forked from a server which has imported everything: a start costs a second or two instead of ten.

For tests that start and kill a training again and again.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.distributed.launching import REPOSITORY, free_port

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["deepspeed", "hafrm_ds.training.run", "hafrm_ds.model.loading"])


def run_rank(arguments: list[str], environment: dict[str, str], log: Path) -> None:
    """The body of one process: launch/train.py with its output in a file."""
    os.chdir(REPOSITORY)
    os.environ.update(environment)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from hafrm_ds.processes.ranks import run_entry
    from launch.train import main

    sys.argv = ["launch/train.py", *arguments]
    run_entry(main)


class Ranks:
    """The processes of one start of a training; LOG-rankN.log gets what they print."""

    def __init__(self, arguments: list[str], log: Path, num_ranks: int = 2):
        group = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.log = log
        self.processes = [
            CONTEXT.Process(
                target=run_rank,
                args=(arguments, group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, self.log_of(rank)),
            )
            for rank in range(num_ranks)
        ]
        for process in self.processes:
            process.start()

    def log_of(self, rank: int) -> Path:
        return self.log.with_name(f"{self.log.name}-rank{rank}.log")

    def wait(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Wait until all ranks have ended or the condition holds; True if they have ended."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not until():
            if all(process.exitcode is not None for process in self.processes):
                return True
            time.sleep(0.002)
        return False

    def finish(self, seconds: float = 240) -> None:
        """Wait for a good end."""
        ended = self.wait(seconds)
        codes = [process.exitcode for process in self.processes]
        assert ended and codes == [0] * len(codes), (codes, self.log_of(0).read_text()[-4000:])

    def kill(self, first: int) -> None:
        """SIGKILL to one rank, and to the others a moment later."""
        self.processes[first].kill()
        self.wait(0.1)
        for process in self.processes:
            process.kill()
            process.join()
