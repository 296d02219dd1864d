"""Tables of a report, and how numbers are written in them."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from hafrm_ds.data.report import PERCENTILES, DataReport
from hafrm_ds.evaluation.bootstrap import EstimateJson
from hafrm_ds.evaluation.report.charts import short

NOTHING = "-"


@dataclass(frozen=True)
class Cell:
    """What stands in a cell, and smaller below it. words: a text that may take several lines."""

    text: str
    detail: str = ""
    words: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of a name and cells. words: texts instead of numbers."""

    rows: list[tuple[str, list[Cell]]]
    header: tuple[str, ...] = ()
    caption: str = ""
    words: bool = False


@dataclass(frozen=True)
class Folded:
    """A table that is shown when it is asked for."""

    caption: str
    inside: Table


# ---- numbers --------------------------------------------------------------------------------------------------------


def count(number: float | None) -> Cell:
    return Cell(NOTHING if number is None else f"{number:,.0f}")


def share(value: float | None) -> Cell:
    return Cell(NOTHING if value is None else f"{value:.1%}")


def number(value: float | None) -> Cell:
    return Cell(NOTHING if value is None else short(value))


def share_estimate(estimate: EstimateJson | None) -> Cell:
    """A share with its interval, where that is known."""
    return estimate_cell(estimate, "{:.1%}".format)


def number_estimate(estimate: EstimateJson | None) -> Cell:
    return estimate_cell(estimate, short)


def estimate_cell(estimate: EstimateJson | None, form: Callable[[float], str]) -> Cell:
    if estimate is None:
        return Cell(NOTHING)
    low, high = estimate.get("low"), estimate.get("high")
    interval = "" if low is None or high is None else f"{form(low)} to {form(high)}"
    return Cell(form(estimate["value"]), interval)


def value_of_option(value: Any) -> Cell:
    """As it would be written in a recipe."""
    return Cell(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


# ---- tables of more than one page -----------------------------------------------------------------------------------


def facts_table(facts: Iterable[tuple[str, Any]]) -> Table:
    """Names and whatever stands behind them."""
    return Table([(name, [value_of_option(value)]) for name, value in facts], words=True)


def data_tables(report: DataReport) -> list[Table]:
    """Counts by source, why pairs are not used, and token lengths of one set."""
    sources = [*report.by_source.items(), *([("total", report.total)] if len(report.by_source) > 1 else [])]
    rows = [
        (
            name,
            [
                count(counts.read),
                count(sum(counts.deselected.values())),
                count(sum(counts.dropped.values())),
                count(counts.kept),
                count(counts.cut),
                Cell(", ".join(counts.formats)),
            ],
        )
        for name, counts in sources
    ]
    tables = [Table(rows, ("source", "read", "deselected", "dropped", "kept", "of these cut", "format"))]
    reasons = [(f"deselected: {reason}", [count(pairs), Cell("")]) for reason, pairs in report.total.deselected.items()]
    reasons += [
        (f"dropped: {reason}", [count(pairs), Cell(report.first_dropped.get(reason, ""))])
        for reason, pairs in report.total.dropped.items()
    ]
    if reasons:
        tables.append(Table(reasons, ("why pairs are not used", "pairs", "first")))
    lengths = [
        (name.replace("_", " "), [count(values.get(percentile)) for percentile in PERCENTILES])
        for name, values in report.tokens.items()
    ]
    return [*tables, Table(lengths, ("tokens", *PERCENTILES))]


def data_in_words(report: DataReport) -> str:
    return (
        f"{report.total.cut:,} pairs cut to {report.max_length:,} tokens ({report.truncation}), "
        f"{report.duplicates:,} exact duplicates, {report.both_orders:,} pairs present in both orders."
    )
