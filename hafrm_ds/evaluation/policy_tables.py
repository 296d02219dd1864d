"""Policies under gold (`evaluation.policy_comparison`) in words and as a table, for the terminal and its page."""

from typing import Any

from rich.console import Group, RenderableType

from hafrm_ds.data.tables import NOTHING, Cell, Table, as_text, number_estimate, share, share_estimate

POLICIES_FILE = "policies.json"


def heading(results: dict[str, Any]) -> str:
    seeds = f", {results['seeds']} seeds" if results["seeds"] > 1 else ""
    return f"{results['prompts']:,} prompts{seeds}; gold by {results['gold']}"


def render_policies(results: dict[str, Any]) -> RenderableType:
    """The table with its heading."""
    return Group(as_text(heading(results)), policies_table(results))


def policies_table(results: dict[str, Any]) -> Table:
    first = next(iter(results["measures"]))
    rows = [
        (
            name,
            [
                Cell(NOTHING) if each["win_rate"] is None else share_estimate(each["win_rate"]),
                *(number_estimate(each[measure]) for measure in ("gold", "kl", "words")),
                share(each["distinct"]),
                share(each["truncated"]),
            ],
        )
        for name, each in results["measures"].items()
    ]
    header = (f"wins against {first} [95%]", "gold [95%]", "KL to the start, nats [95%]", "words [95%]")
    return Table(rows, ("Policy", *header, "distinct answers", "truncated"))
