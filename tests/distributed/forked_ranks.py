"""Ranks that are forked from a server which has imported everything: a start costs a second instead of ten.

Where the launcher, its signals or its exit status are what is tested, `launching.launch` starts it.
"""

import json
import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

from hafrm_ds.processes import ranks
from tests.distributed.launching import REPOSITORY, free_port

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *("hafrm_ds.training.run", "hafrm_ds.model.loading", "transformers.models.llama.modeling_llama"),
        *("hafrm_ds.evaluation.evaluate", "hafrm_ds.scoring.files", "torch.utils.tensorboard"),
        # What deepspeed.initialize imports.
        *("deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.runtime.superoffload.superoffload_stage3"),
        *("deepspeed.module_inject.auto_ep_layer", "torch.utils.cpp_extension"),
    ]
)


def run_rank(words: list[str], environment: dict[str, str], log: Path) -> None:
    """The body of one process: a script with its arguments, as if Python had started it, with its output in a file."""
    os.chdir(REPOSITORY)
    os.environ.clear()
    os.environ.update(environment)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    ranks.POLL_SECONDS = 0.01  # ranks wait for one another a dozen times in a run, which is over in a second
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


class Ranks:
    """The processes of one start of a script; `log` gets what they print.

    Args:
        variables: what their environment has beside that of this process.
    """

    def __init__(self, script: str, arguments: Iterable[object], log: Path, num_ranks: int = 2, **variables: str):
        self.log, self.port = log, free_port()
        group = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port)}
        shared = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | group | variables
        self.processes = [
            CONTEXT.Process(
                target=run_rank,
                args=([script, *map(str, arguments)], shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, log),
            )
            for rank in range(num_ranks)
        ]
        for process in self.processes:
            process.start()

    @property
    def statuses(self) -> list[int | None]:
        return [process.exitcode for process in self.processes]

    def wait(self, seconds: float, until: Callable[[], bool] | None = None) -> bool:
        """Wait until all ranks have ended or the condition holds; True if they have ended."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not (until and until()):
            if None not in self.statuses:
                return True
            time.sleep(0.002 if until else 0.05)
        return False

    def finish(self, seconds: float = 240) -> str:
        """Wait for a good end; returns what was printed."""
        self.wait(seconds)
        statuses, printed = self.statuses, self.log.read_text()
        if None in statuses:
            self.kill()
        assert statuses == [0] * len(statuses), (statuses, printed[-6000:])
        assert not list(Path("/dev/shm").glob(f"deepspeed_*_{self.port}_*")), "buffers of 66 MiB a rank are left"
        return printed

    def kill(self, first: int = 0, seconds: float = 0.0) -> None:
        """SIGKILL to one rank, and to the others so many seconds later."""
        self.processes[first].kill()
        self.wait(seconds)
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def run_ranks(num_ranks: int, script: str, *arguments: object, seconds: float = 900) -> str:
    """Run a script to a good end; returns what all ranks have printed."""
    with TemporaryDirectory() as folder:
        return Ranks(script, arguments, Path(folder, "log"), num_ranks).finish(seconds)


def run_cases(num_ranks: int, cases: list) -> str:
    """Run the cases of cases.py one after another in the same processes; returns what was printed."""
    return run_ranks(num_ranks, "tests/distributed/cases.py", json.dumps(cases))
