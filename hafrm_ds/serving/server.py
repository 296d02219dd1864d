"""The server's life: it listens, loads, answers, and when it is asked to stop, answers what has come before it ends."""

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from hafrm_ds.errors import ConfigError
from hafrm_ds.serving.dispatcher import Dispatcher
from hafrm_ds.serving.front import Front
from hafrm_ds.serving.judges import about
from hafrm_ds.serving.options import ServingOptions

HEADER_SECONDS = 20
"""So long may a connection be silent, or its headers take, before it is closed."""
LOOK_SECONDS = 0.05


class PatientProtocol(H11Protocol):
    """A connection that is closed where a request's headers do not come within HEADER_SECONDS."""

    patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.wait()

    def wait(self) -> None:
        self.patience = self.loop.call_later(HEADER_SECONDS, self.timeout_keep_alive_handler)

    def stop_waiting(self) -> None:
        if self.patience is not None:
            self.patience.cancel()
            self.patience = None

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:  # its headers are there
            self.stop_waiting()

    def on_response_complete(self) -> None:
        self.stop_waiting()
        self.wait()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self.stop_waiting()
        super().connection_lost(exc)


class Server(uvicorn.Server):
    """uvicorn, whose signals are ours: it would close the door at once, where we answer 503."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(options: ServingOptions, say: Callable[[str], None]) -> None:
    """Serve until SIGTERM or Ctrl-C; a second one ends it at once.

    Args:
        say: prints what the operator is to know.

    Raises:
        ConfigError, ModelError: the reward cannot be used, or the address.
    """
    key = options.secret()
    judges = about(options, options.open())  # what is wrong is said before a process is started
    listener = listen(options)
    if not options.is_local and key is None:
        say(f"warning: {options.host} can be reached from other machines, and there is no --key")
    num_workers = options.workers or max(1, torch.cuda.device_count())
    asyncio.run(run(options, judges, key, listener, num_workers, say))


def listen(options: ServingOptions) -> socket.socket:
    """Raises ConfigError if the address cannot be had."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        return socket.create_server((options.host, options.port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError([f"--host {options.host} --port {options.port}: {error.strerror or error}"]) from error


async def run(
    options: ServingOptions,
    judges: dict[str, Any],
    key: str | None,
    listener: socket.socket,
    num_workers: int,
    say: Callable[[str], None],
) -> None:
    """Arguments as `Front` has them. Raises ModelError if the reward cannot be loaded."""
    dispatcher = Dispatcher(options, num_workers, say)
    front = Front(options, judges, dispatcher, key)
    config = uvicorn.Config(
        front.application(),
        http=PatientProtocol,
        ws="none",
        lifespan="off",
        access_log=False,  # it would show the key of a URL
        log_level="warning",
        timeout_keep_alive=HEADER_SECONDS,
        timeout_graceful_shutdown=5,
    )
    server = Server(config)
    answering = asyncio.create_task(server.serve(sockets=[listener]))
    stopping = asyncio.Event()

    def stop() -> None:
        if stopping.is_set():
            server.should_exit = server.force_exit = True
        stopping.set()
        front.is_draining = True

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    feeding: list[asyncio.Task] = []
    waiting = asyncio.create_task(stopping.wait())
    loading = asyncio.create_task(dispatcher.start())
    try:
        await asyncio.wait({loading, waiting, answering}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            feeding = loading.result()
            host, port = listener.getsockname()[:2]
            say(f"serving {options.model} on http://{host}:{port} ({num_workers} workers)")
        await asyncio.wait({waiting, answering, *feeding}, return_when=asyncio.FIRST_COMPLETED)
        for task in feeding:
            if task.done():
                task.result()  # it ends by a fault of ours alone
        if feeding and front.metrics.in_flight:
            say(f"stopping: {front.metrics.in_flight} requests are answered first")
        while feeding and front.metrics.in_flight and not server.should_exit:
            await asyncio.sleep(LOOK_SECONDS)
    finally:
        server.should_exit = True
        for task in (*feeding, waiting, loading):
            task.cancel()
        for worker in dispatcher.workers:
            worker.stop()
        await answering
    say("stopped")
