"""What a run writes down and shows: metrics.jsonl, TensorBoard, Weights & Biases, the terminal."""

import importlib.util
import json
import os
import platform
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import torch
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from hafrm_ds.config import TrainConfig
from hafrm_ds.errors import UserError
from hafrm_ds.training.agreement import versions
from hafrm_ds.training.processes import Processes

SUMMARY_FILE = "summary.json"
"""In the run folder of a finished run."""
STOPPED_FILE = "stopped.json"
"""In the run folder while a run that was asked to stop has not gone on: the reason, the step and the checkpoint."""
WANDB_ID_FILE = "wandb_id.txt"
LOG_WIDTH = 120
LOG_LINE_SECONDS = 30
"""Without a terminal a progress bar becomes a line at most this often."""


class RunLog:
    """What rank 0 prints and writes down; on other ranks every method does nothing.

    Args:
        config: needed for files alone.
        files: also keep metrics in config.output_dir, from `start` on. Unless the run is resumed, it must not hold one
            already.

    Raises:
        UserError: the output folder cannot be used, or wandb is asked for and not installed.
    """

    def __init__(self, config: TrainConfig | None, processes: Processes, files: bool = True):
        self.is_first, self.num_ranks = processes.is_first, processes.world_size
        width = None if sys.stdout.isatty() else LOG_WIDTH
        self.console = Console(quiet=not self.is_first, width=width, highlight=False)
        self.bars: Progress | None = None
        self.writes = self.is_first and files
        self.config, self.device = config, processes.device
        self.metrics_file = self.tensorboard = self.wandb = None
        self.waiting: list[tuple] = []
        """Rows from before `start`."""
        if self.writes:
            self.check_folder()

    def check_folder(self) -> None:
        """Make the output folder, and see that it can be used, before hours of other work."""
        folder = self.config.output_dir
        metrics = folder / "metrics.jsonl"
        if self.config.resume == "none" and metrics.exists() and metrics.stat().st_size:
            raise UserError(
                f"--output_dir {folder} already holds a run (metrics.jsonl); choose another folder, or go on with it: "
                "--resume auto"
            )
        if self.config.logging.wandb_project and importlib.util.find_spec("wandb") is None:
            raise UserError("--logging.wandb_project needs wandb: pip install 'hafrm_ds[wandb]'")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").touch()
        except OSError as error:
            raise UserError(f"--output_dir {folder} cannot be written: {error.strerror}") from error

    def start(self, config: TrainConfig, step: int, evaluation_is_due: bool = False) -> None:
        """Begin to write, after `step` steps of an earlier start: later rows of it are cut off.

        Args:
            config: with everything decided that `auto` left open.
            evaluation_is_due: also those of the evaluation after this step, which was not finished.
        """
        if not self.writes:
            return
        folder = config.output_dir
        self.first_step = step
        (folder / "config.yaml").write_text(config.to_yaml())
        self.write_json(folder / "environment.json", environment(self.num_ranks, self.device))
        for name in (SUMMARY_FILE, STOPPED_FILE):
            (folder / name).unlink(missing_ok=True)
        metrics = folder / "metrics.jsonl"
        cut_rows(metrics, step, evaluation_is_due)
        self.metrics_file = metrics.open("a", buffering=1)
        if config.logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # purge_step hides what an earlier start has written from this step on.
            purge_step = (step if evaluation_is_due else step + 1) if step else None
            self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step)
        if config.logging.wandb_project:
            import wandb

            self.wandb = wandb.init(
                project=config.logging.wandb_project,
                dir=folder.resolve(),
                name=folder.resolve().name,
                id=wandb_id(folder, goes_on=step > 0),
                resume="allow",
                config=config.model_dump(mode="json"),
                allow_val_change=True,  # options that a resumed run may change
            )
        for kind, early_step, values, labels in self.waiting:
            self.metrics(kind, early_step, values, **labels)

    def write_json(self, path: Path, content: dict) -> None:
        if self.writes:
            path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def metrics(self, kind: str, step: int, values: dict[str, float], **labels: str) -> None:
        """One row of metrics.jsonl, and the same to TensorBoard and wandb under KIND/[set/]NAME."""
        if self.writes and self.metrics_file is None:
            self.waiting.append((kind, step, values, labels))
        if self.metrics_file is None or step < self.first_step:  # an earlier start has written it
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
                # What does not fit is cut here, not taken from the columns before.
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

    def sync(self) -> None:
        """See to it that all rows so far are on disk."""
        if self.writes:
            os.fsync(self.metrics_file.fileno())

    def close(self) -> None:
        if self.metrics_file is None:
            return
        self.metrics_file.close()
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


class ProgressBar:
    """Progress of `total` units; `advance` may carry a text that stands behind the bar."""

    def __init__(
        self, console: Console, bars: Progress | None, description: str, total: int, unit: str, num_ranks: int
    ):
        self.console, self.bars, self.num_ranks = console, bars, num_ranks
        self.description, self.total, self.unit = description, total, unit
        self.done, self.started, self.last_line = 0, time.monotonic(), time.monotonic()
        self.task = bars.add_task(description, total=total, text="") if bars is not None else None

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


def cut_rows(metrics: Path, step: int, evaluation_is_due: bool) -> None:
    """Leave the rows of the first `step` steps in a metrics.jsonl, without a last one that was cut by a crash."""
    if not metrics.exists():
        return
    kept = []
    for line in metrics.read_text().splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            break
        if row["step"] <= step and step and not (evaluation_is_due and (row["step"], row["kind"]) == (step, "eval")):
            kept.append(line)
    draft = metrics.with_name(f".{metrics.name}")
    with draft.open("w") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(metrics)


def wandb_id(folder: Path, goes_on: bool) -> str:
    """Under which W&B keeps the run, so that one that goes on stays one run there; W&B passes over the steps that it
    has already. One that starts anew gets a new id.

    Args:
        goes_on: the run does not start at its first step.
    """
    file = folder / WANDB_ID_FILE
    if not goes_on or not file.exists():
        file.write_text(secrets.token_hex(8))
    return file.read_text()


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))


def environment(world_size: int, device: torch.device) -> dict:
    """Versions, hardware and command of a run, for environment.json."""
    cuda = torch.cuda.is_available()
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "world_size": world_size,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or "cpu",
        "cuda": torch.version.cuda if cuda else None,
        "cores": os.cpu_count(),
        "packages": versions(),
    }
