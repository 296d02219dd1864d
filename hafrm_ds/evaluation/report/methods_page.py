"""What stands on the page of a comparison of methods over seeds (launch/compare.py), above its runs side by side."""

from dataclasses import dataclass, fields
from typing import Any

from hafrm_ds.evaluation.comparison import OTHERS, points
from hafrm_ds.evaluation.report.charts import Chart, Interval, intervals_chart
from hafrm_ds.evaluation.report.comparison_page import ComparisonPage, comparison_page
from hafrm_ds.evaluation.report.reading import Results
from hafrm_ds.evaluation.report.tables import Cell, Table, share_estimate
from hafrm_ds.evaluation.tables import JUDGES

METHODS_NOTE = (
    "A method is judged by its reward head, or by its implicit reward where it has none. Intervals are 95%, by a "
    "bootstrap over prompts and seeds; few seeds make them too narrow, so the differences of each seed stand below. "
    "Differences are paired, pair by pair and seed by seed."
)


@dataclass(kw_only=True)
class MethodsPage(ComparisonPage):
    """A comparison page with the methods in front. heading: of them."""

    heading: str
    methods: list[Table]
    method_charts: list[Chart]
    methods_note: str = METHODS_NOTE


def methods_page(comparison: dict[str, Any], results: list[Results]) -> MethodsPage:
    """Args: comparison: as comparison.json has it. results: of the runs, with names that tell them apart."""
    runs = comparison_page(results)
    columns = [*comparison["sets"], *([OTHERS] if len(comparison["sets"]) > 2 else [])]
    methods, differences = comparison["methods"], comparison["differences"]
    seeds = "1 seed" if len(comparison["seeds"]) == 1 else f"{len(comparison['seeds'])} seeds"
    own = {field.name: getattr(runs, field.name) for field in fields(runs)}
    return MethodsPage(
        **own | {"title": f"{len(methods)} methods, {seeds}", "subtitle": " · ".join(methods)},
        heading=f"In distribution: {columns[0]}. Out of distribution: {', '.join(columns[1:]) or 'not measured'}",
        methods=[accuracy_table(methods, columns), differences_table(differences, columns)],
        method_charts=[
            intervals_chart(
                "Accuracy",
                {
                    name: {method: as_interval(each["accuracy"][name]) for method, each in methods.items()}
                    for name in columns
                },
                {method: place for place, method in enumerate(methods)},
            ),
            intervals_chart(
                "Paired differences",
                {name: {pair: as_interval(each[name]) for pair, each in differences.items()} for name in columns},
                {pair: place for place, pair in enumerate(differences)},
                neutral=0.0,
                unit="difference in accuracy",
            ),
        ],
    )


def as_interval(value: dict[str, Any]) -> Interval:
    return Interval(value["value"], value["low"], value["high"])


def accuracy_table(methods: dict[str, Any], columns: list[str]) -> Table:
    """A row for each method and judge, its own judge first."""
    rows = []
    for name, method in methods.items():
        judged = {method["judge"]: method["accuracy"], **method["other_judges"]}
        rows += [
            (f"{name}, {JUDGES[judge]}", [share_estimate(values[column]) for column in columns])
            for judge, values in judged.items()
        ]
    return Table(rows, ("", *columns), caption="Accuracy")


def differences_table(differences: dict[str, Any], columns: list[str]) -> Table:
    rows = [
        (name, [Cell(points(values[column]), by_seed(values[column])) for column in columns])
        for name, values in differences.items()
    ]
    return Table(rows, ("", *columns), caption="Differences in points, and those of each seed")


def by_seed(value: dict[str, Any]) -> str:
    return " · ".join(f"{100 * each:+.1f}" for each in value["by_seed"])
