"""What a run writes down and shows: metrics.jsonl, TensorBoard, Weights & Biases, the terminal."""

import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import torch
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hafrm_ds.config import TrainConfig
from hafrm_ds.errors import UserError

PACKAGES = ("hafrm_ds", "torch", "transformers", "deepspeed", "datasets", "tokenizers", "numpy", "pyarrow")
LOG_WIDTH = 120
LOG_LINE_SECONDS = 30
"""Without a terminal a progress bar becomes a line at most this often."""


class RunLog:
    """The log of a run on rank 0. On other ranks every method does nothing.

    Raises:
        UserError: the output folder already holds a run, or wandb is asked for and not installed.
    """

    def __init__(self, config: TrainConfig, is_first: bool):
        self.is_first = is_first
        width = None if sys.stdout.isatty() else LOG_WIDTH
        self.console = Console(quiet=not is_first, width=width, highlight=False)
        if not is_first:
            return
        folder = config.output_dir
        metrics = folder / "metrics.jsonl"
        if metrics.exists() and metrics.stat().st_size:
            raise UserError(f"--output_dir {folder} already holds a run (metrics.jsonl); choose another folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(config.to_yaml())
            self.metrics_file = metrics.open("a", buffering=1)
        except OSError as error:
            raise UserError(f"--output_dir {folder} cannot be written: {error.strerror}") from error
        self.tensorboard = None
        if config.logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(folder / "tensorboard"))
        self.wandb = None
        if config.logging.wandb_project:
            try:
                import wandb
            except ImportError as error:
                raise UserError("--logging.wandb_project needs wandb: pip install 'hafrm_ds[wandb]'") from error
            self.wandb = wandb.init(
                project=config.logging.wandb_project, dir=folder, config=config.model_dump(mode="json")
            )

    def write_json(self, path: Path, content: dict) -> None:
        if self.is_first:
            path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def metrics(self, kind: str, step: int, values: dict[str, float], **labels: str) -> None:
        """One row of metrics.jsonl, and the same to TensorBoard and wandb under KIND/[set/]NAME."""
        if not self.is_first:
            return
        row = {"step": step, "kind": kind, **labels, **values}
        self.metrics_file.write(json.dumps(row) + "\n")
        prefix = "/".join([kind, *labels.values()])
        if self.tensorboard is not None:
            for name, value in values.items():
                self.tensorboard.add_scalar(f"{prefix}/{name}", value, step)
            self.tensorboard.flush()
        if self.wandb is not None:
            self.wandb.log({f"{prefix}/{name}": value for name, value in values.items()}, step=step)

    def print(self, content: RenderableType) -> None:
        """Text lines are left whole, for grep; tables and panels keep to the width."""
        self.console.print(content, soft_wrap=isinstance(content, str))

    @contextmanager
    def progress(self, description: str, total: int, unit: str) -> Iterator["ProgressBar"]:
        """A progress bar with ETA on a terminal, a line now and then elsewhere."""
        with ProgressBar(self.console, description, total, unit) as bar:
            yield bar

    def close(self) -> None:
        if not self.is_first:
            return
        self.metrics_file.close()
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


class ProgressBar:
    """Progress of `total` units; `advance` may carry a text that stands behind the bar."""

    def __init__(self, console: Console, description: str, total: int, unit: str):
        self.console, self.description, self.total, self.unit = console, description, total, unit
        self.done, self.started, self.last_line = 0, time.monotonic(), time.monotonic()
        self.bar = None
        if console.is_terminal and not console.quiet:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn(unit),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
                console=console,
            )
            self.task = self.bar.add_task(description, total=total, text="")

    def __enter__(self) -> "ProgressBar":
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *exception) -> None:
        if self.bar is not None:
            self.bar.stop()

    def advance(self, count: int, text: str = "") -> None:
        self.done += count
        if self.bar is not None:
            self.bar.update(self.task, advance=count, text=text)
            return
        now = time.monotonic()
        if now - self.last_line >= LOG_LINE_SECONDS or self.done >= self.total:
            self.last_line = now
            elapsed = now - self.started
            remaining = elapsed / self.done * max(0, self.total - self.done)
            self.console.print(
                f"{self.description} {self.done}/{self.total} {self.unit}  "
                f"{clock(elapsed)}, ETA {clock(remaining)}  {text}".rstrip(),
                soft_wrap=True,
            )


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))


def environment(world_size: int) -> dict:
    """Versions, hardware and command of a run, for environment.json."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    cuda = torch.cuda.is_available()
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "world_size": world_size,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "cuda": torch.version.cuda if cuda else None,
        "cores": os.cpu_count(),
        "packages": versions,
    }
