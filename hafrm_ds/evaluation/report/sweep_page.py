"""What stands on the page of a sweep: gains over the Baseline of the same cell, by the numbers that were varied."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hafrm_ds.data.tables import Estimate
from hafrm_ds.evaluation.figures import JUDGES
from hafrm_ds.evaluation.report.charts import Gains, gains_chart
from hafrm_ds.evaluation.report.drawing import Chart

NONE: Estimate = {"value": 0.0, "low": 0.0, "high": 0.0}
"""The gain of Baseline over itself."""
AT_THE_ENDS = {"objective.policy_share": {"baseline": 0.0, "dpo": 1.0}, "objective.alpha": {"baseline": 0.0}}
"""Options whose ends are other methods: where these stand on their axis."""
KINDS = {"baseline": "Baseline", "dpo": "DPO", "haf": "HaF"}

Labels = Mapping[str, str]
"""Name of a swept option -> label of its value."""


@dataclass(frozen=True)
class Entry:
    """A method in a cell. labels: of the cell and of its own."""

    name: str
    baseline: str
    labels: Labels

    @property
    def kind(self) -> str:
        return self.name.partition("-")[0]


def entries_of(comparison: dict[str, Any]) -> list[Entry]:
    return [
        Entry(name, cell["baseline"], labels)
        for cell in comparison["cells"]
        for name, labels in cell["methods"].items()
    ]


def gain(comparison: dict[str, Any], entry: Entry, judge: str, set_name: str) -> Estimate | None:
    """Gain of a method over the Baseline of its cell by one of its judges; None if it has no such judge. DPO is judged
    by its own."""
    if entry.kind == "baseline":
        return NONE
    method = comparison["methods"][entry.name]
    gains = method["gains"][entry.baseline]
    found = gains.get(judge) if entry.kind == "haf" else gains[method["judge"]]
    return None if found is None else found[set_name]


def gain_charts(comparison: dict[str, Any], columns: list[str]) -> list[tuple[str, list[Chart]]]:
    """Title -> charts, for each judge of HaF and each number that was varied: one for each set, and each combination of
    values of the options that are not in it.

    Args:
        columns: the sets, and the mean of the others.
    """
    entries, found = entries_of(comparison), []
    judges = [
        judge
        for judge in JUDGES
        if judge != "logprob"
        and any(gain(comparison, each, judge, columns[0]) for each in entries if each.kind == "haf")
    ]
    for judge in judges or ["reward"]:
        for axis, facts in comparison["sweep"].items():
            if facts["numbers"] is None or len(facts["numbers"]) < 2:
                continue
            panels = panels_over(comparison, entries, axis)
            charts = [
                gains_chart(" · ".join(filter(None, (column, panel))), axis, curves)
                for panel, lines in panels.items()
                for column in columns
                if (curves := curves_of(comparison, lines, judge, column))
            ]
            if charts:
                found.append((f"{JUDGES[judge].capitalize()}: gain over Baseline by {axis}", charts))
    return found


Lines = dict[str, list[tuple[float, Entry]]]
"""Label of a line -> its points: the number and the method there."""


def panels_over(comparison: dict[str, Any], entries: list[Entry], axis: str) -> dict[str, Lines]:
    """Title of a panel -> its lines over an axis."""
    facts = comparison["sweep"][axis]
    numbers = dict(zip(facts["labels"], facts["numbers"], strict=True))
    is_of_cells = axis in comparison["cells"][0]["labels"]
    kinds = {entry.kind for entry in entries if axis in entry.labels} - {"baseline"}
    panels: dict[str, Lines] = {}

    def all_lines() -> list[list[tuple[float, Entry]]]:
        return [line for lines in panels.values() for line in lines.values()]

    for entry in entries:
        if axis not in entry.labels or entry.kind == "baseline":
            continue
        rest = {name: label for name, label in entry.labels.items() if name != axis}
        label, panel = line_and_panel(comparison, rest, is_of_cells)
        if is_of_cells or not label or len(kinds) > 1:
            label = " ".join(filter(None, (KINDS[entry.kind], label)))
        panels.setdefault(panel, {}).setdefault(label, []).append((numbers[entry.labels[axis]], entry))
    if not is_of_cells:
        # Baseline and DPO do not feel the axis, or not all others that HaF feels: they end each line that they fit.
        ends = AT_THE_ENDS.get(facts["option"], {})
        for entry in (entry for entry in entries if entry.kind in ends):
            for line in all_lines():
                if entry.labels.items() <= line[0][1].labels.items():
                    line.append((ends[entry.kind], entry))
    for line in all_lines():
        line.sort(key=lambda point: point[0])
    return panels


def line_and_panel(comparison: dict[str, Any], rest: dict[str, str], is_of_cells: bool) -> tuple[str, str]:
    """What a line is called beside its kind, and the panel it stands in. Over a number of the cells the lines are
    methods, over one of methods they are cells: by the amount of data where that was varied, else by the first
    option."""
    of_cell = comparison["cells"][0]["labels"]
    if is_of_cells:
        own = {name: label for name, label in rest.items() if name not in of_cell}
        return in_words(own), in_words({name: rest[name] for name in rest if name not in own})
    first = [name for name in rest if comparison["sweep"][name]["option"].startswith("data.")] or list(rest)
    own = {name: rest[name] for name in first[:1]}
    panel = {name: label for name, label in rest.items() if name not in own}
    return in_words(own), in_words(panel)


def in_words(labels: Labels) -> str:
    return ", ".join(f"{name} {label}" for name, label in labels.items())


def curves_of(comparison: dict[str, Any], lines: Lines, judge: str, column: str) -> list[Gains]:
    curves = []
    for series, (label, line) in enumerate(lines.items()):
        known = [(number, gain(comparison, entry, judge, column)) for number, entry in line]
        values = [(number, each) for number, each in known if each is not None]
        if any(each is not NONE for _, each in values):
            curves.append(Gains(label, series, values))
    return curves
