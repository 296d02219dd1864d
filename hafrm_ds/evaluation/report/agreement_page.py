"""What stands on the page of rewards that are compared with one another (launch/agreement.py)."""

from typing import Any

from hafrm_ds.evaluation.agreement_tables import agreement_tables, heading, name_of, rule_in_words
from hafrm_ds.evaluation.report.charts import intervals_chart


def agreement_page(results: dict[str, Any]) -> dict[str, Any]:
    """The parts of agreement.html, in their order.

    Args:
        results: as agreement.json has it.
    """
    accuracies = {name: each["accuracy"] for name, each in results["rewards"].items()}
    charts = [chart("Accuracy of each reward", accuracies)]
    charts.append(
        chart(
            "Two rewards prefer different answers",
            {name_of(each): each["inconsistency"] for each in results["between"]},
            "share of the pairs",
        )
    )
    if results["compositions"] is not None:
        charts.append(chart("Held-out accuracy of compositions", results["compositions"]))
    return {
        "title": f"{len(results['rewards'])} rewards on shared pairs",
        "subtitle": heading(results),
        "tables": agreement_tables(results),
        "charts": charts,
        "rule": rule_in_words(results),
    }


def chart(title: str, estimates: dict[str, Any], unit: str = "accuracy") -> Any:
    """Shares with their intervals, each below its own name."""
    groups = {name: {name: each} for name, each in estimates.items()}
    return intervals_chart(title, groups, dict.fromkeys(estimates, 0), legend=False, unit=unit)
