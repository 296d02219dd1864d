"""Scoring a file of conversations on any number of processes, a part at a time (`processes.parts`).

IN.jsonl -> parts of equally many lines -> OUT.jsonl.parts/part-NNNNNN.jsonl -> OUT.jsonl
"""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from hafrm_ds.config import ScoringSection
from hafrm_ds.durability import whole_file
from hafrm_ds.errors import DataError
from hafrm_ds.processes.console import Console
from hafrm_ds.processes.parts import claim_folder, leave_together, remove_parts, stamp, work_through
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.rewards.composition import open_reward
from hafrm_ds.rewards.loading import load_reward_for_job
from hafrm_ds.rewards.model import ModelReward, OpenedModel
from hafrm_ds.rewards.reward import OpenedReward, Reward
from hafrm_ds.saved.implicit import SavedCombinedReward, SavedImplicitReward
from hafrm_ds.saved.opening import Judge
from hafrm_ds.scoring.rows import ScoredRow

SMALLEST_PART, MOST_PARTS = 64, 2000
"""A part has at least so many lines, and more where there would be more than so many parts."""
ERRORS_SHOWN = 20
GZIP_MAGIC = b"\x1f\x8b"


class ScoringOptions(ScoringSection):
    """What launch/score.py is asked for."""

    model: Path
    """The final/ folder of a training, another reward model (AutoModelForSequenceClassification with one label), a
    function FILE.py:NAME, or FILE.yaml, which composes rewards."""
    input: Path
    """JSON lines."""
    output: Path
    """JSON lines; must not exist."""
    judge: Judge | None = None
    """What scores: reward (the reward head), implicit (the policy against its reference) or combined (both as one, by
    the fit that is saved with the model). Default: the reward head, and without one the implicit reward."""
    reference: str | None = None
    """Of the implicit reward and the combined judge, what the policy is measured against: a folder, a hub id, or base:
    what its training started from. Default: base."""
    chat_template: str | None = None
    """Name or file of a template, for a tokenizer without one."""
    deepspeed: Path | None = None
    """A DeepSpeed JSON: shard the model over the processes."""

    def open(self) -> OpenedReward:
        """Raises ConfigError or ModelError if it cannot be used, or gives no reward."""
        return open_reward(self.model, judge=self.judge, reference=self.reference, **self.loading)


class Part(NamedTuple):
    """Lines of the input: `num_lines` from byte `start` on, the first of which is line `first_line` (from 1)."""

    start: int
    first_line: int
    num_lines: int


def score_file(options: ScoringOptions, processes: Processes) -> int:
    """Score every row of a file; returns how many could not be scored. All processes call this together.

    Raises:
        DataError: the files cannot be used. ModelError: the model cannot.
    """
    log = Console(processes)
    opened = options.open()
    if isinstance(opened, OpenedModel) and isinstance(opened.saved, SavedImplicitReward):
        log.print(how_it_scores(options, opened.saved))
    folder = options.output.with_name(f"{options.output.name}.parts")
    plan = processes.from_first("plan", lambda: plan_job(options, opened, folder))
    parts = {folder / f"part-{number:06}.jsonl": Part(*part) for number, part in enumerate(plan)}

    def load() -> Callable[[Path], bytes]:
        reward = load_reward_for_job(opened, options.deepspeed, options.max_tokens_per_micro_batch, processes)
        return lambda file: score_part(parts[file], options.input, reward)

    work_through(
        "scoring",
        {file: part.num_lines for file, part in parts.items()},
        load,
        processes,
        log,
        unit="rows",
        together=options.deepspeed is not None,
    )
    num_bad = 0
    if processes.is_first:
        num_bad = join_parts(options.output, folder, parts, log)
    leave_together(processes)
    return num_bad


