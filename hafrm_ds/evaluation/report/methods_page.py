"""What stands on the page of a comparison of methods over seeds (launch/compare.py), above its runs side by side."""

from typing import Any

from hafrm_ds.evaluation.comparison import accuracy_table, differences_table, seeds_in_words, shown_columns
from hafrm_ds.evaluation.report.charts import intervals_chart
from hafrm_ds.evaluation.report.comparison_page import comparison_page
from hafrm_ds.evaluation.report.reading import Results


def methods_page(comparison: dict[str, Any], results: list[Results]) -> dict[str, Any]:
    """The parts of methods.html, in their order.

    Args:
        comparison: as comparison.json has it.
        results: of the runs, with names that tell them apart.
    """
    columns = shown_columns(comparison)
    methods, differences = comparison["methods"], comparison["differences"]
    accuracies = {name: {method: each["accuracy"][name] for method, each in methods.items()} for name in columns}
    paired = {name: {pair: each[name] for pair, each in differences.items()} for name in columns}
    return {
        "title": f"{len(methods)} methods, {seeds_in_words(comparison)}",
        "subtitle": " · ".join(methods),
        "heading": f"In distribution: {columns[0]}. Out of distribution: {', '.join(columns[1:]) or 'not measured'}",
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
        "runs": comparison_page(results) if results else None,
    }
