"""The figures of an evaluation as tables, for the terminal and the pages alike."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Group, RenderableType

from hafrm_ds.data.tables import (
    Cell,
    Table,
    as_text,
    count,
    listed_sources,
    number,
    number_estimate,
    share,
    share_estimate,
)
from hafrm_ds.evaluation.attributes import attribute_table
from hafrm_ds.objective import JudgeFit

JUDGES = {
    "reward": "reward head",
    "implicit": "implicit reward",
    "logprob": "log-prob",
    "combined": "both heads",
}
"""Judge -> what people call it."""
CALIBRATION = (
    ("expected calibration error (ECE)", "ece", share),
    ("Brier score", "brier", number),
    ("log loss", "log_loss", number),
    ("fitted temperature", "temperature", number),
    ("ECE at this temperature", "ece_at_temperature", share),
    ("Brier score at this temperature", "brier_at_temperature", number),
)
"""(label, key of `calibrate`, how it is written)."""
ORDER = (
    ("Kendall's tau-b", "tau_b", number_estimate),
    ("top-1", "top_1", share_estimate),
    ("NDCG", "ndcg", number_estimate),
)
"""(label, key of `GoldOrder.measures`, how it is written)."""


def render_evaluation(results: dict[str, Any]) -> RenderableType:
    """Tables of what evaluation.json holds."""
    sets = results["sets"]
    parts: list[RenderableType] = [sets_table(sets)] if sets else []
    if judge := results.get("judge"):
        parts.append(as_text(fit_in_words(JudgeFit.from_json(judge))))
    for name, analysis in sets.items():
        parts += [as_text(f"\n{name}"), *set_tables(analysis)]
    return Group(*parts, *map(benchmark_table, results["benchmarks"].values()))


def fit_in_words(fit: JudgeFit) -> str:
    """What either head counts in the combined judge: the logits of a margin of typical size, its root mean square."""
    parts = []
    for place, judge in enumerate(("reward", "implicit")):
        value, low, high = (each[place] * fit.deviations[place] for each in (fit.weights, fit.low, fit.high))
        parts.append(f"{value:.2f} [{low:.2f}, {high:.2f}] of the {JUDGES[judge]}")
    return f"both heads as one judge: weight {', '.join(parts)}, fitted on {fit.pairs:,} pairs of {fit.set}"


def unit_of(*analyses: Mapping[str, Any]) -> str:
    """What is judged right or wrong, in one word."""
    return "comparison" if any("ranking" in analysis for analysis in analyses) else "pair"


def sets_table(sets: Mapping[str, Mapping[str, Any]]) -> Table:
    """Accuracies on every set, and the yardstick of always taking the longer answer, where that is known."""
    table = accuracy_table("accuracy", sets, unit_of(*sets.values()))
    longer = [share_estimate(part.get("yardsticks", {}).get("longer")) for part in sets.values()]
    rows = [(name, [*cells, each]) for (name, cells), each in zip(table.rows, longer, strict=True)]
    return Table(rows, (*table.header, "longer"))


def accuracy_table(title: str, parts: Mapping[str, Mapping[str, Any]], unit: str = "pair") -> Table:
    """How many pairs, by the word of `unit_of`, and the accuracy of every judge on parts of the data, each a mapping
    with `pairs` and `accuracy`."""
    judges = [judge for judge in JUDGES if any(judge in part["accuracy"] for part in parts.values())]
    rows = [
        (name, [count(part["pairs"]), *(share_estimate(part["accuracy"].get(judge)) for judge in judges)])
        for name, part in parts.items()
    ]
    return Table(rows, (title, f"{unit}s", *(JUDGES[judge] for judge in judges)))


def set_tables(analysis: dict[str, Any]) -> list[Table]:
    """What `analyse` says about one set: each judge, the order within groups where these have more than two answers,
    accuracies by length difference and by source, where there are several, and the yardsticks."""
    judges = [judge for judge in JUDGES if judge in analysis["accuracy"]]
    calibration, agreement, unit = analysis["calibration"], analysis["agreement"], unit_of(analysis)
    rows = [
        ("accuracy", [share_estimate(analysis["accuracy"][judge]) for judge in judges]),
        ("ties", [count(analysis["ties"][judge]) for judge in judges]),
        ("mean margin", [number_estimate(analysis["margin"][judge]) for judge in judges]),
    ]
    for label, key, form in CALIBRATION:
        rows.append((label, [form(calibration[judge][key]) if judge in calibration else Cell("") for judge in judges]))
    for other in judges[1:]:
        known = [agreement.get(f"{judge}/{other}", agreement.get(f"{other}/{judge}")) for judge in judges]
        rows.append((f"agreement with {JUDGES[other]}", [*map(share, known)]))
    lengths = {length_range(part["low"], part["high"]): part for part in analysis["by_length_difference"]}
    names = [JUDGES[judge] for judge in judges]
    tables = [Table(rows, ("", *names))]
    if ranking := analysis.get("ranking"):
        rows = [(label, [form(ranking[judge][key]) for judge in judges]) for label, key, form in ORDER]
        tables.append(Table(rows, ("order within groups", *names)))
    tables.append(accuracy_table("accuracy, chosen longer by", lengths, unit))
    if heads := analysis.get("heads"):  # older results do not say
        tables.append(accuracy_table("accuracy where reward head and implicit reward", heads, unit))
    if len(analysis["by_source"]) > 1:
        tables.append(accuracy_table("accuracy by source", largest_sources(analysis), unit))
    if attributes := analysis.get("attributes"):
        tables.append(attribute_table(attributes))
    yardsticks = [
        (f"the {kind} answer", [share_estimate(analysis["yardsticks"][kind])]) for kind in ("longer", "shorter")
    ]
    return [*tables, Table(yardsticks, ("whoever always takes", "accuracy"))]


def largest_sources(analysis: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Pairs and accuracies of the sources of a set that are listed, the largest first."""
    sources = dict(sorted(analysis["by_source"].items(), key=lambda item: -item[1]["pairs"]))
    return listed_sources(sources, lambda part: part["pairs"], together)


