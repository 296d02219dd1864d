"""What all benchmarks share: from rows to questions, and from the rewards of their responses to a result.

    hub id, files -> rows -> Question -> (rewards, from elsewhere) -> result -> table

A result is JSON-able. It and each of its categories and subsets has

    score      share in 0..1; None where a part of it has no questions: no score stands for less than it says
    questions  how many
    ties       equal rewards where the rule looks for the larger; how they count is said by each benchmark
    details    name -> share: other figures of the benchmark, where it has some
    missing    the parts without a score (of a result: categories; of a category: subsets)

and a result has `benchmark`, `title` and `categories`, a category has `subsets`.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hafrm_ds.data.files import Table, find_tables
from hafrm_ds.data.pairs import Message, Row, assistant, in_words
from hafrm_ds.data.row_filter import RowFilter
from hafrm_ds.data.sources import Source, has_splits, is_hub_id, source_from_string, suggestion
from hafrm_ds.errors import DataError, ModelError


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt with its responses, the right ones first."""

    id: str
    """FILE:ROW with rows counted from 1, or hub/id[split]:ROW."""
    subset: str
    prompt: list[Message]
    responses: list[list[Message]]
    num_correct: int
    """How many of the responses are right."""
    key: str = ""
    """The row's own id, where the rule reads it."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A question with the rewards of its responses: those of the right ones, and those of the others."""

    question: Question
    correct: Sequence[float]
    incorrect: Sequence[float]


@dataclass(frozen=True)
class Benchmark:
    """A public benchmark of reward models."""

    name: str
    """Its name on the command line."""
    title: str
    default_path: str
    """Its hub id."""
    split: str
    """Split of the hub data set, unless the path names another: `ORG/NAME?split=SPLIT`."""
    row_format: str
    """What its rows look like, for messages."""
    to_question: Callable[[Row], Question]
    """Raises DataError that names the row and the field."""
    judge: Callable[[list[Judged]], dict[str, Any]]
    """The scoring rule: -> a result without `benchmark` and `title`."""

    def read(self, path: str, cache_dir: Path | None) -> list[Question]:
        """The questions of the benchmark, in the order of its files.

        Args:
            path: a file (json, jsonl, parquet, gzipped or not), a folder of them, a downloaded hub data set (its files
                of `split` are read, where they are named after splits), a folder written by datasets, or a hub id.
                A row filter may follow: `PATH?subset=math-prm`.
            cache_dir: of datasets, for what comes from the hub; None is its own.

        Raises:
            DataError: naming file, row and field, for what is not in the format of this benchmark.
        """
        if not path or path.startswith("preset:"):
            raise DataError(f"{self.title}: {path!r} is neither a file or folder nor a hub id, as {self.default_path}")
        source = Source(**source_from_string(path))
        row_filter = RowFilter(source.where)
        questions = []
        for table in self.open_tables(source, cache_dir):
            for number, content in table.rows():
                row = Row(content, f"{table.name}:{number}", self.name)
                try:
                    if not isinstance(content, dict):
                        raise DataError(f"{row.id}: is {in_words(content)}, expected an object with fields")
                    if row_filter.passes(content):
                        questions.append(self.to_question(row))
                except DataError as error:
                    raise DataError(f"{error}. It was read as {self.title}, with rows of {self.row_format}") from None
        row_filter.check_some_passed(source.path)
        return questions

    def open_tables(self, source: Source, cache_dir: Path | None) -> list[Table]:
        """The tables of the benchmark's split; of files that are not named after splits, all."""
        folder = Path(source.path)
        if source.split is None and (is_hub_id(source.path) or has_splits(folder)):
            return find_tables(source.model_copy(update={"split": self.split}), cache_dir)
        if (folder / "data").is_dir() and not has_splits(folder):
            source = source.model_copy(update={"path": str(folder / "data")})
        tables = find_tables(source, cache_dir)
        shards = [table for table in tables if Path(table.name).name.startswith(f"{self.split}-")]
        return shards or tables

    def summarize(self, questions: list[Question], rewards: Sequence[Sequence[float]]) -> dict[str, Any]:
        """Rewards of all responses, by the order of `questions` and their responses -> result.

        Raises:
            ValueError: for rewards that are not those of the questions.
            ModelError: for a reward that is not finite.
        """
        judged = []
        for question, values in zip(questions, rewards, strict=True):
            if len(values) != len(question.responses):
                raise ValueError(f"{question.id}: {len(values)} rewards for {len(question.responses)} responses")
            values = [float(value) for value in values]
            if not all(map(math.isfinite, values)):
                raise ModelError(f"{question.id}: the model gave a reward that is not finite: {values}")
            judged.append(Judged(question, values[: question.num_correct], values[question.num_correct :]))
        return {"benchmark": self.name, "title": self.title} | self.judge(judged)


