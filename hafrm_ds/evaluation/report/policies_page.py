"""What stands on the page of policies that are held against one another (launch/compare_policies.py)."""

from typing import Any

from hafrm_ds.evaluation.policy_tables import heading, policies_table
from hafrm_ds.evaluation.report.charts import intervals_chart


def policies_page(results: dict[str, Any]) -> dict[str, Any]:
    """The parts of policies.html, in their order.

    Args:
        results: as policies.json has it.
    """
    first, *others = results["measures"]
    wins = {name: {name: results["measures"][name]["win_rate"]} for name in others}
    return {
        "title": f"{len(results['measures'])} policies",
        "subtitle": heading(results),
        "table": policies_table(results),
        "charts": [
            intervals_chart(
                f"Wins against {first}", wins, dict.fromkeys(others, 0), legend=False, unit="share of the prompts"
            )
        ],
    }
