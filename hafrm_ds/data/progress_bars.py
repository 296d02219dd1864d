"""The progress bars of datasets: for a reader at a terminal, not for a log."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import datasets


@contextmanager
def progress_bars_on_a_terminal() -> Iterator[None]:
    """Let datasets show progress bars only where stderr is a terminal, and from rank 0 alone."""
    wanted = sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"
    hidden = not wanted and not datasets.are_progress_bars_disabled()
    if hidden:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hidden:
            datasets.enable_progress_bars()
