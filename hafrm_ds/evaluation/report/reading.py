"""The folder of a run, an evaluation or a comparison of methods as plain data: what a report shows, and nothing
of how it looks.

Legend: R rows of metrics.jsonl.
"""

import json
import os
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from hafrm_ds.config import options_of
from hafrm_ds.data.report import DataReport
from hafrm_ds.data.tables import Estimate
from hafrm_ds.errors import DataError
from hafrm_ds.evaluation.analysis import analyse
from hafrm_ds.evaluation.comparison import COMPARISON_FILE, run_folder
from hafrm_ds.evaluation.figures import JUDGES
from hafrm_ds.evaluation.pair_scores import EVALUATION_FILE, SCORES_FOLDER, PairScores, load_all

METRICS_FILE = "metrics.jsonl"
CONFIG_FILE = "config.yaml"
ANALYSIS_KEYS = {
    "pairs",
    "prompts",
    "ties",
    "accuracy",
    "margin",
    "yardsticks",
    "calibration",
    "by_source",
    "by_length_difference",
    "agreement",
}
BENCHMARK_KEYS = {"cut", "judges"}
COMPARISON_KEYS = {"seeds", "planned_seeds", "sets", "pairs", "methods", "differences"}

SUMMARY_FILE = "summary.json"
"""In the run folder of a finished run."""
STOPPED_FILE = "stopped.json"
"""In the run folder while a stopped run has not been resumed: the reason, the step and the checkpoint."""


