"""The watch of the ranks over one another: a rank that hangs in a collective because another has ended is ended too.

Every rank holds a connection to rank 0, which the kernel keeps alive and closes when the process dies: no rank has to
report that it is well, and a rank that is busy is never taken for a dead one. Rank 0 tells all others what has
happened. A thousand ranks are a thousand idle sockets.
"""

import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import torch.distributed as dist

GRACE_SECONDS = 3.0
"""What a rank gets to leave by itself, with its own message, once another has ended."""
LINGER_SECONDS = 5.0
"""Rank 0 keeps the rendezvous store: it leaves last, unless others take longer than this."""
TICK_SECONDS = 0.5
LEAVES = "leaves"
KEEPALIVE = {socket.TCP_KEEPIDLE: 2, socket.TCP_KEEPINTVL: 1, socket.TCP_KEEPCNT: 3}
"""A machine that is gone without closing its connections is noticed after 5 seconds."""


class PeerWatch(threading.Thread):
    """A thread of each rank that ends the process when another rank has ended or failed.

    Args:
        store: rendezvous store, by which rank 0 tells its address.
        on_tick: called twice a second, for what else is to be watched.
        end: ends the process; replaced in tests.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        store: dist.Store,
        host: str,
        on_tick: Callable[[], None] = lambda: None,
        end: Callable[[int], None] = os._exit,
    ):
        super().__init__(name="peer watch", daemon=True)
        self.rank, self.on_tick, self.end = rank, on_tick, end
        self.verdict: str | None = None
        self.deadline = float("inf")
        self.is_leaving = False
        self.selector = selectors.DefaultSelector()
        self.peers: dict[socket.socket, int] = {}
        """Open connections and the rank at the other end."""
        self.listener: socket.socket | None = None
        if rank == 0:
            self.token = secrets.token_hex(8)  # a stranger who tries the port is none of the ranks
            self.listener = socket.create_server(("", 0), backlog=world_size)
            self.selector.register(self.listener, selectors.EVENT_READ)
            store.set("peer watch", f"{self.listener.getsockname()[1]} {self.token}")
        else:
            port, token = store.get("peer watch").decode().split()
            to_first = socket.create_connection((host, int(port)))
            to_first.sendall(f"{token} {rank}\n".encode())
            self.add(to_first, 0)
        self.start()

    def accept(self) -> None:
        connection, _ = self.listener.accept()
        connection.settimeout(TICK_SECONDS)
        try:
            token, rank = connection.recv(1024).decode().split()
        except (OSError, ValueError):
            token = None
        if token != self.token:
            connection.close()
            return
        connection.settimeout(None)
        self.add(connection, int(rank))

    def add(self, connection: socket.socket, rank: int) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE.items():
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        self.peers[connection] = rank
        self.selector.register(connection, selectors.EVENT_READ)

    def run(self) -> None:
        while True:
            for key, _ in self.selector.select(TICK_SECONDS):
                if key.fileobj is self.listener:
                    self.accept()
                else:
                    self.hear(key.fileobj)
            self.on_tick()
            if time.monotonic() > self.deadline and not self.is_leaving:
                print(f"rank {self.rank} stops: {self.verdict}", file=sys.stderr, flush=True)
                self.end(1)
                return

    def hear(self, connection: socket.socket) -> None:
        try:
            said = connection.recv(1024).decode().splitlines()
        except OSError:
            said = []
        other = self.peers[connection]
        for line in said or [f"rank {other} has ended"]:
            if line != LEAVES:
                self.condemn(line)
        if not said or LEAVES in said:
            self.selector.unregister(connection)
            del self.peers[connection]
            connection.close()

    def condemn(self, verdict: str) -> None:
        """Note what has happened, tell the others, and give this process a moment to leave by itself."""
        if self.verdict is None:
            self.verdict, self.deadline = verdict, time.monotonic() + GRACE_SECONDS
            if self.rank == 0:
                self.tell(verdict)

    def tell(self, message: str) -> None:
        for connection in list(self.peers):
            with suppress(OSError):  # it may have ended meanwhile
                connection.sendall(f"{message}\n".encode())

    def leave(self, verdict: str | None = None) -> None:
        """Say that this rank ends, and, if the others cannot go on without it, why. Rank 0 leaves last if it can."""
        self.is_leaving = True
        if verdict is not None:
            self.condemn(verdict)
            if self.rank != 0:
                self.tell(verdict)
        end = time.monotonic() + LINGER_SECONDS
        while self.rank == 0 and self.peers and time.monotonic() < end:
            time.sleep(0.02)
        self.tell(LEAVES)
