"""What stands on the page of a comparison of methods over seeds (launch/compare.py), above its runs side by side."""

from typing import Any

from hafrm_ds.evaluation.comparison_tables import (
    accuracy_table,
    differences_table,
    gain_table,
    seeds_in_words,
    shown_columns,
)
from hafrm_ds.evaluation.report.charts import intervals_chart
from hafrm_ds.evaluation.report.comparison_page import comparison_page
from hafrm_ds.evaluation.report.reading import Results
from hafrm_ds.evaluation.report.sweep_page import gain_charts


def methods_page(comparison: dict[str, Any], results: list[Results]) -> dict[str, Any]:
    """The parts of methods.html, in their order.

    Args:
        comparison: as comparison.json has it.
        results: of the runs, with names that tell them apart; none of a sweep.
    """
    columns = shown_columns(comparison)
    methods, differences = comparison["methods"], comparison["differences"]
    head = {
        "title": f"{len(methods)} methods, {seeds_in_words(comparison)}",
        "heading": f"In distribution: {columns[0]}. Out of distribution: {', '.join(columns[1:]) or 'not measured'}",
    }
    if "sweep" in comparison:
        swept = comparison["sweep"].items()
        return head | {
            "subtitle": " · ".join(f"{name}: {', '.join(facts['labels'])}" for name, facts in swept),
            "sections": gain_charts(comparison, columns),
            "tables": [gain_table(comparison, columns, caption="Gain over Baseline in points, and accuracy")],
        }
    accuracies = {name: {method: each["accuracy"][name] for method, each in methods.items()} for name in columns}
    paired = {name: {pair: each[name] for pair, each in differences.items()} for name in columns}
    return head | {
        "subtitle": " · ".join(methods),
        "tables": [
            accuracy_table(methods, columns, caption="Accuracy"),
            differences_table(differences, columns, caption="Differences in points, and those of each seed"),
        ],
        "charts": [
            intervals_chart("Accuracy", accuracies, {method: place for place, method in enumerate(methods)}),
            intervals_chart(
                "Paired differences",
                paired,
                {pair: place for place, pair in enumerate(differences)},
                are_differences=True,
            ),
        ],
        "runs": comparison_page(results),
    }