# ---- fields of rows ------------------------------------------------------------------------------------------------


def known_name(row: Row, field: str, names: Sequence[str]) -> str:
    """The field's value as it stands in `names`; capitals do not count."""
    value = row.text(field)
    by_lower = {name.lower(): name for name in names}
    if value.lower() not in by_lower:
        raise DataError(
            f"{row.id}: field {field!r} is {value!r}, which is not known{suggestion(value, names)} "
            f"(known: {', '.join(names)})"
        )
    return by_lower[value.lower()]


def responses(row: Row, field: str, *, at_least: int = 1, at_most: int | None = None) -> list[list[Message]]:
    """A list of texts, each as the answer of the assistant."""
    values = row.value(field)
    expected = f"a list of {at_least if at_most == at_least else f'at least {at_least}'} texts"
    if not isinstance(values, list) or len(values) < at_least or (at_most is not None and len(values) > at_most):
        raise row.fault(f"field {field!r}", values, expected)
    return [
        [assistant(row.as_text(text, f"item {n} of field {field!r}", "a text"))]
        for n, text in enumerate(values, start=1)
    ]


# ---- results -------------------------------------------------------------------------------------------------------


def by_subset(judged: list[Judged]) -> dict[str, list[Judged]]:
    """In order of appearance."""
    groups: dict[str, list[Judged]] = {}
    for each in judged:
        groups.setdefault(each.question.subset, []).append(each)
    return groups


def pair_accuracy(judged: list[Judged]) -> dict[str, Any]:
    """Share of the pairs whose right response has the larger reward; a tie counts as wrong."""
    wins = sum(each.correct[0] > each.incorrect[0] for each in judged)
    ties = sum(each.correct[0] == each.incorrect[0] for each in judged)
    return {"score": wins / len(judged), "questions": len(judged), "ties": ties, "details": {}}


def combine(parts: dict[str, dict[str, Any]], weights: dict[str, float]) -> dict[str, Any]:
    """Weighted mean of the scores of parts, and of the details that all of them have.

    Args:
        weights: of every part that belongs to the whole, whether it is there or not.

    Returns:
        Without a score if a part has none or is not there; `missing` names these.
    """
    missing = [name for name in weights if name not in parts or parts[name]["score"] is None]
    found = [] if missing else [parts[name] for name in weights]
    shared = [key for key in (found[0]["details"] if found else ()) if all(key in part["details"] for part in found)]

    def mean(values: Iterable[float]) -> float:
        return sum(weight * value for weight, value in zip(weights.values(), values)) / sum(weights.values())

    return {
        "score": mean(part["score"] for part in found) if found else None,
        "questions": sum(part["questions"] for part in parts.values()),
        "ties": sum(part["ties"] for part in parts.values()),
        "details": {key: mean(part["details"][key] for part in found) for key in shared},
        "missing": missing,
    }


def result_of(
    subsets: dict[str, dict[str, Any]], categories: dict[str, dict[str, float]], weights: dict[str, float] | None = None
) -> dict[str, Any]:
    """The scores of subsets -> a result without `benchmark` and `title`.

    Args:
        categories: category -> the weights of its subsets, whether these were read or not.
        weights: of the categories; None: their questions.
    """
    found = {}
    for name, of_subsets in categories.items():
        own = {subset: subsets[subset] for subset in of_subsets if subset in subsets}
        found[name] = combine(own, of_subsets) | {"subsets": own}
    weights = weights or {name: part["questions"] for name, part in found.items()}
    return combine(found, weights) | {"categories": found}
