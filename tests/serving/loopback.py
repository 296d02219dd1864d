"""A server in the event loop of a test, on a free port of this machine, whose workers are threads, not processes."""

import asyncio
import functools
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx
import torch

from hafrm_ds.errors import ModelError
from hafrm_ds.serving import dispatcher, server
from hafrm_ds.serving.dispatcher import Worker
from hafrm_ds.serving.judges import about
from hafrm_ds.serving.options import ServingOptions
from hafrm_ds.serving.worker import Answer, Question, Served


def in_loop(scenario):
    """Makes a coroutine a test, which gets the fixtures that it names."""

    @functools.wraps(scenario)
    def test(**fixtures):
        asyncio.run(asyncio.wait_for(scenario(**fixtures), 60))

    return test


class Alive:
    """Stands for the process of a worker."""

    status: int | None = None

    def poll(self) -> int | None:
        return self.status


class ThreadWorker(Worker):
    """A worker that scores in a thread of this process."""

    one_loads = threading.Lock()

    def start(self) -> None:
        with self.one_loads:
            self.load()

    def load(self) -> None:
        self.served = Served.load(self.options, torch.device("cpu"))
        self.running = Alive(), None
        self.is_ready = True

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        return self.served.answers(questions)

    def stop(self) -> None:
        self.is_ready, self.running = False, None


def lengths(questions: Sequence[Question]) -> list[Answer]:
    """A reward without a model: how long the answer is."""
    return [Answer(float(len(question.item[-1]["content"]))) for question in questions]


OF_LENGTHS = {
    **{"model": "lengths", "scores": "composition", "logprobs": False, "missing": {}},
    **dict.fromkeys(("reference", "beta", "weights")),
}
"""What such a server says of its judges."""


def worker_of(answers: Callable[[Sequence[Question]], list[Answer]], faults: Sequence[str] = ()) -> type[ThreadWorker]:
    """Workers that need no model. faults: of the first attempts to start one."""
    left = list(faults)

    class Pretended(ThreadWorker):
        def start(self) -> None:
            if left:
                raise ModelError(left.pop(0))
            self.running, self.is_ready = (Alive(), None), True

        def ask(self, questions: Sequence[Question]) -> list[Answer]:
            return answers(questions)

    return Pretended


@dataclass
class Running:
    """A server that listens. task: its whole life. said: what the operator was told."""

    client: httpx.AsyncClient
    port: int
    task: asyncio.Task
    said: list[str]

    async def post(self, path: str, body: object, **more: object) -> httpx.Response:
        return await self.client.post(path, json=body, **more)

    async def metric(self, name: str) -> float:
        lines = (await self.client.get("/metrics")).text.splitlines()
        return float(next(line for line in lines if line.startswith(f"hafrm_{name} ")).split()[-1])


@asynccontextmanager
async def running(monkeypatch, worker: type[Worker] = ThreadWorker, num_workers: int = 1, **options) -> AsyncIterator:
    """Serve; ends as a test ends, without waiting for requests."""
    monkeypatch.setattr(dispatcher, "Worker", worker)
    chosen = ServingOptions(**{"model": "lengths", "port": 0} | options)
    listener = server.listen(chosen)
    port, said = listener.getsockname()[1], []
    judges = about(chosen, chosen.open()) if chosen.model.exists() else OF_LENGTHS
    task = asyncio.create_task(server.run(chosen, judges, chosen.secret(), listener, num_workers, said.append))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        try:
            for _ in range(600):
                if any("serving" in each for each in said) or task.done():
                    break
                await asyncio.sleep(0.02)
            yield Running(client, port, task, said)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
