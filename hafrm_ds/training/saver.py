"""Saving and going on, all ranks together: when a checkpoint is due, how it is written, and when the run stops."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from hafrm_ds.config import TrainConfig
from hafrm_ds.engine.checkpoint import (
    DEEPSPEED_FOLDER,
    CheckpointError,
    FileFacts,
    TrainingState,
    checkpoint_name,
    prune,
    publish,
    random_file,
    random_state,
    read_state,
    reason_of,
    restore_random_state,
    set_aside,
    start_draft,
    write_synced,
)
from hafrm_ds.engine.engine import TrainingEngine
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.processes.stopping import Stopped, reason_of_vote
from hafrm_ds.training.logging import RunLog
from hafrm_ds.training.resume import ResumePoint, why_not_whole

MINUTE = 60.0


@dataclass
class Best:
    """The best evaluation so far by one metric, SET/METRIC, and the value at the last evaluation. Of equal ones the
    first is the best; the evaluation before the first step is none of them, as nothing was trained."""

    metric: str | None
    value: float | None = None
    step: int | None = None
    evaluations_since: int = 0
    latest_value: float | None = None
    latest_step: int | None = None

    def is_better(self, value: float, other: float) -> bool:
        """Losses are better when they are smaller, everything else when it is larger."""
        is_loss = self.metric is not None and self.metric.split("/")[-2] == "loss"
        return value < other if is_loss else value > other

    def consider(self, step: int, value: float) -> None:
        """Take note of the value of the metric at an evaluation."""
        if not step:
            return
        self.latest_value, self.latest_step = value, step
        if self.value is None or self.is_better(value, self.value):
            self.value, self.step, self.evaluations_since = value, step, 0
        else:
            self.evaluations_since += 1


class CheckpointSaver:
    """Saves a run's checkpoints, when they are due or when a signal asks for a stop.

    Args:
        data, reference: what the checkpoints belong to, as ResumePoint.check_content takes it.
        resume_point: where the run goes on; None if it starts.
    """

    def __init__(
        self,
        config: TrainConfig,
        engine: TrainingEngine,
        processes: Processes,
        log: RunLog,
        data: dict[str, str],
        reference: str,
        resume_point: ResumePoint | None,
    ):
        self.config, self.options, self.engine, self.log = config, config.checkpoint, engine, log
        self.processes = processes
        self.data, self.reference, self.resume_point = data, reference, resume_point
        self.root = config.output_dir / "checkpoints"
        self.last_step = resume_point.state.step if resume_point else 0
        self.last_time = time.monotonic()
        self.stop_reason: str | None = None
        self.is_time = False
        self.last_evaluation: dict[str, dict[str, float]] = resume_point.state.last_evaluation if resume_point else {}
        """Set -> its metrics at the last evaluation."""

    @property
    def is_resuming(self) -> bool:
        return self.resume_point is not None

    @property
    def evaluation_is_due(self) -> bool:
        """The evaluation at the resume point was not made."""
        return self.is_resuming and self.resume_point.state.evaluation_is_due

    # ---- what the ranks agree on ----

    def votes(self) -> list[float]:
        """What this rank wants, for a maximum over all ranks: to stop, and to save because it is time."""
        waited = time.monotonic() - self.last_time
        limit = self.options.every_minutes * MINUTE
        is_time = self.processes.is_first and 0 < limit <= waited
        return [self.processes.stopping.vote, float(is_time)]

    def hear(self, votes: list[float]) -> None:
        """Take note of the maximum of all ranks' votes."""
        stop, is_time = votes
        self.stop_reason, self.is_time = reason_of_vote(stop), bool(is_time)

    def must_stop(self) -> bool:
        """Ask all ranks, between two steps, whether one of them was asked to stop."""
        if self.stop_reason is None:
            votes = torch.tensor(self.votes(), dtype=torch.float64, device=self.engine.device)
            dist.all_reduce(votes, op=dist.ReduceOp.MAX)
            self.hear(votes.tolist())
        return self.stop_reason is not None

    # ---- around the steps ----

    def restore(self, best: Best) -> int:
        """Go on from the resume point: weights, optimizer, random numbers and evaluations. Returns the step."""
        if self.resume_point is None:
            return 0
        folder, state = self.resume_point.folder, self.resume_point.state
        self.engine.load(folder / DEEPSPEED_FOLDER, state.zero_stage, state.world_size)
        own = folder / random_file(dist.get_rank())
        if own.exists():  # a rank that was not there before has the state of a fresh start
            restore_random_state(json.loads(own.read_text()))
        best.step, best.value, best.evaluations_since = state.best_step, state.best_value, state.evaluations_since_best
        self.log.print(
            f"going on after step {state.step} from {folder}"
            + ("" if state.world_size == dist.get_world_size() else f", written by {state.world_size} processes")
            + ("" if state.zero_stage == self.engine.stage else f", written under ZeRO stage {state.zero_stage}")
        )
        return state.step

    def after_step(self, step: int, best: Best, evaluation_is_due: bool) -> None:
        """Save if it is due.

        Raises:
            Stopped: a rank was asked to stop; the step has been saved.
            CheckpointError: the checkpoint cannot be written.
        """
        by_steps = self.options.every_steps and step % self.options.every_steps == 0
        is_best = self.options.final == "best" and best.step == step
        if step > self.last_step and (by_steps or is_best or self.is_time or self.stop_reason):
            self.save(step, best, evaluation_is_due)
        if self.stop_reason is not None:
            raise Stopped(self.stop_reason, step, checkpoint_name(step) if step else None)

    def go_back(self, step: int) -> bool:
        """Take over the weights and the evaluation after an earlier step, once the run is over; False, with a warning,
        if its checkpoint is not whole."""
        folder = self.root / checkpoint_name(step)
        if problem := why_not_whole(folder, self.processes.for_job("best")):
            self.log.warn(f"final/ gets the weights after the last step, as {folder} cannot be used: {problem}")
            return False
        state = read_state(folder)
        self.engine.load(folder / DEEPSPEED_FOLDER, state.zero_stage, state.world_size)
        self.last_evaluation = state.evaluation_of_step
        return True

    def save(self, step: int, best: Best, evaluation_is_due: bool) -> None:
        started = time.perf_counter()
        draft = self.root / f".{checkpoint_name(step)}"
        self.on_first(lambda: start_draft(self.root, step, self.engine.expected_checkpoint_bytes()))
        files = self.write_parts(draft)
        state = TrainingState(
            step=step,
            world_size=dist.get_world_size(),
            zero_stage=self.engine.stage,
            config=self.config.model_dump(mode="json"),
            data=self.data,
            reference=self.reference,
            metric=best.latest_value if best.latest_step == step else None,
            best_step=best.step,
            best_value=best.value,
            evaluations_since_best=best.evaluations_since,
            evaluation_is_due=evaluation_is_due,
            last_evaluation=self.last_evaluation,
            uses_stock_logits=self.engine.model.uses_stock_logits,
        )

        def finish() -> None:
            # The row comes first: if the process dies between the two, resuming from the one before cuts it off.
            size = sum(facts.bytes for facts in files.values())
            self.log.metrics("checkpoint", step, {"seconds": time.perf_counter() - started, "bytes": size})
            self.log.sync()
            publish(draft, self.root, state, files)
            prune(self.root, self.options.keep_last, best.step, best.is_better)

        self.on_first(finish, draft)
        self.last_step, self.last_time, self.is_time = step, time.monotonic(), False

    def write_parts(self, draft: Path) -> dict[str, FileFacts]:
        """Each rank writes its files; rank 0 gets the facts of all.

        Raises:
            CheckpointError: on every rank, if one of them could not write; the draft is gone.
        """
        problem, files = None, {}
        try:
            files = self.engine.save(draft / DEEPSPEED_FOLDER)
            name = random_file(dist.get_rank())
            files[name] = write_synced(draft / name, random_state())
        except (OSError, RuntimeError) as error:
            reason = reason_of(error) if isinstance(error, OSError) else str(error)
            problem = f"rank {dist.get_rank()} cannot write its part: {reason}"
        parts: list | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object((problem, {name: asdict(facts) for name, facts in files.items()}), parts)

        def check() -> None:
            if problems := [problem for problem, _ in parts if problem]:
                raise CheckpointError(problems[0])

        self.on_first(check, draft)
        return {name: FileFacts(**facts) for _, files in parts or () for name, facts in files.items()}

    def on_first(self, work: Callable[[], object], draft: Path | None = None) -> None:
        """Do something on rank 0; if it fails, remove the draft and raise CheckpointError on all ranks."""
        problem = [None]
        if dist.get_rank() == 0:
            try:
                work()
            except (OSError, CheckpointError) as error:
                problem = [str(error) if isinstance(error, CheckpointError) else reason_of(error)]
                if draft is not None:
                    shutil.rmtree(draft, ignore_errors=True)
        dist.broadcast_object_list(problem, src=0)
        if problem[0] is not None:
            kept = f"the one after step {self.last_step} is good" if self.last_step else "none was saved before"
            raise CheckpointError(f"the checkpoint could not be saved: {problem[0]} ({kept})")


def leave_behind(config: TrainConfig, step: int, log: RunLog) -> None:
    """Move checkpoints after `step` out of the way: damaged ones, and those of a past that is not gone on from."""
    for place in set_aside(config.output_dir / "checkpoints", step):
        log.warn(f"a checkpoint after step {step} was moved to {place}")
