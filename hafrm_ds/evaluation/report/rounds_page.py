"""What stands on the page of rounds (launch/rounds.py)."""

from typing import Any

from hafrm_ds.data.tables import Estimate
from hafrm_ds.evaluation.report.charts import Measured, measures_chart
from hafrm_ds.evaluation.report.drawing import Chart
from hafrm_ds.evaluation.round_tables import JUDGES, heading, judged, rounds_tables


def rounds_page(results: dict[str, Any]) -> dict[str, Any]:
    """The parts of rounds.html, in their order.

    Args:
        results: as rounds.json has it.
    """
    rounds = results["rounds"]
    measures = {"reward": "Reward"} | ({"gold": "Gold"} if results["gold"] else {})
    measures |= {"kl": "KL to the start, nats", "words": "Words of an answer"}
    charts = [chart(title, {title: [(row["round"], row[name]) for row in rounds]}) for name, title in measures.items()]
    charts.append(chart("Distinct answers", {"share": [(row["round"], alone(row["distinct"])) for row in rounds]}))
    for name in results["sets"]:
        known = {
            judge: [(row["round"], alone(value)) for row in rounds if (value := judged(row, name, judge)) is not None]
            for judge in JUDGES
        }
        charts.append(chart(f"Accuracy on {name}", {judge: points for judge, points in known.items() if points}))
    return {
        "title": f"{len(rounds) - 1} rounds",
        "subtitle": heading(results),
        "tables": rounds_tables(results),
        "charts": [each for each in charts if each is not None],
    }


def alone(value: float) -> Estimate:
    """A number without an interval."""
    return {"value": value, "low": None, "high": None}


def chart(title: str, curves: dict[str, list[tuple[int, Estimate]]]) -> Chart | None:
    """Measures over the rounds; None where nothing is known."""
    measured = [Measured(label, place, points) for place, (label, points) in enumerate(curves.items()) if points]
    return measures_chart(title, "round", measured) if measured else None
