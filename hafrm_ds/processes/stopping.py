"""Stopping by signals: what asks a run to stop, and when it may.

SIGTERM, SIGINT and SIGUSR1 (Slurm's warning before a time limit) ask for the same. Before the first step nothing can be
saved and the run ends at once. From then on a signal is only noted: the ranks agree on it at the end of a step, save
together and leave together.
"""

import os
import signal
import threading
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from types import FrameType

import psutil

STOPPED_STATUS = 75
"""Exit status of a run that was asked to stop and can be resumed: EX_TEMPFAIL of sysexits.h, "try again later"."""
LAUNCHER_LOST = "the launcher has ended"
REASONS = ("SIGUSR1", "SIGINT", "SIGTERM", LAUNCHER_LOST)
"""Of several reasons the last of this order is named."""


class Stopped(KeyboardInterrupt):
    """The run was asked to stop. Like KeyboardInterrupt it passes through `except Exception`.

    checkpoint: name of the checkpoint that holds `step`, None if there is none.
    is_told: another rank has said so already.
    """

    def __init__(self, reason: str, step: int = 0, checkpoint: str | None = None, is_told: bool = False):
        self.reason, self.step, self.checkpoint, self.is_told = reason, step, checkpoint, is_told
        kept = f" after step {step}; --resume auto resumes from {checkpoint}" if checkpoint else ""
        super().__init__(f"stopped: {reason}{kept}")

    def to_json(self) -> dict:
        """For stopped.json."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return {"reason": self.reason, "step": self.step, "checkpoint": self.checkpoint, "time": now}


class StopRequest:
    """What has asked this process to stop, if anything has."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.is_deferred = False
        self.owner = os.getpid()

    def install(self) -> None:
        """Catch the signals from now on."""
        for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
            signal.signal(getattr(signal, name), self.on_signal)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.owner:  # a worker process that was forked while data is prepared
            os._exit(128 + number)
        reason = self.note(signal.Signals(number).name)
        if not self.is_deferred:
            raise Stopped(reason)

    def note(self, reason: str) -> str:
        """Ask for a stop; returns the reason that counts, the first: a launcher answers Ctrl-C with SIGTERM as well."""
        self.reason = self.reason or reason
        return self.reason

    def defer(self) -> None:
        """From now on a signal is noted and raises nothing."""
        self.is_deferred = True

    def stop_if_lost(self, launcher: "Launcher") -> None:
        """Treat the loss of the launcher as SIGTERM. Called from a thread beside the main one, again and again."""
        if self.reason is None and launcher.is_lost():
            self.note(LAUNCHER_LOST)
            if not self.is_deferred:
                main = threading.main_thread().ident
                assert main is not None  # it has been started
                signal.pthread_kill(main, signal.SIGTERM)

    @property
    def vote(self) -> float:
        """For a maximum over all ranks: 0, or the number of the reason."""
        return 0.0 if self.reason is None else float(REASONS.index(self.reason) + 1)


def reason_of_vote(vote: float) -> str | None:
    """The reason behind the largest vote."""
    return REASONS[round(vote) - 1] if vote else None


@dataclass(frozen=True)
class Launcher:
    """The launcher's processes above this one.

    links: processes, each with the id of its parent, which stays the same as long as the parent lives.
    """

    links: list[tuple[psutil.Process, int]]

    @classmethod
    def above(cls) -> "Launcher":
        """`deepspeed` starts deepspeed.launcher.launch, which starts the ranks: if the first is killed, the second runs
        on and tells nobody. Other launchers are the parent alone."""
        own, links = psutil.Process(), []
        with suppress(psutil.Error):
            links.append((own, own.ppid()))
            parent = own.parent()
            if parent is not None and "deepspeed.launcher.launch" in parent.cmdline():
                links.append((parent, parent.ppid()))
        return cls(links)

    def is_lost(self) -> bool:
        try:
            return any(process.ppid() != parent for process, parent in self.links)
        except psutil.Error:
            return True
