"""A comparison of methods (`evaluation.comparison.compare`) in words and as tables, for the terminal and its page."""

from typing import Any

from rich.console import Group, RenderableType

from hafrm_ds.data.tables import Cell, Estimate, Table, share_estimate
from hafrm_ds.evaluation.comparison import JUDGE_NAMES, OTHERS


def shown_columns(results: dict[str, Any]) -> list[str]:
    """The sets, and the mean of the others than the first where these are several."""
    sets = results["sets"]
    return [*sets, OTHERS] if len(sets) > 2 else list(sets)


def seeds_in_words(results: dict[str, Any]) -> str:
    """How many seeds of how many are in the results."""
    number, planned = len(results["seeds"]), len(results["planned_seeds"])
    if number < planned:
        return f"{number} of {planned} seeds"
    return "1 seed" if number == 1 else f"{number} seeds"


def render_comparison(results: dict[str, Any]) -> RenderableType:
    """Methods by sets, then their paired differences in points; of a sweep the gains over Baseline."""
    columns, seeds = shown_columns(results), seeds_in_words(results)
    if "sweep" in results:
        return gain_table(results, columns, f"Gain over Baseline in points [95%], paired, {seeds}")
    accuracy = accuracy_table(results["methods"], columns, f"Accuracy [95%], {seeds}")
    differences = differences_table(results["differences"], columns, f"Difference in points [95%], paired, {seeds}")
    return Group(accuracy, differences)


def accuracy_table(methods: dict[str, Any], columns: list[str], title: str = "", caption: str = "") -> Table:
    """A row for each method and judge, its own judge first."""
    rows = []
    for name, method in methods.items():
        judged = {method["judge"]: method["accuracy"], **method["other_judges"]}
        rows += [
            (f"{name}, {JUDGE_NAMES[judge]}", [share_estimate(values[column]) for column in columns])
            for judge, values in judged.items()
        ]
    return Table(rows, (title, *columns), caption=caption)


def differences_table(differences: dict[str, Any], columns: list[str], title: str = "", caption: str = "") -> Table:
    """Paired differences in points; on a page, those of each seed below them."""
    rows = []
    for name, values in differences.items():
        seeds = [" · ".join(f"{100 * each:+.1f}" for each in values[column]["by_seed"]) for column in columns]
        rows.append((name, [Cell(points(values[column]), each) for column, each in zip(columns, seeds, strict=True)]))
    return Table(rows, (title, *columns), caption=caption)


def gain_table(results: dict[str, Any], columns: list[str], caption: str) -> Table:
    """Of a sweep, a row for each judge of each method in each cell: the gain over the Baseline of the cell and, on a
    page, the accuracy; of Baseline the accuracy."""
    rows = []
    for cell in results["cells"]:
        for name in cell["methods"]:
            method, baseline = results["methods"][name], cell["baseline"]
            gains = method.get("gains", {})
            against = f" (against {baseline})" if len(gains) > 1 else ""
            for judge, accuracy in {method["judge"]: method["accuracy"], **method["other_judges"]}.items():
                if baseline in gains and judge not in gains[baseline]:
                    continue  # two models whose Baseline is that of another cell
                own = [share_estimate(accuracy[column]) for column in columns]
                gained = [
                    Cell(points(gains[baseline][judge][column]), f"{each.text}, {each.detail}")
                    for column, each in zip(columns, own, strict=True)
                    if baseline in gains
                ]
                rows.append((f"{name}, {JUDGE_NAMES[judge]}{against}", gained or own))
    return Table(rows, ("", *columns), caption=caption)


def points(value: Estimate) -> str:
    """A difference of shares in percentage points."""
    low, high = value["low"], value["high"]
    ends = "" if low is None or high is None else f" [{100 * low:+.1f}, {100 * high:+.1f}]"
    return f"{100 * value['value']:+.1f}{ends}"