def together(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracies of several parts of a set as one, without intervals."""
    pairs = [part["pairs"] for part in parts]
    accuracy = {
        judge: {
            "value": float(np.average([part["accuracy"][judge]["value"] for part in parts], weights=pairs)),
            "low": None,
            "high": None,
        }
        for judge in parts[0]["accuracy"]
    }
    return {"pairs": sum(pairs), "accuracy": accuracy}


def length_range(low: int | None, high: int | None) -> str:
    """Bounds of a bin, in tokens, in words."""
    if low is None:
        return f"up to {high:,} tokens"
    if high is None:
        return f"from {low:,} tokens"
    return f"{low:,} tokens" if low == high else f"{low:,} to {high:,} tokens"


def benchmark_table(found: dict[str, Any]) -> Table:
    """Scores of each judge on a benchmark: categories with their subsets and details, then the whole.

    Args:
        found: cut (questions whose prompt was truncated), and judges: judge -> as `Benchmark.summarize` gives it.
    """
    results = {judge: found["judges"][judge] for judge in JUDGES if judge in found["judges"]}
    first = next(iter(results.values()))
    rows = []

    def add(name: str, parts: list[dict[str, Any]], with_details: bool = True) -> None:
        """parts: the same part of each judge's result."""
        ties = [f"{part['ties']:,} ties" if part["ties"] else "" for part in parts]
        scores = [Cell(share(part["score"]).text, each, brief=each and f"({each})") for part, each in zip(parts, ties)]
        rows.append((name, [count(parts[0]["questions"]), *scores]))
        for detail in parts[0]["details"] if with_details else ():
            rows.append((f"{name}, {detail}", [Cell(""), *(share(part["details"].get(detail)) for part in parts)]))

    for name, category in first["categories"].items():
        categories = [result["categories"][name] for result in results.values()]
        add(name, categories)
        for subset in category["subsets"] if len(category["subsets"]) > 1 else ():
            add(f"{name} / {subset}", [each["subsets"][subset] for each in categories], with_details=False)
    add("overall", list(results.values()))
    caption = first["title"]
    if found["cut"]:
        caption += f" ({found['cut']:,} questions with a cut prompt)"
    if found.get("left_out"):  # older results do not say
        caption += f" ({found['left_out']:,} questions left out, the first: {found['why_left_out'][0]})"
    if first["missing"]:
        absent = {name: first["categories"][name] for name in first["missing"]}
        names = [", ".join(part["missing"]) if part["questions"] else name for name, part in absent.items()]
        caption += f": no overall score without all of {', '.join(names)}"
    return Table(rows, ("", "questions", *(JUDGES[judge] for judge in results)), caption=caption)