def by_step(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The numbers of rows of one kind, by their steps: [R, names] float64, NaN where a row has no such number."""
    numbers = [{name: value for name, value in row.items() if name != "step" and is_number(value)} for row in rows]
    return pd.DataFrame(numbers, [int(row["step"]) for row in rows], dtype=np.float64)


def known(rows: pd.DataFrame, name: str) -> np.ndarray:
    """The finite values of a column, [<= R]; empty where there is none."""
    values = rows[name].to_numpy() if name in rows else np.empty(0)
    return values[np.isfinite(values)]


@dataclass(frozen=True)
class SetResult:
    """What is known of one evaluation set.

    over_steps: its rows of metrics.jsonl, empty for an evaluation alone. scores: None where they were not kept.
    analysis: as `analyse` gives it, None where there are no scores, or `problem` says why there can be none.
    """

    over_steps: pd.DataFrame
    scores: PairScores | None = None
    analysis: dict[str, Any] | None = None
    problem: str = ""

    @property
    def overview(self) -> dict[str, Any]:
        """The analysis; without one, the pairs and accuracies of the last evaluation."""
        if self.analysis is not None:
            return self.analysis
        values = {judge: known(self.over_steps, f"accuracy/{judge}") for judge in JUDGES}
        last = {judge: float(each[-1]) for judge, each in values.items() if len(each)}
        pairs = known(self.over_steps, "pairs")
        return {
            "pairs": int(pairs[-1]) if len(pairs) else None,
            "accuracy": {judge: {"value": value, "low": None, "high": None} for judge, value in last.items()},
        }

    @property
    def accuracy(self) -> dict[str, Estimate]:
        """Judge -> value, and low and high where there are scores to resample."""
        return self.overview["accuracy"]


@dataclass
class Results:
    """A run (config.yaml, metrics.jsonl, ...) or an evaluation of a model (evaluation.json). What is not there is
    empty."""

    folder: Path
    name: str
    is_run: bool
    state: str
    """Whether the run has ended, in words; the model of an evaluation."""
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    data: dict[str, DataReport] = field(default_factory=dict)
    training: pd.DataFrame = field(default_factory=lambda: by_step([]))
    checks: pd.DataFrame = field(default_factory=lambda: by_step([]))
    checkpoints: pd.DataFrame = field(default_factory=lambda: by_step([]))
    gradients: pd.DataFrame = field(default_factory=lambda: by_step([]))
    sets: dict[str, SetResult] = field(default_factory=dict)
    best: dict[str, Any] | None = None
    benchmarks: dict[str, Any] = field(default_factory=dict)


def read_results(folder: Path) -> Results:
    """The run or the evaluation in the folder.

    Raises:
        DataError: the folder holds neither, or one of its files cannot be read.
    """
    if (folder / METRICS_FILE).exists() or (folder / CONFIG_FILE).exists():
        return read_run(folder)
    if (folder / EVALUATION_FILE).exists():
        return read_evaluation(folder)
    if (folder / COMPARISON_FILE).exists():
        raise DataError(f"{folder} holds a comparison of methods, which is drawn alone; name the runs in it instead")
    raise DataError(f"{folder} holds neither a run ({METRICS_FILE}) nor an evaluation ({EVALUATION_FILE})")


def read_comparison(folder: Path) -> tuple[dict[str, Any], list[Path]]:
    """A comparison of methods: (results as `compare` gives them, folders of the trainings, seed by seed). Raises
    DataError as `read_results` does."""
    file = folder / COMPARISON_FILE
    results = read_mapping(file)
    if missing := COMPARISON_KEYS - set(results):
        raise DataError(
            f"{file} has no {', '.join(sorted(missing))}: it is none of this version. launch/compare.py writes it anew "
            "when it is started again"
        )
    runs = [run_folder(folder, method, seed) for seed in results["seeds"] for method in results["methods"]]
    return results, runs


def read_run(folder: Path) -> Results:
    """A run in any state. Raises DataError as `read_results` does."""
    rows = read_rows(folder / METRICS_FILE)
    kinds: dict[str, list] = {"train": [], "eval": [], "check": [], "checkpoint": [], "gradients": []}
    for row in rows:
        kinds.setdefault(row["kind"], []).append(row)
    over_steps: dict[str, list] = {}
    for row in kinds["eval"]:
        over_steps.setdefault(str(row.get("set")), []).append(row)
    scores = load_all(folder / SCORES_FOLDER)
    summary = read_mapping(folder / SUMMARY_FILE)
    return Results(
        folder=folder,
        name=folder.resolve().name,
        is_run=True,
        state=state_of_run(folder, summary, rows),
        config=read_mapping(folder / CONFIG_FILE),
        environment=read_mapping(folder / "environment.json"),
        data=data_reports(read_mapping(data_file := folder / "data_report.json"), data_file),
        training=by_step(kinds["train"]),
        checks=by_step(kinds["check"]),
        checkpoints=by_step(kinds["checkpoint"]),
        gradients=by_step(kinds["gradients"]),
        sets={
            name: result_of(scores.get(name), by_step(over_steps.get(name, [])))
            for name in dict.fromkeys([*over_steps, *scores])
        },
        best=summary.get("best"),
    )


def read_evaluation(folder: Path) -> Results:
    """The evaluation of a model. Raises DataError as `read_results` does."""
    file = folder / EVALUATION_FILE
    content = read_mapping(file)
    scores = load_all(folder / SCORES_FOLDER)
    for key in ("sets", "data", "benchmarks", "environment"):
        if not isinstance(content.get(key, {}), dict):
            raise DataError(f"{file}: {key} is no mapping")
    for name, analysis in content.get("sets", {}).items():
        if missing := ANALYSIS_KEYS - set(analysis):
            raise DataError(f"{file}: the set {name} has no {', '.join(sorted(missing))}")
    for name, found in content.get("benchmarks", {}).items():
        if missing := BENCHMARK_KEYS - set(found):
            raise DataError(f"{file}: the benchmark {name} has no {', '.join(sorted(missing))}")
    return Results(
        folder=folder,
        name=folder.resolve().name,
        is_run=False,
        state=state_of_evaluation(content),
        data=data_reports(content.get("data", {}), file),
        environment=content.get("environment", {}),
        sets={
            name: SetResult(by_step([]), scores.get(name), analysis)
            for name, analysis in content.get("sets", {}).items()
        },
        benchmarks=content.get("benchmarks", {}),
    )


def result_of(scores: PairScores | None, over_steps: pd.DataFrame) -> SetResult:
    if scores is None:
        return SetResult(over_steps)
    try:
        return SetResult(over_steps, scores, analyse(scores))
    except DataError as error:  # no pairs, or a score that is not finite: the curves may say why
        return SetResult(over_steps, scores, problem=str(error))


def state_of_run(folder: Path, summary: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    if summary:
        return f"finished after {summary.get('steps')} steps"
    if stopped := read_mapping(folder / STOPPED_FILE):
        checkpoint = stopped.get("checkpoint")
        resumes = f"; --resume auto resumes from {checkpoint}" if checkpoint else ""
        return f"stopped by {stopped.get('reason')} after step {stopped.get('step')}{resumes}"
    if not rows:
        return "has written no row yet"
    written = datetime.fromtimestamp((folder / METRICS_FILE).stat().st_mtime, UTC)
    return f"has not ended: step {rows[-1]['step']} was written at {written:%Y-%m-%d %H:%M} UTC"


def state_of_evaluation(content: dict[str, Any]) -> str:
    reference = content.get("reference")
    beside = f" beside the reference {reference}, beta {content.get('beta')}" if reference else ""
    return f"{content.get('model', 'an unnamed model')}{beside}"


def distinct_names(folders: list[Path]) -> list[str]:
    """Folder names, with as many of the folders above as it takes to tell them apart."""
    paths = [folder.resolve() for folder in folders]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = [os.path.join(*path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    return names


# ---- files ----------------------------------------------------------------------------------------------------------


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; a last line that is being written, or that a crash broke off, is left out."""
    if not file.exists():
        return []
    rows: list[dict[str, Any]] = []
    lines = read_text(file).splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not is_number(row["step"]) or not isinstance(row["kind"], str):
                raise TypeError("step or kind is of another type")
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines) and isinstance(error, ValueError):
                break
            raise DataError(f"{file}:{number} is no row with step and kind: {error!r}") from error
        rows.append(row)
    return rows


def read_mapping(file: Path) -> dict[str, Any]:
    """A JSON or YAML file that holds a mapping; empty if there is no such file."""
    if not file.exists():
        return {}
    text = read_text(file)
    try:
        # A run that is about to start has made an empty config.yaml, to see that it can write.
        content = yaml.safe_load(text) or {} if file.suffix == ".yaml" else json.loads(text)
    except (ValueError, yaml.YAMLError) as error:
        raise DataError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise DataError(f"{file} holds a {type(content).__name__}, not a mapping")
    return content


def data_reports(sets: dict[str, Any], file: Path) -> dict[str, DataReport]:
    """Args: file: where `sets` stands."""
    try:
        return {name: DataReport.from_json(content) for name, content in sets.items()}
    except (KeyError, TypeError) as error:
        raise DataError(f"{file} is no data report of this version: {error!r}") from error


def read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def differences(trees: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Dotted name -> its value in each of several nested mappings, for the names whose values are not all equal."""
    flat = [dict(options_of(tree)) for tree in trees]
    names = dict.fromkeys(name for values in flat for name in values)
    columns = {name: [values.get(name) for values in flat] for name in names}
    return {name: values for name, values in columns.items() if any(value != values[0] for value in values)}
