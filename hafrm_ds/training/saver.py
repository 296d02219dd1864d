"""Saving and resuming, all ranks together: when a checkpoint is due, how it is written, and when the run stops."""

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from hafrm_ds.config import TrainConfig
from hafrm_ds.engine.checkpoint import (
    CheckpointError,
    FileFacts,
    checkpoint_name,
    complete,
    prune,
    read_state,
    reason_of,
    set_aside,
    start_draft,
)
from hafrm_ds.engine.engine import TrainingEngine
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.processes.stopping import Stopped, reason_of_vote
from hafrm_ds.training.logging import RunLog
from hafrm_ds.training.resume import ResumePoint, why_not_whole
from hafrm_ds.training.run_state import Best, RunState

MINUTE = 60.0


class CheckpointSaver:
    """Saves a run's checkpoints, when they are due or when a signal asks for a stop.

    Args:
        data, reference: what the checkpoints belong to, as ResumePoint.check_content takes it.
        resume_point: where the run resumes; None if it starts.
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
        self.state = RunState(engine, Best.of(config))
        """What it saves."""
        point, self.last_step = resume_point, 0
        if point is not None and point.folder.parent.resolve() == self.root.resolve():  # else it is another run's
            self.last_step = point.state.step
        self.lacks_evaluation = point is not None and point.state.evaluation_is_due
        """The checkpoint after `last_step` was saved before the evaluation that follows it."""
        self.last_time = time.monotonic()
        self.stop_reason: str | None = None
        self.is_time = False

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

    def begin(self) -> None:
        """Restore the state that the resume point has, or begin with the first step. All ranks call this together."""
        if self.log.writes:
            set_aside_later(self.config, self.resume_point.state.step if self.resume_point else 0, self.log)
        if self.resume_point is None:
            self.log.start(self.config, 0)
            return
        folder, saved = self.resume_point.folder, self.resume_point.state
        self.state.restore(folder, saved, self.config, self.log)
        self.log.print(
            f"resuming after step {saved.step} from {folder}"
            + ("" if saved.world_size == dist.get_world_size() else f", written by {saved.world_size} processes")
            + ("" if saved.zero_stage == self.engine.stage else f", written under ZeRO stage {saved.zero_stage}")
        )

    def after_step(self) -> None:
        """Save if it is due.

        Raises:
            Stopped: a rank was asked to stop; the step has been saved.
            CheckpointError: the checkpoint cannot be written.
        """
        step = self.state.step
        by_steps = self.options.every_steps and step % self.options.every_steps == 0
        is_best = self.options.final == "best" and self.state.best.step == step
        is_due = step > self.last_step and (by_steps or is_best or self.is_time or self.stop_reason)
        # final/ gets its evaluation from the best checkpoint, which is saved again if it has come first.
        if is_due or (is_best and self.lacks_evaluation):
            self.save()
        if self.stop_reason is not None:
            raise Stopped(self.stop_reason, step, checkpoint_name(step) if step else None)

    def restore_step(self, step: int) -> bool:
        """Restore the weights and the evaluation after an earlier step, once the run is over; False, with a warning, if
        its checkpoint is not whole."""
        folder = self.root / checkpoint_name(step)
        problem, _ = why_not_whole(folder, self.processes.for_job("best"))
        if problem is not None:
            self.log.warn(f"final/ gets the weights after the last step, as {folder} cannot be used: {problem}")
            return False
        saved = read_state(folder)
        self.state.restore_weights(folder, saved)
        self.state.last_evaluation, self.state.judge = saved.evaluation_of_step, saved.judge_of_step
        return True

    def save(self) -> None:
        """Write a checkpoint of the state. All ranks call this together."""
        started, step = time.perf_counter(), self.state.step
        draft = self.root / f".{checkpoint_name(step)}"
        self.on_first(lambda: start_draft(self.root, step, self.engine.expected_checkpoint_bytes()))
        files = self.write_parts(draft)
        saved = self.state.saved_with(self.config, self.data, self.reference)

        def finish() -> None:
            # The row comes first: if the process dies between the two, resuming from the one before truncates it. A
            # checkpoint that is saved again has its row.
            size = sum(facts.bytes for facts in files.values())
            if step > self.last_step:
                self.log.metrics("checkpoint", step, {"seconds": time.perf_counter() - started, "bytes": size})
            self.log.sync()
            complete(draft, self.root, saved, files)
            try:
                prune(self.root, self.options.keep_last, saved.best_step, self.state.best.is_better)
            except OSError as error:  # the new one is whole, so the run goes on
                self.log.warn(f"an old checkpoint cannot be deleted, and only takes up space now: {error}")

        self.on_first(finish, draft)
        self.last_step, self.last_time, self.is_time = step, time.monotonic(), False
        self.lacks_evaluation = self.state.evaluation_is_due

    def write_parts(self, draft: Path) -> dict[str, FileFacts]:
        """Each rank writes its files; rank 0 gets the facts of all.

        Raises:
            CheckpointError: on every rank, if one of them could not write; the draft is gone.
        """
        problem, files = None, {}
        try:
            files = self.state.save(draft)
        except (OSError, RuntimeError) as error:
            reason = reason_of(error) if isinstance(error, OSError) else str(error)
            problem = f"rank {dist.get_rank()} cannot write its part: {reason}"
        parts: list | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object((problem, {name: asdict(facts) for name, facts in files.items()}), parts)

        def check() -> None:
            if problems := [problem for problem, _ in parts or () if problem]:
                raise CheckpointError(problems[0])

        self.on_first(check, draft)
        return {name: FileFacts(**facts) for _, files in parts or () for name, facts in files.items()}

    def on_first(self, work: Callable[[], object], draft: Path | None = None) -> None:
        """Do something on rank 0; if it fails, remove the draft and raise CheckpointError on all ranks."""
        problem: list[str | None] = [None]
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


def set_aside_later(config: TrainConfig, step: int, log: RunLog) -> None:
    """Move checkpoints after `step` out of the way: damaged ones, and those of a past that is not resumed."""
    for place in set_aside(config.output_dir / "checkpoints", step):
        log.warn(f"a checkpoint after step {step} was moved to {place}")
