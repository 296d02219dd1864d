"""What stands on the page of a comparison of methods over seeds (launch/compare.py), above its runs side by side."""

from dataclasses import dataclass
from typing import Any

from hafrm_ds.data.tables import Table
from hafrm_ds.evaluation.comparison import accuracy_table, differences_table, seeds_in_words, shown_columns
from hafrm_ds.evaluation.report.charts import Chart, Interval, intervals_chart
from hafrm_ds.evaluation.report.comparison_page import ComparisonPage, comparison_page
from hafrm_ds.evaluation.report.reading import Results

METHODS_NOTE = (
    "A method is judged by its reward head, or by its implicit reward where it has none. Intervals are 95%, by a "
    "bootstrap over prompts and seeds; few seeds make them too narrow, so the differences of each seed stand below. "
    "Differences are paired, pair by pair and seed by seed."
)


@dataclass
class MethodsPage:
    """The parts of methods.html, in their order. runs: all of them side by side."""

    title: str
    subtitle: str
    heading: str
    tables: list[Table]
    charts: list[Chart]
    runs: ComparisonPage
    note: str = METHODS_NOTE


def methods_page(comparison: dict[str, Any], results: list[Results]) -> MethodsPage:
    """Args: comparison: as comparison.json has it. results: of the runs, with names that tell them apart."""
    columns = shown_columns(comparison)
    methods, differences = comparison["methods"], comparison["differences"]
    return MethodsPage(
        title=f"{len(methods)} methods, {seeds_in_words(comparison)}",
        subtitle=" · ".join(methods),
        heading=f"In distribution: {columns[0]}. Out of distribution: {', '.join(columns[1:]) or 'not measured'}",
        tables=[
            accuracy_table(methods, columns, caption="Accuracy"),
            differences_table(differences, columns, caption="Differences in points, and those of each seed"),
        ],
        charts=[
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
                are_differences=True,
            ),
        ],
        runs=comparison_page(results),
    )


def as_interval(value: dict[str, Any]) -> Interval:
    return Interval(value["value"], value["low"], value["high"])
