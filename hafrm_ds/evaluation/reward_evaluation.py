"""An evaluation of what is no single model: a composition of rewards, or a function, on pairs and benchmarks.

It has no tokenizer of its own, so it is asked about messages, as a file of conversations is. It leaves the files of
`evaluation.evaluate`, with one judge, `reward`. The lengths of answers are in words, and nothing is truncated.

sources -> rows of messages -> OUTPUT/parts/asked.jsonl -> OUTPUT/parts/scores.jsonl -> evaluation.json
"""

from pathlib import Path
from typing import Any

import numpy as np

from hafrm_ds.data.report import Example
from hafrm_ds.durability import write_whole
from hafrm_ds.errors import ConfigError, DataError
from hafrm_ds.evaluation.analysis import analyse
from hafrm_ds.evaluation.benchmarks.benchmark import Question
from hafrm_ds.evaluation.benchmarks.catalogue import BENCHMARKS
from hafrm_ds.evaluation.best_of_n.ranking import identity_of_scorer, read_lines, score
from hafrm_ds.evaluation.evaluate import REASONS_SHOWN
from hafrm_ds.evaluation.figures import render_evaluation
from hafrm_ds.evaluation.options import EvaluationOptions
from hafrm_ds.evaluation.pair_rows import compared, grouping_of, rows_of_pairs, text_of
from hafrm_ds.evaluation.pair_scores import EVALUATION_FILE, SCORES_FOLDER, PairScores
from hafrm_ds.evaluation.results import PARTS_FOLDER, hash_of, leave_results
from hafrm_ds.processes.agreement import environment
from hafrm_ds.processes.console import Console
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.scoring.files import ScoringOptions
from hafrm_ds.scoring.rows import json_line

OF_A_MODEL = (
    "reference",
    "reference_store",
    "fit_judge",
    "save_judge",
    "beta",
    "max_length",
    "truncation",
    "misfits",
    "deepspeed",
)
"""Options of an evaluation that only a single model has."""
MAX_DROPPED_SHARE = 0.05
ASKED_FILE, RATED_FILE = "asked.jsonl", "scores.jsonl"

Rows = list[dict[str, Any]]


def evaluate_reward(options: EvaluationOptions, processes: Processes) -> None:
    """Evaluate a composition or a function. All processes call this together; it leaves what `evaluate` leaves.

    Raises:
        ConfigError: an option that only a model has. DataError, ModelError: data or rewards cannot be used.
    """
    if given := [f"--{name}" for name in OF_A_MODEL if name in options.model_fields_set]:
        raise ConfigError([f"{', '.join(given)}: of a single model alone, and {options.model} is none; leave it out"])
    log = Console(processes)
    folder = options.output_dir / PARTS_FOLDER
    scoring = ScoringOptions(
        model=Path(options.model),
        input=folder / ASKED_FILE,
        output=folder / RATED_FILE,
        max_tokens_per_micro_batch=options.max_tokens_per_micro_batch,
        **options.loading,
    )
    asked = read_asked(options) if processes.is_first else {}
    questions = read_questions(options) if processes.is_first else {}
    asked |= {name: as_rows(each) for name, each in questions.items()}

    def identity() -> dict[str, Any]:
        return {"reward": identity_of_scorer(scoring), "asked": {name: hash_of(rows) for name, rows in asked.items()}}

    def results(folder: Path) -> dict[str, Any] | None:
        processes.from_first("asked", lambda: write_asked(scoring.input, asked))
        score(options.model, scoring, processes, log)
        if not processes.is_first:
            return None
        found = results_of(options, split(read_lines(scoring.output), asked), questions, log)
        return found | {"environment": environment(processes.world_size, processes.device), "job": identity()}

    leave_results(options.output_dir / EVALUATION_FILE, render_evaluation, identity, results, processes, log)


# ---- what is asked -------------------------------------------------------------------------------------------------


def read_asked(options: EvaluationOptions) -> dict[str, Rows]:
    return {
        f"set {name}": rows_of_pairs(each, options.cache_dir, options.max_pairs) for name, each in options.data.items()
    }


