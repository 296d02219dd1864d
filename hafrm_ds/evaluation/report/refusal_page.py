"""What stands on the page of refusals (launch/refusals.py)."""

from typing import Any

from hafrm_ds.evaluation.refusal.prompts import BENIGN, HARMFUL
from hafrm_ds.evaluation.refusal.tables import (
    about_rewrites,
    categories_table,
    changes_tables,
    generated_table,
    heading,
    probe_table,
    title_of,
)
from hafrm_ds.evaluation.report.charts import distributions_chart, moves_chart


def refusal_page(results: dict[str, Any]) -> dict[str, Any]:
    """The parts of refusals.html, in their order.

    Args:
        results: as refusals.json has it.
    """
    return {
        "title": "What is refused",
        "subtitle": heading(results),
        "probes": [probe_section(title_of(probe, found), found) for probe, found in results["probes"].items()],
        "generated": generated_table(results["generated"]) if results["generated"] else None,
        "rewrites": about_rewrites(results),
        "wording": results["wording"],
    }


def probe_section(title: str, found: dict[str, Any]) -> dict[str, Any]:
    """Tables and charts of one probe."""
    distributions = {
        name: {part: each[part]["logit_quantiles"] for part in (HARMFUL, BENIGN) if each[part]}
        for name, each in found["arms"].items()
    }
    charts = [distributions_chart("Logits of refusing", distributions, (HARMFUL, BENIGN))]
    moves = {name: each["logit"] for name, each in found["changes"].items() if each["mechanism"]}
    if moves:
        charts.append(moves_chart(f"Against {found['first']}", moves))
    return {
        "title": title,
        "arms": probe_table("", found),
        "changes": changes_tables(found) if found["changes"] else [],
        "categories": categories_table(found),
        "charts": charts,
    }