def how_it_scores(options: ScoringOptions, saved: SavedImplicitReward) -> str:
    """What the scores of a model and its reference are, in words."""
    against = f"against {saved.reference.folder}"
    if options.judge is None:
        return f"{options.model} has no reward head: scored by its implicit reward {against}"
    judge = "both heads" if isinstance(saved, SavedCombinedReward) else "its implicit reward"
    return (
        f"{options.model}: scored by {judge} {against}. Such scores compare answers to one prompt; each prompt adds a "
        "constant of its own"
    )


# ---- what is to be done --------------------------------------------------------------------------------------------


def plan_job(options: ScoringOptions, opened: OpenedReward, folder: Path) -> list[Part]:
    """All parts of the job, in order; makes the folder for them.

    Raises:
        DataError: the output is there already, or its parts belong to another job.
    """
    if options.output.exists() and not folder.exists():
        raise DataError(f"--output {options.output} is already there; choose another file")
    parts = split_into_parts(options.input)
    claim_folder(folder, identity_of(options, opened), is_removed=True)
    return parts


def split_into_parts(input: Path) -> list[Part]:
    """Raises DataError if the input cannot be read, is compressed or has no line."""
    starts = [0]
    try:
        with input.open("rb") as file:
            if file.peek(2)[:2] == GZIP_MAGIC:
                raise DataError(f"--input {input} is compressed; unpack it first (gunzip --keep)")
            for line in file:
                starts.append(starts[-1] + len(line))
    except OSError as error:
        raise DataError(f"--input {input} cannot be read: {error.strerror}") from error
    num_lines = len(starts) - 1
    if not num_lines:
        raise DataError(f"--input {input} is empty")
    length = max(SMALLEST_PART, -(-num_lines // MOST_PARTS))
    firsts = range(0, num_lines, length)
    return [Part(starts[line], line + 1, min(length, num_lines - line)) for line in firsts]


def identity_of(options: ScoringOptions, opened: OpenedReward) -> dict[str, Any]:
    """What the scores depend on: parts of another job never mix with these."""
    model = opened.identity()
    template = model.pop("template", None)  # of a single model it stands by itself
    return {
        "input": stamp(options.input),
        "model": model,
        "max_tokens_per_micro_batch": options.max_tokens_per_micro_batch,
        "template": template,
    }


# ---- doing it ------------------------------------------------------------------------------------------------------


def score_part(part: Part, input: Path, reward: Reward) -> bytes:
    """Content of a part's file: a line with the errors (a JSON list), then a line for each row. Empty lines are passed
    over, but counted."""
    with input.open("rb") as file:
        file.seek(part.start)
        lines = [file.readline() for _ in range(part.num_lines)]
    places = [f"{input.name}:{part.first_line + number}" for number in range(len(lines))]
    rows = [(ScoredRow.read(line.strip(), place), place) for line, place in zip(lines, places) if line.strip()]
    scores = iter(reward.scores([conversation for row, _ in rows for conversation in row.conversations]))
    attributes = reward.attributes if isinstance(reward, ModelReward) else ()
    written, errors = [], []
    for row, place in rows:
        line, error = row.written([next(scores) for _ in row.conversations], place, attributes)
        written.append(line)
        if error:
            errors.append(error)
    return json.dumps(errors).encode() + b"\n" + b"".join(written)


def join_parts(output: Path, folder: Path, parts: Iterable[Path], log: Console) -> int:
    """Put the parts together, remove them, and report the rows that could not be scored; returns how many."""
    errors: list[str] = []
    try:
        with whole_file(output) as joined:
            for part in parts:
                with part.open("rb") as file:
                    errors += json.loads(file.readline())
                    shutil.copyfileobj(file, joined)
        remove_parts(folder)
    except OSError as error:
        raise DataError(f"--output {output} cannot be written: {error.strerror}; start again to join it") from error
    if errors:
        log.warn(f"{len(errors):,} rows could not be scored; their score is null:")
        for reason in errors[:ERRORS_SHOWN]:
            log.warn(reason)
        if len(errors) > ERRORS_SHOWN:
            log.warn(f"and {len(errors) - ERRORS_SHOWN:,} more, each with its reason in score_error")
    log.print(f"the scores are in {output}")
    return len(errors)
