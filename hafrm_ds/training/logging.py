"""What a run writes down and shows: metrics.jsonl, TensorBoard, Weights & Biases, the terminal."""

import importlib.util
import json
import os
import secrets
from pathlib import Path
from typing import Any, TextIO

from hafrm_ds.config import TrainConfig
from hafrm_ds.durability import write_whole
from hafrm_ds.errors import UserError
from hafrm_ds.evaluation.report.reading import STOPPED_FILE, SUMMARY_FILE
from hafrm_ds.processes.agreement import environment
from hafrm_ds.processes.console import Console
from hafrm_ds.processes.ranks import Processes

WANDB_ID_FILE = "wandb_id.txt"


class RunLog(Console):
    """What rank 0 prints and writes down; on other ranks every method does nothing.

    Args:
        files: also keep metrics in config.output_dir, from `start` on. Unless the run is resumed, it must not hold one
            already.

    Raises:
        UserError: the output folder cannot be used, or wandb is asked for and not installed.
    """

    def __init__(self, config: TrainConfig, processes: Processes, files: bool = True):
        super().__init__(processes)
        self.writes = self.is_first and files
        self.config, self.device = config, processes.device
        self.metrics_file: TextIO | None = None
        self.tensorboard: Any = None
        self.wandb: Any = None
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
                f"--output_dir {folder} already holds a run (metrics.jsonl); choose another folder, or resume it: "
                "--resume auto"
            )
        config = folder / "config.yaml"
        is_of_a_run = any((folder / name).exists() for name in ("metrics.jsonl", "checkpoints", SUMMARY_FILE))
        if not is_of_a_run and config.exists() and config.stat().st_size:
            raise UserError(
                f"--output_dir {folder} holds a config.yaml and no run, and a run writes its own in its place; choose "
                "another folder, or give that file another name"
            )
        if self.config.logging.wandb_project and importlib.util.find_spec("wandb") is None:
            raise UserError("--logging.wandb_project needs wandb: pip install -e '.[wandb]'")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            config.touch()
        except OSError as error:
            raise UserError(f"--output_dir {folder} cannot be written: {error.strerror}") from error

    def start(self, config: TrainConfig, step: int, evaluation_is_due: bool = False) -> None:
        """Begin to write, after `step` steps of an earlier start: later rows of it are removed.

        Args:
            config: with everything decided that `auto` left open.
            evaluation_is_due: also those of the evaluation after this step, which was not finished.
        """
        if not self.writes:
            return
        folder = config.output_dir
        self.first_step = step
        metrics = folder / "metrics.jsonl"
        metrics.touch()  # what stands beside it is the run's, however early that is killed
        write_whole(folder / "config.yaml", config.to_yaml().encode())
        self.write_json(folder / "environment.json", environment(self.num_ranks, self.device))
        for name in (SUMMARY_FILE, STOPPED_FILE):
            (folder / name).unlink(missing_ok=True)
        truncate_rows(metrics, step, evaluation_is_due)
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
                id=wandb_id(folder, is_resumed=step > 0),
                resume="allow",
                config=config.model_dump(mode="json"),
                allow_val_change=True,  # options that a resumed run may change
            )
        for kind, early_step, values, labels in self.waiting:
            self.metrics(kind, early_step, values, **labels)

    def write_json(self, path: Path, content: dict) -> None:
        if self.writes:
            write_whole(path, json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n")

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

    def sync(self) -> None:
        """Wait until all rows so far are on disk."""
        if self.metrics_file is not None:
            os.fsync(self.metrics_file.fileno())

    def close(self) -> None:
        if self.metrics_file is None:
            return
        self.metrics_file.close()
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


def truncate_rows(metrics: Path, step: int, evaluation_is_due: bool) -> None:
    """Leave the rows of the first `step` steps in a metrics.jsonl, without a last one that a crash broke off."""
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
    write_whole(metrics, "".join(kept).encode())


def wandb_id(folder: Path, is_resumed: bool) -> str:
    """Under which W&B keeps the run, so that one that is resumed stays one run there; W&B passes over the steps that it
    has already. One that starts anew gets a new id.

    Args:
        is_resumed: the run does not start at its first step.
    """
    file = folder / WANDB_ID_FILE
    if not is_resumed or not file.exists():
        write_whole(file, secrets.token_hex(8).encode())
    return file.read_text()
