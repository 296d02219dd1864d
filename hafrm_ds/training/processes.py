"""The processes of a run: who they are, work that one does before the others, and one voice for errors.

Everything here works before the process group exists: preparing data can take an hour, and a collective that waits so
long times out. The rendezvous store waits as long as it is told to.
"""

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from hafrm_ds.errors import UserError
from hafrm_ds.training.peers import PeerWatch
from hafrm_ds.training.stopping import STOPPED_STATUS, Launcher, Stopped, StopRequest

T = TypeVar("T")

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
POLL_SECONDS, LONGEST_POLL_SECONDS = 0.1, 2.0
"""Ranks that wait ask rank 0's store less and less often: there may be a thousand of them."""
ERRORS = "errors"
"""Key in the store: how many ranks have met an error."""


class FailedElsewhere(UserError):
    """Another rank has met an error and reports it; this one only leaves."""


@dataclass
class Processes:
    """This process among those of the run.

    stopping: what has asked this process to stop, if anything has.
    watch: tells when another process has ended; None where nobody watches.
    errors: the store in which ranks say that they have met an error; the same for all jobs of `for_job`.
    """

    rank: int
    local_rank: int
    world_size: int
    store: dist.Store
    stopping: StopRequest = field(default_factory=StopRequest)
    watch: PeerWatch | None = None
    errors: dist.Store | None = None

    def __post_init__(self):
        if self.errors is None:
            self.errors = self.store

    def for_job(self, name: str) -> "Processes":
        """These processes for one of several jobs one after another, with names of its own in the store."""
        return replace(self, store=dist.PrefixStore(name, self.store))

    @classmethod
    def join(cls) -> "Processes":
        """Meet the other processes that the launcher started; without a launcher this one is alone.

        From here on signals are caught, and the processes and their launcher are watched.
        """
        stopping = StopRequest()
        stopping.install()
        launcher = Launcher.above() if "RANK" in os.environ else None
        if launcher is None:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=COLLECTIVE_TIMEOUT))
        watch = PeerWatch(
            rank,
            world_size,
            store,
            os.environ["MASTER_ADDR"],
            on_tick=lambda: stopping.stop_if_lost(launcher) if launcher is not None else None,
        )
        return cls(rank, int(os.environ.get("LOCAL_RANK", "0")), world_size, store, stopping, watch)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    def use_device(self) -> None:
        """Make this process's GPU the one that kernels run on when they are not told."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def in_turns(self, name: str, work: Callable[[], T]) -> T:
        """Run cached `work` on rank 0, then on the first rank of each other node, then on all others.

        The later ones find what the earlier ones left in the cache, on shared and on local disks.

        Raises:
            FailedElsewhere: an error has stopped another rank meanwhile.
        """
        first, node = f"{name}/first", f"{name}/node/{socket.gethostname()}"
        if not self.is_first:
            self.wait(lambda: self.store.check([first if self.local_rank == 0 else node]))
        result = work()
        if self.is_first:
            self.store.set(first, "done")
        if self.local_rank == 0:
            self.store.set(node, "done")
        return result

    def from_first(self, name: str, work: Callable[[], str]) -> str:
        """The text that `work` gives on rank 0, on every rank; the others wait for it as long as it takes.

        Raises:
            FailedElsewhere: an error has stopped another rank meanwhile.
        """
        key = f"text/{name}"
        if self.is_first:
            self.store.set(key, work())
        else:
            self.wait(lambda: self.store.check([key]))
        return self.store.get(key).decode()

    def texts_of_all(self, name: str, text: str) -> list[str]:
        """What each rank gives, on rank 0, which waits for all; an empty list elsewhere.

        Raises:
            FailedElsewhere: an error has stopped another rank meanwhile.
        """
        self.store.set(f"text/{name}/{self.rank}", text)
        if not self.is_first:
            return []
        keys = [f"text/{name}/{rank}" for rank in range(self.world_size)]
        self.wait(lambda: self.store.check(keys))
        return [self.store.get(key).decode() for key in keys]

    def wait(self, condition: Callable[[], bool]) -> None:
        """Wait for as long as it takes.

        Raises:
            FailedElsewhere: another rank has reported an error, or rank 0, which keeps the store, has left.
        """
        pause = POLL_SECONDS
        try:
            while not condition():
                if self.errors.check([ERRORS]):
                    raise FailedElsewhere
                time.sleep(pause)
                pause = min(1.2 * pause, LONGEST_POLL_SECONDS)
        except dist.DistError as error:
            raise FailedElsewhere from error

    def start_group(self) -> None:
        """Start the process group of the collectives, on the store that is already there. Runs after one another in
        these processes, each with a store of its own, share it."""
        # A rank that has met an error never arrives; the group would wait for it until the collectives time out.
        self.store.add("arrived", 1)
        self.wait(lambda: self.store.add("arrived", 0) == self.world_size)
        if dist.is_initialized():
            return
        self.use_device()
        dist.init_process_group(
            "nccl" if self.device.type == "cuda" else "gloo",
            store=dist.PrefixStore("group", self.store),
            rank=self.rank,
            world_size=self.world_size,
            timeout=COLLECTIVE_TIMEOUT,
        )

    def report(self, error: UserError) -> bool:
        """Print the message of an error that stops this rank, unless another rank has; True if it was printed."""
        if isinstance(error, FailedElsewhere) or not self.speaks():
            return False
        print(f"\nerror: {error}", file=sys.stderr, flush=True)
        return True

    def speaks(self) -> bool:
        """True for the first rank that asks."""
        try:
            return self.errors.add(ERRORS, 1) == 1
        except dist.DistError:  # rank 0, which keeps the store, has left: it has spoken
            return False


def run_entry(main: Callable[[list[str], Processes], None]) -> None:
    """Run an entry file: a UserError becomes one message from one rank, and exit status 1 on all.

    A collective that fails because another rank has left is the consequence of an error, not the error: the rank whose
    it is reports it. Anything else keeps its traceback; ranks that wait for this one are told, for they would wait for
    ever. A run that was asked to stop ends with STOPPED_STATUS.
    """
    # torch then asks for huge pages when it allocates on the CPU, where page faults otherwise take a quarter of a step.
    # It reads this at its first allocation.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        processes = Processes.join()
    except Stopped as stop:
        print(f"\n{stop}", file=sys.stderr, flush=True)
        sys.exit(STOPPED_STATUS)
    status, verdict = 1, f"rank {processes.rank} has met an error"
    try:
        main(sys.argv[1:], processes)
        status, verdict = 0, None
    except Stopped as stop:
        # All ranks have agreed on it if something was saved; else the others cannot go on without this one.
        status, verdict = STOPPED_STATUS, None if stop.checkpoint else f"rank {processes.rank} was asked to stop"
        if processes.speaks():  # and those that wait for this rank learn that it leaves
            print(f"\n{stop}", file=sys.stderr, flush=True)
    except UserError as error:
        processes.report(error)
    except Exception as error:
        if is_lost_connection(error):
            cause = (processes.watch and processes.watch.verdict) or "another process of the run has ended"
            print(f"rank {processes.rank} stops: {cause}", file=sys.stderr, flush=True)
        else:
            processes.speaks()
            traceback.print_exc()
    processes.stopping.defer()  # what follows must not be interrupted by an impatient launcher
    if processes.watch is not None:
        processes.watch.leave(verdict)
    if status:
        sys.exit(status)
    if dist.is_initialized():
        dist.destroy_process_group()


def is_lost_connection(error: Exception) -> bool:
    """A collective that failed, or a store that is gone: gloo raises a plain RuntimeError that names its own source."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))
