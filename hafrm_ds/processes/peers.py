"""The watch of the ranks over one another: a rank that hangs in a collective because another has ended is ended too.

Every rank holds a connection to rank 0. The kernel closes it when the process dies, and asks the other host every few
seconds whether it is there, as a link that is cut says nothing: no rank has to report that it is well, and a rank that
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

import torch.distributed as dist

GRACE_SECONDS = 3.0
"""What a rank gets to leave by itself, with its own message, once another has ended."""
LINGER_SECONDS = 5.0
"""Rank 0 keeps the rendezvous store: it leaves last, unless others take longer than this."""
TICK_SECONDS = 0.5
LEAVES = "leaves"
UNREACHABLE_SECONDS = 15
"""So long a host may be silent: a network that forgets a few seconds must not end a run."""
KEEPALIVE = {
    socket.TCP_KEEPIDLE: 5,
    socket.TCP_KEEPINTVL: 2,
    socket.TCP_KEEPCNT: (UNREACHABLE_SECONDS - 5) // 2,
    socket.TCP_USER_TIMEOUT: 1000 * UNREACHABLE_SECONDS,  # the same for what was sent and not received
}
CONNECT_SECONDS = 60
"""So long a rank may take to be connected, and to say who it is: its host may be busy."""
LONGEST_INTRODUCTION = 1024
"""Bytes of the line in which a rank says who it is, at most."""
UNREACHABLE = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN)


class PeerWatch(threading.Thread):
    """A thread of each rank that ends the process when another rank has ended or failed.

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
        self.selector = selectors.DefaultSelector()
        self.peers: dict[socket.socket, str] = {}
        """Open connections and the name of the rank at the other end."""
        self.strangers: dict[socket.socket, tuple[bytearray, float]] = {}
        """Connections that have not said yet who they are: what they have said of it, and until when they may."""
        self.listener: socket.socket | None = None
        if rank == 0:
            self.token = secrets.token_hex(8)  # a stranger who tries the port is none of the ranks
            self.listener = socket.create_server(("", 0), backlog=world_size)
            self.selector.register(self.listener, selectors.EVENT_READ)
            store.set("peer watch", f"{self.listener.getsockname()[1]} {self.token} {name}")
        else:
            port, token, first = store.get("peer watch").decode().split(maxsplit=2)
            to_first = socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS)
            to_first.settimeout(None)
            to_first.sendall(f"{token} {name}\n".encode())
            self.add(to_first, first)
        self.start()

    def accept(self) -> None:
        connection, _ = self.listener.accept()
        connection.setblocking(False)
        self.strangers[connection] = bytearray(), time.monotonic() + CONNECT_SECONDS
        self.selector.register(connection, selectors.EVENT_READ)

    def get_to_know(self, stranger: socket.socket) -> None:
        """Read on in the first line of a connection, which makes it one of the ranks or ends it."""
        said, _ = self.strangers[stranger]
        is_over = False
        try:
            while not said.endswith(b"\n") and not is_over:
                byte = stranger.recv(1)  # what follows the line is for `hear`
                said += byte
                is_over = not byte or len(said) == LONGEST_INTRODUCTION
        except BlockingIOError:
            return
        except OSError:
            is_over = True
        self.forget(stranger)
        token, _, name = said.decode(errors="replace").strip().partition(" ")
        if is_over or token != self.token:
            stranger.close()
            return
        stranger.setblocking(True)
        self.add(stranger, name)

    def forget(self, stranger: socket.socket) -> None:
        self.selector.unregister(stranger)
        del self.strangers[stranger]

    def drop_the_silent(self) -> None:
        now = time.monotonic()
        for stranger in [each for each, (_, deadline) in self.strangers.items() if now > deadline]:
            self.forget(stranger)
            stranger.close()

    def add(self, connection: socket.socket, name: str) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE.items():
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        self.peers[connection] = name
        self.selector.register(connection, selectors.EVENT_READ)

    def run(self) -> None:
        while True:
            for key, _ in self.selector.select(TICK_SECONDS):
                if key.fileobj is self.listener:
                    self.accept()
                elif key.fileobj in self.strangers:
                    self.get_to_know(key.fileobj)
                else:
                    self.hear(key.fileobj)
            self.drop_the_silent()
            self.on_tick()
            if time.monotonic() > self.deadline and not self.is_leaving:
                print(f"{self.title} stops: {self.verdict}", file=sys.stderr, flush=True)
                self.end(1)
                return

    def hear(self, connection: socket.socket) -> None:
        silence = f"{self.peers[connection]} has ended"
        try:
            said = connection.recv(1024).decode().splitlines()
        except OSError as error:
            said = []
            if error.errno in UNREACHABLE:
                silence = f"{self.peers[connection]} cannot be reached: its host, or the network between, is down"
        for line in said or [silence]:
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