def read_questions(options: EvaluationOptions) -> dict[str, list[Question]]:
    return {
        f"benchmark {name}": BENCHMARKS[name].read(path or BENCHMARKS[name].default_path, None)
        for name, path in options.benchmarks.items()
    }


def as_rows(questions: list[Question]) -> Rows:
    return [{"id": each.id, "prompt": each.prompt, "responses": each.responses} for each in questions]


def write_asked(file: Path, asked: dict[str, Rows]) -> None:
    if not file.exists():
        write_whole(file, b"".join(json_line(row) for rows in asked.values() for row in rows))


def split(rated: Rows, asked: dict[str, Rows]) -> dict[str, Rows]:
    """The rows of all sets and benchmarks, one after another -> those of each."""
    rows = iter(rated)
    return {name: [next(rows) for _ in own] for name, own in asked.items()}


# ---- what is said --------------------------------------------------------------------------------------------------


def results_of(
    options: EvaluationOptions, rated: dict[str, Rows], questions: dict[str, list[Question]], log: Console
) -> dict[str, Any]:
    """What evaluation.json says; the scores of the sets are left in output_dir."""
    return {
        "model": options.model,
        "reference": None,
        "sets": {name: analyse_set(name, rated[f"set {name}"], options, log) for name in options.data},
        "benchmarks": {
            name: judge_benchmark(name, rated[f"benchmark {name}"], questions[f"benchmark {name}"], options)
            for name in options.benchmarks
        },
    }


def analyse_set(name: str, rows: Rows, options: EvaluationOptions, log: Console) -> dict[str, Any]:
    """Raises DataError if more pairs could not be scored than may be."""
    rows = compared(rows)
    scored = [row for row in rows if row["scores"] is not None]
    if reasons := [reason_of(row) for row in rows if row["scores"] is None]:
        message = f"{name}: {len(reasons):,} of {len(rows):,} pairs could not be scored, the first because {reasons[0]}"
        share = MAX_DROPPED_SHARE if options.max_dropped_share is None else options.max_dropped_share
        if not scored or len(reasons) > share * len(rows):
            raise DataError(f"{message}. --max_dropped_share is {share}")
        log.warn(message)
    groups, ids = grouping_of(scored), [row["id"] for row in scored]
    if groups is not None:
        ids = groups.names(ids)
    scores = PairScores(
        name,
        None,
        1.0,
        ids,
        [row["source"] for row in scored],
        [hash_of(row["prompt"]) for row in scored],
        np.array([[len(text_of(answer).split()) for answer in row["responses"]] for row in scored]),
        reward=np.array([row["scores"] for row in scored], dtype=np.float32),
        groups=groups,
    )
    analysis = analyse(scores)
    for place in scores.mistakes():
        row = scored[place]
        texts = map(text_of, (row["prompt"], *row["responses"]))
        scores.texts[place] = Example(row["id"], row["source"], *texts)
    scores.save(options.output_dir / SCORES_FOLDER)
    return analysis


def reason_of(row: dict[str, Any]) -> str:
    """Why a row could not be scored, by its place in the data instead of that in ASKED_FILE."""
    return f"{row['id']}: {row['score_error'].partition(': ')[2]}"


def judge_benchmark(name: str, rows: Rows, questions: list[Question], options: EvaluationOptions) -> dict[str, Any]:
    """As `Evaluation.judge_benchmark`. A question with an answer that could not be scored is left out."""
    scored = [place for place, row in enumerate(rows) if row["scores"] is not None]
    left_out = [reason_of(row) for row in rows if row["scores"] is None]
    if not scored:
        raise DataError(f"no question of {BENCHMARKS[name].title} can be asked, the first because {left_out[0]}")
    values = [rows[place]["scores"] for place in scored]
    result = BENCHMARKS[name].summarize([questions[place] for place in scored], values)
    if len(left_out) > options.max_missing_share * len(rows):
        result |= {"score": None}
    return {
        "cut": 0,
        "left_out": len(left_out),
        "why_left_out": left_out[:REASONS_SHOWN],
        "judges": {"reward": result},
    }
