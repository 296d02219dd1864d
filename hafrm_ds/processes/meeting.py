"""How the processes of a run meet: rank 0 opens the rendezvous store, and each waits there until all have come.

torch waits for that inside its C++ code, where Python hears no signal. Here the store is opened in a thread beside the
main one and the arrivals are counted in Python, so that a signal ends a waiting rank at once.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from hafrm_ds.errors import UserError
from hafrm_ds.processes.launchers import TIMEOUT_VARIABLE, Placement
from hafrm_ds.processes.stopping import Stopped

NOTICE_SECONDS = 60.0
"""After so long, and every ten times so long again, a waiting rank says whom it waits for."""
POLL_SECONDS, LONGEST_POLL_SECONDS = 0.05, 0.5
FAREWELL_SECONDS = 2 * LONGEST_POLL_SECONDS
"""Rank 0 keeps the store: so long it waits when it leaves, for the others to read why."""
ARRIVED, LEFT = "met", "left before all had met"
RANKS_NAMED = 8


def meet(placement: Placement, timeout: timedelta, on_wait: Callable[[], None] = lambda: None) -> dist.Store:
    """The store that all processes share, once all are there.

    Args:
        on_wait: called again and again while this rank waits.

    Raises:
        UserError: rank 0 cannot be found, two processes are the same rank, or not all come in time.
        Stopped: a signal has come, here or to another rank that waits.
    """
    who, where = f"rank {placement.rank} on {placement.host}", f"{placement.address}:{placement.port}"
    try:
        socket.getaddrinfo(placement.address, placement.port)
    except OSError as error:
        raise UserError(
            f"{placement.host} does not know the address {placement.address} of rank 0 ({error.strerror}); set "
            "MASTER_ADDR to one that all hosts reach"
        ) from error
    opened: list[dist.Store | Exception] = []
    absent = "rank 0"
    wait = Patience(timeout, lambda: f"{who} is waiting at {where} for {absent}", on_wait)
    store: dist.Store | None = None
    try:
        threading.Thread(target=lambda: opened.append(open_store(placement, timeout)), daemon=True).start()
        while not opened:
            wait.a_moment()
        if isinstance(opened[0], Exception):
            raise opened[0]
        store = opened[0]
        if store.add(f"{ARRIVED}/{placement.rank}", 1) > 1:
            raise UserError(
                f"two processes at {where} say that they are rank {placement.rank} of {placement.world_size}: "
                "each needs a RANK of its own"
            )
        store.add(ARRIVED, 1)
        while store.add(ARRIVED, 0) < placement.world_size:
            if store.check([LEFT]):
                raise Stopped(store.get(LEFT).decode(), is_told=True)
            if wait.speaks_next:
                absent = ranks_in_words(
                    rank for rank in range(placement.world_size) if not store.check([f"{ARRIVED}/{rank}"])
                )
            wait.a_moment()
    except (dist.DistError, TimeoutError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(
            f"{who} has not met the others of the {placement.world_size} processes at {where} ({reason}). "
            "If the port is taken, choose another (MASTER_PORT); if the hosts do not reach one another, choose another "
            f"address (MASTER_ADDR) or open the ports. They wait for {timeout} ({TIMEOUT_VARIABLE})"
        ) from error
    except Stopped as stop:
        if store is not None:
            stop.is_told = stop.is_told or not is_first_to_leave(store, stop.reason)
            time.sleep(FAREWELL_SECONDS if placement.rank == 0 else 0)
        raise
    return store


def open_store(placement: Placement, timeout: timedelta) -> dist.Store | Exception:
    """The rendezvous store, or why it cannot be had. torchrun's agent may keep one for all ranks; else rank 0 does."""
    is_kept_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = dist.TCPStore(
            placement.address,
            placement.port,
            placement.world_size,
            is_master=placement.rank == 0 and not is_kept_by_agent,
            timeout=timeout,
            wait_for_workers=False,
            multi_tenant=True,
        )
        if is_kept_by_agent:  # it still has what an attempt before this one has written (torchrun --max-restarts)
            return dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        return store
    except Exception as error:
        return error


def is_first_to_leave(store: dist.Store, reason: str) -> bool:
    """Tell the others that a rank leaves and why; whether this is the first that does."""
    with suppress(dist.DistError):  # else rank 0, which keeps the store, has left: it has spoken
        if store.add(f"{LEFT}/ranks", 1) == 1:
            store.set(LEFT, reason)
            return True
    return False


def ranks_in_words(ranks) -> str:
    ranks = list(ranks)
    if not ranks:
        return "the others"
    more = f" and {len(ranks) - RANKS_NAMED:,} more" if len(ranks) > RANKS_NAMED else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:RANKS_NAMED]))}{more}"


class Patience:
    """Waiting in small steps, in Python, where signals are heard.

    Args:
        timeout: a_moment raises TimeoutError after so long.
        what: says what is waited for.
        on_wait: called at each step.
    """

    def __init__(self, timeout: timedelta, what: Callable[[], str], on_wait: Callable[[], None]):
        self.what, self.on_wait, self.pause = what, on_wait, POLL_SECONDS
        now = time.monotonic()
        self.end, self.next_notice = now + timeout.total_seconds(), now + NOTICE_SECONDS

    @property
    def speaks_next(self) -> bool:
        now = time.monotonic()
        return now >= self.next_notice or now >= self.end

    def a_moment(self) -> None:
        now = time.monotonic()
        if now >= self.end:
            raise TimeoutError(f"time is over: {self.what()}")
        if now >= self.next_notice:
            print(self.what(), file=sys.stderr, flush=True)
            self.next_notice = now + 10 * NOTICE_SECONDS
        self.on_wait()
        time.sleep(self.pause)
        self.pause = min(1.2 * self.pause, LONGEST_POLL_SECONDS)
