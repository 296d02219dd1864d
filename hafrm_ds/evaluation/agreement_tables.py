"""How far rewards agree (`evaluation.agreement`) in words and as tables, for the terminal and its page."""

from typing import Any

from rich.console import Group, RenderableType

from hafrm_ds.data.tables import MINUS, NOTHING, Cell, Table, as_text, count, number, share_estimate
from hafrm_ds.evaluation.comparison_tables import points


def heading(results: dict[str, Any]) -> str:
    left_out = results["pairs_not_scored"]["left_out"]
    rest = f"; {left_out:,} left out, which a reward could not score" if left_out else ""
    return f"{results['pairs']:,} pairs of {results['prompts']:,} prompts{rest}"


def rule_in_words(results: dict[str, Any]) -> str:
    rule = results["rule"]
    threshold = f", threshold {rule['threshold']:g}" if rule["mode"] == "hierarchical" else ""
    return f"{rule['mode']}{threshold}, weight {rule['weight']:g} of {results['holistic']}"


def render_agreement(results: dict[str, Any]) -> RenderableType:
    """The tables one after another."""
    rule = as_text(f"compositions: {rule_in_words(results)}")
    return Group(as_text(heading(results)), *agreement_tables(results), rule)


def agreement_tables(results: dict[str, Any]) -> list[Table]:
    """Rewards; each two of them; these by length difference; aspects; compositions, where they are known."""
    tables = [rewards_table(results), between_table(results), length_table(results), aspects_table(results)]
    return tables + [compositions_table(results)] * (results["compositions"] is not None)


def rewards_table(results: dict[str, Any]) -> Table:
    rows = [
        (name, [number(each["mean"]), number(each["deviation"]), share_estimate(each["accuracy"]), count(each["ties"])])
        for name, each in results["rewards"].items()
    ]
    return Table(rows, ("Reward", "mean", "deviation", "accuracy [95%]", "ties"))


def between_table(results: dict[str, Any]) -> Table:
    rows = [
        (name_of(each), [share_estimate(each["inconsistency"]), number(each["spearman"])])
        for each in results["between"]
    ]
    return Table(rows, ("Two rewards", "prefer different answers [95%]", "Spearman"))


def length_table(results: dict[str, Any]) -> Table:
    """Share of pairs in which two rewards prefer different answers, by characters of chosen less those of rejected."""
    bins = results["between"][0]["by_length_difference"]
    rows = [
        (name_of(each), [share_estimate(part["inconsistency"]) for part in each["by_length_difference"]])
        for each in results["between"]
    ]
    header = [f"{bin_label(each)} ({each['pairs']:,})" for each in bins]
    return Table(rows, ("Differ where chosen is longer by (pairs)", *header))


def aspects_table(results: dict[str, Any]) -> Table:
    rows = [
        (
            name,
            [
                share_estimate(each["inconsistency"]),
                Cell(NOTHING if each["gain"] is None else points(each["gain"])),
                Cell(each["by_rule"]),
                Cell(each["by_accuracy"]),
            ],
        )
        for name, each in results["aspects"].items()
    ]
    header = (f"Aspect beside {results['holistic']}", "inconsistent [95%]", "gain, points", "ALaRM's rule", "accuracy")
    return Table(rows, header, texts=2)


def compositions_table(results: dict[str, Any]) -> Table:
    rows = [(name, [share_estimate(each)]) for name, each in results["compositions"].items()]
    return Table(rows, ("Composition", "held-out accuracy [95%]"))


def name_of(two: dict[str, Any]) -> str:
    return " / ".join(two["rewards"])


def bin_label(each: dict[str, Any]) -> str:
    low, high = ("" if each[end] is None else f"{each[end]:+d}".replace("-", MINUS) for end in ("low", "high"))
    if not low:
        return f"{high} or less"
    if not high:
        return f"{low} or more"
    return "0" if each["low"] == each["high"] == 0 else f"{low} to {high}"
