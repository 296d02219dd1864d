"""What a resume restores, all of it: `RunState`, with the best evaluation beside it.

On disk it is a checkpoint (`hafrm_ds.engine.checkpoint`): what DeepSpeed saves, the random numbers of each rank, and
TrainingState for the rest. What follows from the step alone has no state: the batch plan and the learning rate.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hafrm_ds.config import TrainConfig
from hafrm_ds.engine.checkpoint import (
    DEEPSPEED_FOLDER,
    FileFacts,
    TrainingState,
    random_file,
    random_state,
    restore_random_state,
    write_json,
)
from hafrm_ds.engine.engine import TrainingEngine
from hafrm_ds.training.logging import RunLog


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

    @classmethod
    def of(cls, config: TrainConfig) -> "Best":
        """By evaluation.best_metric, or by the first judge of the run on the first evaluation set."""
        first = next((f"{name}/{config.objective.measures[0]}" for name in config.data.eval), None)
        return cls(config.evaluation.best_metric or first)

    def is_better(self, value: float, other: float) -> bool:
        """Losses are better when they are smaller, everything else when it is larger."""
        is_loss = self.metric is not None and self.metric.split("/")[-2] == "loss"
        return value < other if is_loss else value > other

    def consider(self, step: int, value: float) -> None:
        """Note the value of the metric at an evaluation. One that is no number is never the best."""
        if not step:
            return
        self.latest_value, self.latest_step = value, step
        if not math.isnan(value) and (self.value is None or self.is_better(value, self.value)):
            self.value, self.step, self.evaluations_since = value, step, 0
        else:
            self.evaluations_since += 1


@dataclass
class RunState:
    """Everything that changes while a run trains. `restore` puts it back, `save` and `saved_with` write it.

    engine: the trained weights and the optimizer's moments.
    best: the best evaluation so far, and how many have followed it.
    step: optimizer steps done. The rows of metrics.jsonl, TensorBoard and the W&B run are truncated to it.
    last_evaluation: set -> its metrics at the last evaluation.
    evaluation_is_due: the evaluation after this step has not been made.
    alpha: the weight of the policy loss for objective.policy_share, once it is found.
    judge: the combined judge as the last evaluation has fitted it (`JudgeFit.to_json`); None where it has not.

    The random numbers of each rank, which only the dropout of adapters draws, belong to it too.
    """

    engine: TrainingEngine
    best: Best
    step: int = 0
    last_evaluation: dict[str, dict[str, float]] = field(default_factory=dict)
    evaluation_is_due: bool = False
    alpha: float | None = None
    judge: dict[str, Any] | None = None

    def restore(self, checkpoint: Path, saved: TrainingState, config: TrainConfig, log: RunLog) -> None:
        """Put everything back as it was after a checkpoint. All ranks call this together."""
        log.start(config, saved.step, saved.evaluation_is_due)
        self.restore_weights(checkpoint, saved)
        own = checkpoint / random_file(dist.get_rank())
        if own.exists():  # a rank that was not there before has the state of a fresh start
            restore_random_state(json.loads(own.read_text()))
        self.step, self.evaluation_is_due = saved.step, saved.evaluation_is_due
        # Values of another metric (checkpoint.allow_changed) compare with none of this: the best is found anew.
        if Best.of(TrainConfig.model_validate(saved.config)).metric == self.best.metric:
            self.best.step, self.best.value = saved.best_step, saved.best_value
            self.best.evaluations_since = saved.evaluations_since_best
        if saved.config["objective"].get("policy_share") != config.objective.policy_share:
            self.alpha = None  # that of another share (checkpoint.allow_changed) is found anew

    def restore_weights(self, checkpoint: Path, saved: TrainingState) -> None:
        """Put back the weights and the optimizer, whatever stage and ranks saved them, with their
        evaluation, judge and alpha."""
        self.engine.load(checkpoint / DEEPSPEED_FOLDER, saved.zero_stage, saved.world_size)
        self.last_evaluation, self.judge, self.alpha = dict(saved.last_evaluation), saved.judge, saved.alpha

    def save(self, draft: Path) -> dict[str, FileFacts]:
        """Write this rank's part of a checkpoint: its share of weights and moments, and its random numbers.

        Returns:
            What this rank has written: name relative to `draft` -> facts.

        Raises:
            OSError, RuntimeError: it cannot be written.
        """
        files = self.engine.save(draft / DEEPSPEED_FOLDER)
        name = random_file(dist.get_rank())
        return files | {name: write_json(draft / name, random_state())}

    def saved_with(self, config: TrainConfig, data: dict[str, str], reference: str) -> TrainingState:
        """The rest, as a checkpoint holds it.

        Args:
            data, reference: what the run belongs to, as `ResumePoint.check_content` takes it.
        """
        best = self.best
        return TrainingState(
            step=self.step,
            world_size=dist.get_world_size(),
            zero_stage=self.engine.stage,
            config=config.model_dump(mode="json"),
            data=data,
            reference=reference,
            metric=best.latest_value if best.latest_step == self.step else None,
            best_step=best.step,
            best_value=best.value,
            evaluations_since_best=best.evaluations_since,
            evaluation_is_due=self.evaluation_is_due,
            last_evaluation=self.last_evaluation,
            uses_stock_logits=self.engine.model.uses_stock_logits,
            alpha=self.alpha,
            judge=self.judge,
        )

    def note_best(self, step: int) -> None:
        """Compare the last evaluation with the best one, by the value that rank 0 has: all ranks must find the same,
        and processors of other kinds may round a mean otherwise."""
        if self.best.metric is None:
            return
        name, kind, judge = self.best.metric.rsplit("/", 2)
        value = torch.tensor(self.last_evaluation[name][f"{kind}/{judge}"], dtype=torch.float64)
        value = value.to(self.engine.device)
        dist.broadcast(value, src=0)
        self.best.consider(step, value.item())
