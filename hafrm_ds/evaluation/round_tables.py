"""What rounds have made of a policy (`training.rounds`), as tables for the terminal and its page."""

from typing import Any

from rich.console import Group, RenderableType

from hafrm_ds.data.tables import Cell, Table, as_text, count, number_estimate, share

ROUNDS_FILE = "rounds.json"
JUDGES = ("reward", "implicit", "combined")


def heading(results: dict[str, Any]) -> str:
    gold = f"; gold by {results['gold']}" if results["gold"] else ""
    return f"ranked by {results['ranked_by']}{gold}"


def render_rounds(results: dict[str, Any]) -> RenderableType:
    """The tables one after another."""
    return Group(as_text(heading(results)), *rounds_tables(results))


def rounds_tables(results: dict[str, Any]) -> list[Table]:
    """The policy by round, and the accuracy of its judges on pairs that no round has trained on."""
    return [policy_table(results), candidates_table(results), accuracy_table(results), stages_table(results)]


def name_of(each: dict[str, Any]) -> str:
    return f"round {each['round']}" if each["round"] else "start"


def policy_table(results: dict[str, Any]) -> Table:
    rows = [
        (
            name_of(each),
            [
                number_estimate(each["reward"]),
                *([number_estimate(each["gold"])] if results["gold"] else []),
                number_estimate(each["kl"]),
                number_estimate(each["words"]),
                share(each["distinct"]),
                share(each["truncated"]),
            ],
        )
        for each in results["rounds"]
    ]
    gold = ["gold [95%]"] if results["gold"] else []
    header = ("Policy", "reward [95%]", *gold, "KL to the start, nats [95%]", "words [95%]")
    return Table(rows, (*header, "distinct", "truncated"))


def candidates_table(results: dict[str, Any]) -> Table:
    """Show how the candidates of each round scored, and how many pairs of them were trained on."""
    rows = [
        (
            name_of(each),
            [
                count(each["ranked_prompts"]),
                Cell(f"{each['trained_pairs']:,} of {each['pairs']:,}"),
                share(each["truncated_candidates"]),
                Cell(f"{each['candidates']:.3g}"),
                Cell(f"{each['best_candidates']:.3g}"),
            ],
        )
        for each in results["rounds"]
        if each["round"]
    ]
    return Table(
        rows,
        ("Trained on", "ranked prompts", "pairs trained on", "truncated candidates", "their mean score", "of the best"),
    )


def accuracy_table(results: dict[str, Any]) -> Table:
    columns = [(name, judge) for name in results["sets"] for judge in JUDGES]
    known = [each for each in columns if any(judged(row, *each) is not None for row in results["rounds"])]
    rows = [(name_of(row), [share(judged(row, *each)) for each in known]) for row in results["rounds"]]
    return Table(rows, ("Accuracy", *(f"{name}: {judge}" for name, judge in known)))


def judged(row: dict[str, Any], name: str, judge: str) -> float | None:
    return row["accuracy"].get(name, {}).get(judge)


def stages_table(results: dict[str, Any]) -> Table:
    stages = list(dict.fromkeys(stage for row in results["rounds"] for stage in row["seconds"]))
    rows = [(name_of(row), [count(row["seconds"].get(stage)) for stage in stages]) for row in results["rounds"]]
    return Table(rows, ("Seconds", *stages))
