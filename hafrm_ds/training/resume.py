"""Where a run resumes: the newest whole checkpoint, and whether this run is the one that wrote it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hafrm_ds.config import TrainConfig, defaults_of, options_of
from hafrm_ds.engine.checkpoint import (
    CheckpointError,
    TrainingState,
    UnreadableError,
    damaged_file,
    read_manifest,
    read_state,
    restore_replaced_steps,
    saved_steps,
)
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.training.logging import RunLog

FREE_TO_CHANGE = (
    "output_dir",
    "resume",
    "deepspeed",  # another stage, or other settings of it, are dealt out anew
    "checkpoint.",
    "logging.",
    "data.cache_dir",
    "data.num_proc",
    # The content of these is compared instead of their places.
    "model.name_or_path",
    "model.revision",
    "data.train",
    "data.eval",
    "reference.",
    # Cost, and the last bits of a sum.
    "batch.max_tokens_per_micro_batch",
    "deterministic",
    "optimizer.reduce_in_fp32",
    "model.gradient_checkpointing",
    "model.log_probs",
    "model.fused",
)
"""Options, or sections that end in a dot, that change nothing of what a run computes."""


@dataclass(frozen=True)
class ResumePoint:
    """A whole checkpoint of this run."""

    folder: Path
    state: TrainingState
    allow_changed: tuple[str, ...]

    def settle(self, config: TrainConfig) -> TrainConfig:
        """The configuration with what `auto` leaves open decided as it was: equal partitions give equal last bits."""
        return settled(config, self.state.config)

    def check_config(self, config: TrainConfig) -> None:
        """Raises CheckpointError naming the options that differ from those of the checkpoint."""
        differences = changed_options(self.state.config, self.settle(config).model_dump(mode="json"))
        self.refuse(differences, "was written by a run with other options")

    def check_content(self, data: Mapping[str, str], reference: str) -> None:
        """Raises CheckpointError when the pairs or the reference weights are not those of the checkpoint.

        Args:
            data: as `fingerprints_of` gives it.
            reference: name of the namespace of the start weights.
        """
        differences = {}
        for name in sorted(self.state.data.keys() | data.keys()):
            if self.state.data.get(name) != data.get(name):
                option = "data.train" if name == "train" else "data.eval"
                known = " (the set is not there any more)" if name not in data else ""
                known = " (the set was not there)" if name not in self.state.data else known
                differences[option] = f"{option}: the pairs of {name!r} have changed{known}"
        if self.state.reference != reference:
            differences["model.name_or_path"] = (
                f"model.name_or_path: the start weights are those of {reference} here, of {self.state.reference} "
                "there: other weights, dtype or version"
            )
        self.refuse(differences, "does not fit this run")

    def refuse(self, differences: dict[str, str], reason: str) -> None:
        refused = {name: text for name, text in differences.items() if name not in self.allow_changed}
        if refused:
            lines = "".join(f"\n  - {text}" for text in refused.values())
            raise CheckpointError(
                f"{self.folder} {reason}:{lines}\nResume it as it was, start anew in another --output_dir, or allow "
                f"the change: --checkpoint.allow_changed '[{', '.join(sorted(refused))}]'"
            )

    def check_stage(self, zero_stage: int) -> None:
        """Raises CheckpointError when the checkpoint cannot be taken over under this stage."""
        if zero_stage != self.state.zero_stage and 0 in (zero_stage, self.state.zero_stage):
            raise CheckpointError(
                f"{self.folder} was written under ZeRO stage {self.state.zero_stage}, and this run has stage "
                f"{zero_stage}: stages 1, 2 and 3 may follow one another, stage 0 only itself. Set --deepspeed to a "
                f"file of stage {self.state.zero_stage}"
            )


def settled(config: TrainConfig, saved: dict) -> TrainConfig:
    """A configuration with what `auto` leaves open decided as in a saved one (as JSON)."""
    decided = {name: saved["batch"][name] for name, value in config.batch if value == "auto"}
    return config.model_copy(update={"batch": config.batch.model_copy(update=decided)})


def changed_options(saved: dict, current: dict, free: tuple[str, ...] = FREE_TO_CHANGE) -> dict[str, str]:
    """Option -> in words how it differs, for those that change what a run computes. Of two configurations as JSON.

    An option that is younger than what was saved had its default there.
    """
    there, here = dict(defaults_of(TrainConfig)) | dict(options_of(saved)), dict(options_of(current))
    return {
        name: f"{name}: {json.dumps(there.get(name))} there, {json.dumps(here.get(name))} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name) and not name.startswith(free)
    }


def changed_since(saved: dict, config: TrainConfig, free: tuple[str, ...] = FREE_TO_CHANGE) -> dict[str, str]:
    """`changed_options` against config.yaml of a finished run, which has decided what `auto` leaves open."""
    return changed_options(saved, settled(config, saved).model_dump(mode="json"), free)


def find_resume_point(config: TrainConfig, processes: Processes, log: RunLog) -> ResumePoint | None:
    """The checkpoint that the option `resume` asks for; None to start anew. All ranks share the reading of the files.

    Called before the process group is started: checksums of a large checkpoint take their time.

    Raises:
        CheckpointError: a checkpoint that was named cannot be used, none of those that are there can, or it belongs to
            another configuration.
    """
    if config.resume == "none":
        return None
    is_auto = config.resume == "auto"
    root = config.output_dir / "checkpoints"

    def named() -> list[str]:
        if not is_auto:
            return [str(Path(config.resume).resolve())]
        restore_replaced_steps(root)
        return [str(path) for path in saved_steps(root).values()]

    candidates = processes.from_first("checkpoints", named)
    for candidate in map(Path, candidates):
        reason, is_whole_for_first = why_not_whole(candidate, processes)
        if reason is None:
            point = ResumePoint(candidate, read_state(candidate), tuple(config.checkpoint.allow_changed))
            point.check_config(config)
            return point
        if is_whole_for_first:
            raise CheckpointError(
                f"{candidate} cannot be resumed: rank 0 finds it whole, but {reason}. Nothing was changed. All hosts "
                "must share the disk that it is on: see that it is mounted there and may be read, and start again"
            )
        if not is_auto:
            raise CheckpointError(f"--resume {candidate} cannot be resumed: {reason}")
        log.warn(f"{candidate} is passed over: {reason}")
    if candidates:
        # Starting anew would move them all away and empty metrics.jsonl, for what may be a disk that comes back.
        raise CheckpointError(
            f"--resume auto can use none of the checkpoints in {root}, for the reasons above. Nothing was changed. "
            "Give --resume PATH of a whole one, or start anew in another --output_dir, or here once you have moved them"
        )
    return None


def why_not_whole(folder: Path, processes: Processes) -> tuple[str | None, bool]:
    """What is wrong with a checkpoint, and whether it is only that another rank cannot read what rank 0 can. The same
    on all ranks; each reads a part of its files."""
    own, is_unreadable = problem_of_share(folder, processes.rank, processes.world_size)
    reports = processes.texts_of_all(f"check {folder}", json.dumps([processes.name, own, is_unreadable]))

    def verdict() -> tuple[str | None, bool]:
        elsewhere = None
        for rank, (name, problem, is_unreadable) in enumerate(map(json.loads, reports)):
            if is_unreadable:
                # Is a file lost, or a disk not there on one host? Rank 0 reads that share itself.
                elsewhere = elsewhere or f"{name} cannot read it: {problem}"
                problem, _ = problem_of_share(folder, rank, processes.world_size)
            if problem is not None:
                return problem, False
        return elsewhere, elsewhere is not None

    problem, is_whole_for_first = processes.from_first(f"verdict on {folder}", verdict)
    return problem, is_whole_for_first


def problem_of_share(folder: Path, rank: int, world_size: int) -> tuple[str | None, bool]:
    """What is wrong with a rank's share of a checkpoint as this process reads it, and whether that is only that it
    cannot be read."""
    try:
        return damaged_file(folder, sorted(read_manifest(folder).items()), rank, world_size), False
    except CheckpointError as error:
        return str(error), isinstance(error, UnreadableError)
