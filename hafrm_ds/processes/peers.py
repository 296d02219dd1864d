"""The watch of the ranks over one another: a rank that hangs in a collective because another has ended is ended too.

Every rank holds a connection to rank 0. The kernel closes it when the process dies, and asks the other host every few
seconds whether it is there, as a broken link says nothing: no rank has to report that it is well, and a rank that
is busy is never taken for a dead one. Rank 0 tells all others what has happened. A thousand ranks are a thousand idle
sockets.
"""

import errno
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import cast

import torch.distributed as dist

GRACE_SECONDS = 3.0
"""What a rank gets to leave by itself, with its own message, once another has ended."""
LINGER_SECONDS = 5.0
"""Rank 0 keeps the rendezvous store: it leaves last, unless others take longer than this."""
TICK_SECONDS = 0.5
VERDICT_SECONDS = 2.0
"""Word of a process that has ended comes within this, from host to host."""
LEAVES = "leaves"
UNREACHABLE_SECONDS = 15
"""So long a host may be silent: a network that forgets a few seconds must not end a run."""
KEEPALIVE = {
    socket.TCP_KEEPIDLE: 5,
    socket.TCP_KEEPINTVL: 2,
    socket.TCP_KEEPCNT: (UNREACHABLE_SECONDS - 5) // 2,
    socket.TCP_USER_TIMEOUT: 1000 * UNREACHABLE_SECONDS,  # the same for what was sent and not received
}
REACH_SECONDS = 15
"""A rank that has not reached the watch of rank 0 by then goes without: a firewall drops what is sent to its port."""
INTRODUCTION_SECONDS = 60
"""A connection that has not introduced itself by then is closed; a busy host may take a while."""
LONGEST_INTRODUCTION = 1024
"""Most bytes of the line in which a rank introduces itself."""
UNREACHABLE = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN)


