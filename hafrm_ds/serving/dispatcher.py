"""From requests to workers: a queue of questions, from which each idle worker takes a batch.

What waits when a worker becomes idle goes through together, up to about a micro-batch, whoever asked it. Answers to one
prompt go together first, as the worker computes an equal prompt once. A worker that dies or hangs is started anew, and
what it was asked is answered by an error.
"""

import asyncio
import json
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from hafrm_ds.errors import ModelError, UserError
from hafrm_ds.serving.options import ServingOptions
from hafrm_ds.serving.rendered import Item, Rendered
from hafrm_ds.serving.worker import Answer, Kind, Question

CHARACTERS_OF_A_TOKEN = 3
"""About: a batch has as many characters as a micro-batch would. The worker counts tokens and partitions exactly."""
LOOK_SECONDS = 1.0
"""How often an idle worker is looked at: whether it is still there."""
LONGEST_PAUSE = 30.0
"""Between two attempts to start a worker that will not start."""


class QueueFull(Exception):
    """Too many conversations wait."""


class WorkerFailed(Exception):
    """A worker could not answer a batch; the message says which and why."""


class Worker:
    """A worker process as the front sees it. One thread at a time asks it.

    is_ready: it has loaded the reward and has not died since.
    """

    def __init__(self, number: int, num_workers: int, options: ServingOptions):
        self.number, self.num_workers, self.options = number, num_workers, options
        self.running: tuple[subprocess.Popen, Connection] | None = None
        self.is_ready = False

    @property
    def has_died(self) -> bool:
        return self.running is not None and self.running[0].poll() is not None

    def start(self) -> None:
        """Start its process and wait until it has loaded the reward. Raises ModelError if it cannot."""
        ours, theirs = Pipe()
        process = subprocess.Popen(
            [sys.executable, "-c", f"from hafrm_ds.serving.worker import main; main({theirs.fileno()})"],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        self.running = process, ours
        try:
            ours.send((self.options, self.number, self.num_workers))
            fault = ours.recv()
        except (EOFError, OSError):
            fault = f"worker {self.number} ended while it loaded {self.options.model} (status {process.wait()})"
        if fault:
            self.stop()
            raise ModelError(fault)
        self.is_ready = True

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Raises WorkerFailed if it dies or hangs, which ends it."""
        assert self.running is not None
        process, connection = self.running
        try:
            connection.send(list(questions))
            if not connection.poll(self.options.timeout):
                self.stop()
                raise WorkerFailed(
                    f"worker {self.number} took longer than {self.options.timeout:g} seconds and was ended"
                )
            return connection.recv()
        except (EOFError, OSError):
            self.is_ready = False
            status = process.wait()
            self.stop()
            raise WorkerFailed(f"worker {self.number} died (status {status}) while it scored this request") from None

    def stop(self) -> None:
        self.is_ready = False
        if self.running is not None:
            process, connection = self.running
            self.running = None
            process.kill()
            process.wait()
            connection.close()


@dataclass(frozen=True)
class Waiting:
    """A question in the queue, and where its answer goes.

    prompt: what it shares with other answers to its prompt. shared, own: characters of that, and of the rest.
    """

    question: Question
    answer: asyncio.Future[Answer]
    prompt: str
    shared: int
    own: int

    @classmethod
    def of(cls, question: Question, answer: asyncio.Future[Answer]) -> "Waiting":
        item = question.item
        if isinstance(item, Rendered):
            return cls(question, answer, item.prompt or item.text, len(item.prompt), len(item.text) - len(item.prompt))
        *shared, own = (len(message.get("content") or "") for message in item)
        return cls(question, answer, json.dumps(item[:-1], sort_keys=True), sum(shared), own)


def choose(queue: Sequence[Waiting], budget: int) -> tuple[list[Waiting], deque[Waiting]]:
    """Choose what goes through together; returns that and what waits on, in order of arrival. Who has waited longest
    comes first, with all who share its prompt, then the next, up to `budget` characters, and one at least. Questions
    whose client has left are in neither.
    """
    by_prompt: dict[tuple[Kind, str], list[Waiting]] = {}
    for each in queue:
        if not each.answer.done():
            by_prompt.setdefault((each.question.kind, each.prompt), []).append(each)
    batch: list[Waiting] = []
    for group in by_prompt.values():
        budget -= group[0].shared
        for each in group:
            budget -= each.own
            if budget < 0 and batch:
                break
            batch.append(each)
        if budget < 0:
            break
    chosen = set(map(id, batch))
    return batch, deque(each for each in queue if id(each) not in chosen and not each.answer.done())


@dataclass
class Dispatcher:
    """The queue and its workers. All its methods run in the event loop.

    say: prints what the operator is to know.
    """

    options: ServingOptions
    num_workers: int
    say: Callable[[str], None]
    queue: deque[Waiting] = field(default_factory=deque)
    workers: list[Worker] = field(default_factory=list)
    restarts: int = 0
    batches: int = 0
    tokens: int = 0
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    async def start(self) -> list[asyncio.Task]:
        """Start all workers; returns the tasks that feed them. Raises ModelError if a worker cannot load the reward."""
        self.workers = [Worker(number, self.num_workers, self.options) for number in range(self.num_workers)]
        # A thread for each, which waits for it.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(self.num_workers))
        await asyncio.gather(*(asyncio.to_thread(worker.start) for worker in self.workers))
        return [asyncio.create_task(self.feed(worker)) for worker in self.workers]

    @property
    def num_ready(self) -> int:
        return sum(worker.is_ready and not worker.has_died for worker in self.workers)

    async def ask(self, kind: Kind, items: Sequence[Item]) -> list[Answer]:
        """Answers in order. Raises QueueFull, and WorkerFailed if a worker dies meanwhile."""
        if len(self.queue) + len(items) > self.options.max_queue:
            raise QueueFull
        loop = asyncio.get_running_loop()
        waiting = [Waiting.of(Question(kind, item), loop.create_future()) for item in items]
        self.queue.extend(waiting)
        self.arrived.set()
        try:
            return await asyncio.gather(*(each.answer for each in waiting))
        finally:  # nobody waits for the others any more
            for each in waiting:
                each.answer.cancel()
            if any(each.answer.cancelled() for each in waiting):  # they take up no room either
                self.queue = deque(each for each in self.queue if not each.answer.done())

    # ---- workers -----------------------------------------------------------------------------------------------------

    async def feed(self, worker: Worker) -> None:
        """Give a worker what waits, for ever."""
        while True:
            if worker.running is None or worker.has_died:
                await self.restart(worker)
            batch = await self.take()
            if worker.has_died:  # it was idle, and was asked nothing yet
                self.queue.extendleft(reversed(batch))
            elif batch:
                await self.answer(worker, batch)

    async def answer(self, worker: Worker, batch: list[Waiting]) -> None:
        self.batches += 1
        try:
            answers = await asyncio.to_thread(worker.ask, [each.question for each in batch])
        except WorkerFailed as error:
            self.say(str(error))
            for each in batch:
                if not each.answer.done():
                    each.answer.set_exception(error)
            return
        for each, answer in zip(batch, answers, strict=True):
            self.tokens += answer.tokens
            if not each.answer.done():
                each.answer.set_result(answer)

    async def take(self) -> list[Waiting]:
        """What a worker is to be asked next; [] where nothing has come for LOOK_SECONDS."""
        budget = CHARACTERS_OF_A_TOKEN * self.options.max_tokens_per_micro_batch
        if not self.queue:
            self.arrived.clear()
            try:
                await asyncio.wait_for(self.arrived.wait(), LOOK_SECONDS)
            except TimeoutError:
                return []
            await asyncio.sleep(self.options.max_wait_ms / 1000)
        batch, self.queue = choose(self.queue, budget)
        return batch

    async def restart(self, worker: Worker) -> None:
        """Start a worker anew, until it has started."""
        pause = 1.0
        while True:
            worker.stop()
            self.restarts += 1
            started = time.monotonic()
            try:
                await asyncio.to_thread(worker.start)
            except UserError as error:
                self.say(f"worker {worker.number} cannot be started, again in {pause:g} seconds: {error}")
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
                continue
            self.say(f"worker {worker.number} was started anew in {time.monotonic() - started:.1f} seconds")
            return
