"""The terminal of a job: one voice for all ranks, and progress that a person or a log file can read."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich import console as rich_console
from rich.console import RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from hafrm_ds.processes.ranks import Processes

LOG_WIDTH = 120
LOG_LINE_SECONDS = 30
"""Without a terminal a progress bar becomes a line at most this often."""


class Console:
    """What rank 0 prints; on other ranks every method does nothing."""

    def __init__(self, processes: Processes):
        self.is_first, self.num_ranks = processes.is_first, processes.world_size
        width = None if sys.stdout.isatty() else LOG_WIDTH
        self.console = rich_console.Console(quiet=not self.is_first, width=width, highlight=False)
        self.bars: Progress | None = None

    def warn(self, text: str) -> None:
        self.console.print(f"[bold yellow]WARNING[/bold yellow] {escape(text)}", soft_wrap=True)

    def print(self, content: RenderableType) -> None:
        """Text lines are left whole, for grep; tables and panels keep to the width."""
        self.console.print(content, soft_wrap=isinstance(content, str))

    @contextmanager
    def progress(self, description: str, total: int, unit: str) -> Iterator["ProgressBar"]:
        """A progress bar with ETA on a terminal, a line now and then elsewhere. Bars may stand inside one another."""
        if not self.is_first or not self.console.is_terminal:
            yield ProgressBar(self.console, None, description, total, unit, self.num_ranks)
            return
        if self.bars is None:
            self.bars = Progress(
                TextColumn("{task.description}", table_column=Column(no_wrap=True)),
                BarColumn(bar_width=12),
                MofNCompleteColumn(table_column=Column(no_wrap=True)),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                # What does not fit is left out here, not taken from the columns before.
                TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
                console=self.console,
                expand=True,
            )
        if not self.bars.tasks:
            self.bars.start()
        bar = ProgressBar(self.console, self.bars, description, total, unit, self.num_ranks)
        try:
            yield bar
        finally:
            self.bars.remove_task(bar.task)
            if not self.bars.tasks:
                self.bars.stop()


class ProgressBar:
    """Progress of `total` units; `advance` may carry a text that stands behind the bar."""

    def __init__(
        self,
        console: rich_console.Console,
        bars: Progress | None,
        description: str,
        total: int,
        unit: str,
        num_ranks: int,
    ):
        self.console, self.bars, self.num_ranks = console, bars, num_ranks
        self.description, self.total, self.unit = description, total, unit
        self.done, self.started, self.last_line = 0, time.monotonic(), time.monotonic()
        self.task = bars.add_task(description, total=total, text="") if bars is not None else TaskID(0)

    def advance_for_all_ranks(self, count: int) -> None:
        """Advance by what this rank has done as if every rank had done as much: they work alike."""
        self.advance(min(count * self.num_ranks, self.total - self.done))

    def advance(self, count: int, text: str = "") -> None:
        if not count:
            return
        self.done += count
        if self.bars is not None:
            self.bars.update(self.task, advance=count, text=text)
            return
        now = time.monotonic()
        if now - self.last_line >= LOG_LINE_SECONDS or self.done >= self.total:
            self.last_line = now
            elapsed = now - self.started
            remaining = elapsed / self.done * max(0, self.total - self.done)
            self.console.print(
                f"{self.description} {self.done:,}/{self.total:,} {self.unit}  "
                f"{clock(elapsed)}, ETA {clock(remaining)}  {text}".rstrip(),
                soft_wrap=True,
            )


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))