class PeerWatch(threading.Thread):
    """A thread of each rank that ends the process when another rank has ended or failed.

    A rank that cannot reach rank 0's port neither watches nor is watched (`problem` says why); it calls on_tick.

    Args:
        store: rendezvous store, by which rank 0 tells its address.
        name: of this rank, for messages.
        on_tick: called twice a second, for what else is to be watched.
        end: ends the process; replaced in tests.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        store: dist.Store,
        host: str,
        name: str,
        on_tick: Callable[[], None] = lambda: None,
        end: Callable[[int], None] = os._exit,
    ):
        super().__init__(name="peer watch", daemon=True)
        self.rank, self.title, self.on_tick, self.end = rank, name, on_tick, end
        self.verdict: str | None = None
        self.deadline = float("inf")
        self.is_leaving = False
        self.problem: str | None = None
        """Why this rank is not watched; None where it is."""
        self.selector = selectors.DefaultSelector()
        self.peers: dict[socket.socket, str] = {}
        """Open connections and the name of the rank at the other end."""
        self.unauthenticated: dict[socket.socket, tuple[bytearray, float]] = {}
        """Connections that have not introduced themselves: what they have sent so far, and until when they may."""
        self.listener: socket.socket | None = None
        if rank == 0:
            self.token = secrets.token_hex(8)  # whoever else tries the port is none of the ranks
            self.listener = socket.create_server(("", 0), backlog=world_size)
            self.selector.register(self.listener, selectors.EVENT_READ)
            store.set("peer watch", f"{self.listener.getsockname()[1]} {self.token} {name}")
        else:
            port, token, first = store.get("peer watch").decode().split(maxsplit=2)
            try:
                to_first = socket.create_connection((host, int(port)), timeout=REACH_SECONDS)
                to_first.settimeout(None)
                to_first.sendall(f"{token} {name}\n".encode())
                self.add(to_first, first)
            except OSError as error:
                self.problem = f"{host}:{port}: {error}"
        self.start()

    def accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except OSError:  # no free descriptor, or it is gone again: it stays in the queue, and the watch goes on
            time.sleep(TICK_SECONDS)
            return
        connection.setblocking(False)
        self.unauthenticated[connection] = bytearray(), time.monotonic() + INTRODUCTION_SECONDS
        self.selector.register(connection, selectors.EVENT_READ)

    def authenticate(self, connection: socket.socket) -> None:
        """Read what has come of a connection's first line: its token makes it a rank, all else ends it."""
        said, _ = self.unauthenticated[connection]
        is_over = False
        try:
            while not said.endswith(b"\n") and not is_over:
                byte = connection.recv(1)  # what follows the line is for `receive`
                said += byte
                is_over = not byte or len(said) == LONGEST_INTRODUCTION
        except BlockingIOError:
            return
        except OSError:
            is_over = True
        self.forget(connection)
        token, _, name = said.decode(errors="replace").strip().partition(" ")
        if is_over or token != self.token:
            connection.close()
            return
        connection.setblocking(True)
        self.add(connection, name)

    def forget(self, connection: socket.socket) -> None:
        self.selector.unregister(connection)
        del self.unauthenticated[connection]

    def close_the_silent(self) -> None:
        """Close connections that have not introduced themselves in time."""
        now = time.monotonic()
        for connection in [each for each, (_, deadline) in self.unauthenticated.items() if now > deadline]:
            self.forget(connection)
            connection.close()

    def add(self, connection: socket.socket, name: str) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE.items():
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        self.peers[connection] = name
        self.selector.register(connection, selectors.EVENT_READ)

    def run(self) -> None:
        while True:
            for key, _ in self.selector.select(TICK_SECONDS):
                ready = cast(socket.socket, key.fileobj)
                if ready is self.listener:
                    self.accept(ready)
                elif ready in self.unauthenticated:
                    self.authenticate(ready)
                else:
                    self.receive(ready)
            self.close_the_silent()
            self.on_tick()
            if time.monotonic() > self.deadline and not self.is_leaving:
                print(f"{self.title} stops: {self.verdict}", file=sys.stderr, flush=True)
                self.end(1)
                return

    def receive(self, connection: socket.socket) -> None:
        """Read what a peer reports, or that its connection has closed."""
        silence = f"{self.peers[connection]} has ended"
        try:
            said = connection.recv(1024).decode().splitlines()
        except OSError as error:
            said = []
            if error.errno in UNREACHABLE:
                silence = f"{self.peers[connection]} cannot be reached: its host, or the network between, is down"
        for line in said or [silence]:
            if line != LEAVES:
                self.fail(line)
        if not said or LEAVES in said:
            self.selector.unregister(connection)
            del self.peers[connection]
            connection.close()

    def fail(self, verdict: str) -> None:
        """Note what has happened, tell the others, and give this process a moment to leave by itself."""
        if self.verdict is None:
            self.verdict, self.deadline = verdict, time.monotonic() + GRACE_SECONDS
            if self.rank == 0:
                self.tell(verdict)

    def verdict_soon(self) -> str | None:
        """The verdict, which may be on its way where a collective has failed first."""
        end = time.monotonic() + VERDICT_SECONDS
        while self.verdict is None and time.monotonic() < end and self.is_alive():
            time.sleep(0.02)
        return self.verdict

    def tell(self, message: str) -> None:
        for connection in list(self.peers):
            with suppress(OSError):  # it may have ended meanwhile
                connection.sendall(f"{message}\n".encode())

    def leave(self, verdict: str | None = None) -> None:
        """Say that this rank ends, and why, if the others cannot continue without it. Rank 0 leaves last if it can."""
        self.is_leaving = True
        if verdict is not None:
            self.fail(verdict)
            if self.rank != 0:
                self.tell(verdict)
        end = time.monotonic() + LINGER_SECONDS
        while self.rank == 0 and self.peers and time.monotonic() < end:
            time.sleep(0.02)
        self.tell(LEAVES)
