"""A Python function of the user as a reward, in a process of its own.

    def brevity(prompt, answer):        # messages before the last one, and its text
        return -len(answer) / 1000      # a number, or a list of numbers, one for each span of the answer

A function of one argument gets the messages of the whole conversation. A file of its own process cannot harm the job:
a call that raises, hangs or ends the process costs the row its score alone, and a model that the file loads is loaded
plainly, whatever DeepSpeed does in the job.
"""

import ast
import hashlib
import math
import statistics
import subprocess
import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from hafrm_ds.errors import ModelError
from hafrm_ds.rewards import function_process
from hafrm_ds.rewards.reward import Loader, Score
from hafrm_ds.saved.scorer import Conversation

START_SECONDS = 300.0
"""So long may the file take to be imported."""


@dataclass(frozen=True)
class OpenedFunction:
    """A function in a file. Build it with `open`.

    content: SHA-256 of the file. is_batched: it takes lists of all its arguments and returns as many values.
    timeout: seconds that one call may take.
    """

    file: Path
    name: str
    content: str
    is_batched: bool
    timeout: float

    @classmethod
    def open(cls, file: Path, name: str, *, is_batched: bool, timeout: float) -> "OpenedFunction":
        """Look at a file without running it.

        Raises:
            ModelError: it cannot be read, is no Python or defines nothing of this name.
        """
        try:
            content = file.read_bytes()
            tree = ast.parse(content)
        except OSError as error:
            raise ModelError(f"{file} cannot be read: {error.strerror}") from error
        except (SyntaxError, ValueError) as error:
            raise ModelError(f"{file} is not valid Python: {error}") from error
        if name not in names_defined(tree):
            raise ModelError(f"{file} defines no {name}; write FILE.py:NAME with a function of the file")
        return cls(file.resolve(), name, hashlib.sha256(content).hexdigest(), is_batched, timeout)

    def identity(self) -> dict[str, Any]:
        return {"function": self.name, "content": self.content, "batched": self.is_batched}

    def load(self, loader: Loader) -> "FunctionReward":
        """Start its process. Raises ModelError if the file cannot be imported."""
        reward = FunctionReward(self)
        reward.start()
        return reward


def names_defined(tree: ast.Module) -> set[str]:
    """Names that a file may define, wherever in it they stand."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


class FunctionReward:
    """A function that is called in another process, which is started anew after a call that has ended or hung it."""

    def __init__(self, opened: OpenedFunction):
        self.opened = opened
        self.running: tuple[subprocess.Popen, Connection] | None = None

    def scores(self, conversations: Sequence[Conversation]) -> list[Score]:
        if self.opened.is_batched:
            return self.call(list(conversations)) if conversations else []
        return [score for conversation in conversations for score in self.call([conversation])]

    def call(self, conversations: list[Conversation]) -> list[Score]:
        """One call of the function; what goes wrong in it is said of all its conversations."""
        answer = self.answer(conversations)
        if isinstance(answer, str):
            return [Score.none(f"{self.opened.file.name}:{self.opened.name}: {answer}")] * len(conversations)
        return [self.score(values) for values in answer]

    def score(self, values: list[float] | float) -> Score:
        """Of a value, or of the values of the spans of an answer."""
        spans = values if isinstance(values, list) else [values]
        fault = "gave no value" if not spans else "" if all(map(math.isfinite, spans)) else "gave a value not finite"
        if fault:
            return Score.none(f"{self.opened.file.name}:{self.opened.name}: {fault}")
        if isinstance(values, list):
            return Score(statistics.fmean(values), spans=tuple(values))
        return Score(values)

    # ---- the process -------------------------------------------------------------------------------------------------

    def answer(self, conversations: list[Conversation]) -> list[Any] | str:
        """Values of each conversation as the process sends them, or what went wrong."""
        if self.running is None:
            try:
                self.start()
            except ModelError as error:
                return str(error)
        assert self.running is not None
        process, connection = self.running
        try:
            connection.send(conversations)
            if not connection.poll(self.opened.timeout):
                self.stop()
                return f"took longer than {self.opened.timeout:g} seconds"
            return connection.recv()
        except (EOFError, OSError):
            status = process.wait()
            self.stop()
            return f"ended its process (status {status})"

    def start(self) -> None:
        """Raises ModelError if the file cannot be imported, or takes too long."""
        ours, theirs = Pipe()
        arguments = [self.opened.file, self.opened.name, int(self.opened.is_batched), theirs.fileno()]
        process = subprocess.Popen(
            [sys.executable, function_process.__file__, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=2,  # what the function prints is no output of the job
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        self.running = process, ours
        self.end = weakref.finalize(self, end, process, ours)
        try:
            fault = ours.recv() if ours.poll(START_SECONDS) else f"took longer than {START_SECONDS:g} seconds"
        except (EOFError, OSError):
            fault = f"ended its process (status {process.wait()})"
        if fault:
            self.stop()
            raise ModelError(f"{self.opened.file} cannot be used: {fault}")

    def stop(self) -> None:
        """End the process; the next call starts another."""
        self.running = None
        self.end()


def end(process: subprocess.Popen, connection: Connection) -> None:
    connection.close()
    process.kill()
    process.wait()
