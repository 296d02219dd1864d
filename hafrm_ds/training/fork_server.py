"""A process that has imported all that a training needs, and forks one training after another from it.

Imports take longer than a small training. The process does nothing but import and fork: it has no CUDA context, no
process group, and no threads but what libraries keep to themselves, of which a fork would have half. What the first
training imports on its way (DeepSpeed, the model's code), the others find imported.

    python -m hafrm_ds.training.fork_server SCRIPT FD < requests          started by `ForkServer`

A request is a line of JSON: arguments of the entry file SCRIPT, and variables for its environment. Of each training the
pipe FD gets two lines: `pid N` once signals reach it, and `status N` when it has ended.
"""

import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from select import select
from tempfile import TemporaryFile
from typing import TextIO

from hafrm_ds.errors import UserError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
POLL_SECONDS = 0.05
PR_SET_PDEATHSIG = 1
"""Of prctl, in Linux's <sys/prctl.h>: the signal that a process gets when its parent ends."""


class ForkServer:
    """The process that trainings are forked from, as their starter sees it.

    Args:
        script: the entry file that each of them runs.
    """

    def __init__(self, script: Path) -> None:
        reading, writing = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(script), str(writing)],
            stdin=subprocess.PIPE,
            pass_fds=[writing],
            text=True,
        )
        os.close(writing)
        self.answers = os.fdopen(reading)

    def start(self, arguments: Sequence[str], variables: Mapping[str, str]) -> "Forked":
        """Start the entry file in a fork, with these variables put into its environment."""
        assert self.process.stdin is not None
        request = {"arguments": list(arguments), "variables": dict(variables)}
        with suppress(BrokenPipeError):  # `Forked` finds that no answer comes
            print(json.dumps(request), file=self.process.stdin, flush=True)
        return Forked(self)

    def answer(self) -> tuple[str, int]:
        """The next answer: its word and its number. Raises UserError when the server has ended."""
        word, _, number = self.answers.readline().partition(" ")
        if not number:
            raise UserError(
                f"the process that trainings are forked from has ended (exit status {self.process.wait()}); the same "
                "command resumes the comparison"
            )
        return word, int(number)

    def close(self) -> None:
        """Let the server end. It stops a training that still runs."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # of a request that came too late
            self.process.stdin.close()
        self.process.wait()
        self.answers.close()


class Forked:
    """A forked process, with the methods of subprocess.Popen that its starter needs."""

    def __init__(self, server: ForkServer):
        self.server = server
        self.known: dict[str, int] = {}

    def wait(self) -> int:
        """The exit status; below 0 the number of the signal that has ended it."""
        while "status" not in self.known:
            self.known.update([self.server.answer()])
        return self.known["status"]

    def terminate(self) -> None:
        if not self.known:
            self.known.update([self.server.answer()])
        if "status" not in self.known:
            with suppress(ProcessLookupError):
                os.kill(self.known["pid"], signal.SIGTERM)


def serve(script: str, answers: int) -> None:
    """Fork trainings until no request comes any more."""
    sys.path[0] = str(Path(script).parent)  # as if Python had started the script, not this module
    # The signals of a process group reach the training and whoever waits for it; this process must outlive both.
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    import hafrm_ds.training.run  # noqa: F401 - what every training imports

    with TemporaryFile("w+") as learned:
        for line in sys.stdin:
            gc.freeze()  # so that a collection in a fork does not copy the pages of all that was imported
            child = os.fork()
            if not child:
                os._exit(run_script(script, json.loads(line), answers, learned))
            status = wait_for(child)
            with suppress(BrokenPipeError):  # whoever has asked is gone
                os.write(answers, f"status {status}\n".encode())
            import_all(learned)


def import_all(learned: TextIO) -> None:
    """Import the modules that a fork has named, which empties the file."""
    learned.seek(0)
    for name in learned.read().split():
        with suppress(Exception):  # one that a training has made for itself
            importlib.import_module(name)
    learned.seek(0)
    learned.truncate()


def run_script(script: str, request: Mapping, answers: int, learned: TextIO) -> int:
    """Run the entry file in the fork as if Python had started it; returns its exit status.

    Args:
        learned: gets the names of the modules that it has imported.
    """
    status, known = 1, set(sys.modules)
    try:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        with suppress(AttributeError, OSError):  # elsewhere than on Linux
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # a server that is killed leaves no training
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, sys.stdin.fileno())
        os.write(answers, f"pid {os.getpid()}\n".encode())
        os.close(answers)
        os.environ |= request["variables"]
        sys.argv = [script, *request["arguments"]]
        runpy.run_path(script, run_name="__main__")
        status = 0
        learned.write("\n".join(name for name in sys.modules if name not in known))
        learned.flush()
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
    return status


def wait_for(child: int) -> int:
    """The exit status of the fork. It is asked to stop when whoever has asked for it is gone."""
    is_alone = False
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        # Requests come one by one: what can be read while one is served is the end.
        if not is_alone and select([sys.stdin], [], [], POLL_SECONDS)[0]:
            is_alone = True
            os.kill(child, signal.SIGTERM)
        elif is_alone:
            time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
