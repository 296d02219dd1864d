"""The process that a function of the user runs in (`rewards.function`). It is started as a script and needs nothing of
this package: python function_process.py FILE NAME IS_BATCHED DESCRIPTOR.

It sends "" when the file has been imported, else what is wrong. Then it gets lists of conversations, and sends for each
list the values (a number, or a list of them for the spans of an answer) of every conversation, or what went wrong.
"""

import importlib.util
import inspect
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


def main(file: Path, name: str, is_batched: bool, connection: Connection) -> None:
    os.set_inheritable(connection.fileno(), False)  # what the function starts must not hold it open
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the job's affair, whose end this process sees
    asked: queue.SimpleQueue[list] = queue.SimpleQueue()
    sys.path[0] = str(file.parent)  # in place of the folder of this script
    try:
        function = function_of(file, name)
        num_arguments = arguments_of(function)
    except BaseException as error:
        connection.send(in_words(error))
        return
    connection.send("")
    threading.Thread(target=listen, args=(connection, asked), daemon=True).start()
    while True:
        conversations = asked.get()
        try:
            connection.send(values_of(function, num_arguments, is_batched, conversations))
        except BaseException as error:
            connection.send(in_words(error))


def listen(connection: Connection, asked: "queue.SimpleQueue[list]") -> None:
    """Take what is asked; end this process, whatever it does, when the job has ended."""
    try:
        while True:
            asked.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)


def function_of(file: Path, name: str) -> Callable:
    specification = importlib.util.spec_from_file_location(file.stem, file)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[file.stem] = module
    specification.loader.exec_module(module)
    return getattr(module, name)


def arguments_of(function: Callable) -> int:
    """1: it takes a conversation. 2: the messages before the answer, and the text of the answer."""
    parameters = inspect.signature(function).parameters.values()
    positional = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    needed = [each for each in positional if each.default is each.empty]
    keywords = [each for each in parameters if each.kind == each.KEYWORD_ONLY and each.default is each.empty]
    number = len(needed) or min(len(positional), 2)
    if number not in (1, 2) or keywords:
        raise TypeError("a reward takes (prompt, answer) or (conversation)")
    return number


def values_of(function: Callable, num_arguments: int, is_batched: bool, conversations: list) -> list[Any] | str:
    arguments = [
        [messages] if num_arguments == 1 else [messages[:-1], messages[-1].get("content") or ""]
        for messages in conversations
    ]
    if not is_batched:
        return [numbers(function(*each)) for each in arguments]
    values = list(function(*map(list, zip(*arguments))))
    if len(values) != len(conversations):
        return f"gave {len(values)} values for {len(conversations)} conversations"
    return [numbers(value) for value in values]


def numbers(value: Any) -> float | list[float]:
    """What a function has returned for an answer: a number, or those of its spans."""
    if isinstance(value, str | bytes | dict | None):
        raise TypeError(f"gave {value!r:.60}, expected a number or a list of numbers")
    try:
        spans = list(value)
    except TypeError:
        return float(value)
    return [float(numbers(each)) for each in spans]  # type: ignore[arg-type]  # a list in a list raises


def in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "1", Connection(int(sys.argv[4])))
