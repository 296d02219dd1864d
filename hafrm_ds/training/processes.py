"""The processes of a run: who they are, work that one does before the others, and one voice for errors.

Everything here works before the process group exists: preparing data can take an hour, and a collective that waits so
long times out. The rendezvous store waits as long as it is told to.
"""

import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from hafrm_ds.errors import UserError

T = TypeVar("T")

PREPARATION_TIMEOUT = timedelta(hours=24)
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


class FailedElsewhere(UserError):
    """Another rank has met an error and reports it; this one only leaves."""


@dataclass
class Processes:
    """This process among those of the run."""

    rank: int
    local_rank: int
    world_size: int
    store: dist.Store

    @classmethod
    def join(cls) -> "Processes":
        """Meet the other processes that the launcher started; without a launcher this one is alone."""
        if "RANK" not in os.environ:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=COLLECTIVE_TIMEOUT))
        return cls(rank, int(os.environ.get("LOCAL_RANK", "0")), world_size, store)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    def in_turns(self, name: str, work: Callable[[], T]) -> T:
        """Run cached `work` on rank 0, then on the first rank of each other node, then on all others.

        The later ones find what the earlier ones left in the cache, on shared and on local disks. When a UserError
        stops the one that goes before, the others raise FailedElsewhere.
        """
        first, node = f"{name}/first", f"{name}/node/{socket.gethostname()}"
        if not self.is_first:
            awaited = first if self.local_rank == 0 else node
            self.store.wait([awaited], PREPARATION_TIMEOUT)
            if self.store.get(awaited) == b"failed":
                raise FailedElsewhere
        outcome = "failed"
        try:
            result = work()
            outcome = "done"
        finally:
            if self.is_first:
                self.store.set(first, outcome)
            if self.local_rank == 0:
                self.store.set(node, outcome)
        return result

    def start_group(self) -> None:
        """Start the process group of the collectives, on the store that is already there. Runs after one another in
        these processes share it."""
        if dist.is_initialized():
            return
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        dist.init_process_group(
            "nccl" if self.device.type == "cuda" else "gloo",
            store=dist.PrefixStore("group", self.store),
            rank=self.rank,
            world_size=self.world_size,
            timeout=COLLECTIVE_TIMEOUT,
        )

    def speaks(self) -> bool:
        """True for the first rank that asks: it is the one that reports an error."""
        try:
            return self.store.add("errors", 1) == 1
        except RuntimeError:  # the store's host has left: it has spoken
            return False


def run_entry(main: Callable[[list[str], Processes], None]) -> None:
    """Run an entry file: a UserError becomes one message from one rank, and exit status 1 on all."""
    processes = Processes.join()
    try:
        main(sys.argv[1:], processes)
    except UserError as error:
        if not isinstance(error, FailedElsewhere) and processes.speaks():
            print(f"\nerror: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    if dist.is_initialized():
        dist.destroy_process_group()
