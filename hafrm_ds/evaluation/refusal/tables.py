"""What models refuse (`evaluation.refusal.job`) in words and as tables, for the terminal and its page."""

from typing import Any

from rich.console import Group, RenderableType

from hafrm_ds.data.tables import (
    NOTHING,
    Cell,
    Estimate,
    Table,
    as_text,
    count,
    estimate_cell,
    share_estimate,
)
from hafrm_ds.evaluation.refusal.measures import DISCRIMINATION, SHIFT, WRONG
from hafrm_ds.evaluation.refusal.probes import OPENINGS, QUESTION, REWARD
from hafrm_ds.evaluation.refusal.prompts import BENIGN, HARMFUL

TITLES = {
    OPENINGS: "Policy: openings of refusals against openings of compliances",
    QUESTION: "Policy: asked whether it refuses",
    REWARD: "Reward head: answers that refuse against answers that comply",
}


def heading(results: dict[str, Any]) -> str:
    prompts = results["prompts"]
    repeated = f"; {prompts['repeated']:,} stood there twice" if prompts["repeated"] else ""
    return numbers(prompts[HARMFUL], prompts[BENIGN]) + repeated


def numbers(num_harmful: int, num_benign: int) -> str:
    return f"{num_harmful:,} harmful and {num_benign:,} benign prompts"


def title_of(probe: str, found: dict[str, Any]) -> str:
    """Name a probe and the number of its prompts: the reward head is asked only those that have answers."""
    asked = (each["prompts"] if each else 0 for each in (found["arms"][found["first"]][p] for p in (HARMFUL, BENIGN)))
    return f"{TITLES[probe]} ({numbers(*asked)})"


def about_rewrites(results: dict[str, Any]) -> str:
    """Count the rewritten prompts that are truncated or empty, in a sentence; "" where nothing was rewritten."""
    rewrites = results.get("rewrites", {})
    said = [f"{model} {each['truncated']:,} and {each['empty']:,}" for model, each in rewrites.items()]
    if not said:
        return ""
    what = "Rewritten prompts that were truncated at --max_new_tokens, and empty ones, which were asked as they are"
    return f"{what}: {'; '.join(said)}."


def render_refusals(results: dict[str, Any]) -> RenderableType:
    """The tables one after another."""
    about = about_rewrites(results)
    return Group(as_text(heading(results)), *refusal_tables(results), *[as_text(about)] * bool(about))


def refusal_tables(results: dict[str, Any]) -> list[Table]:
    """Of each probe what the arms refuse and what moved it, and the probe beside generated answers."""
    tables = []
    for probe, found in results["probes"].items():
        tables += [probe_table(title_of(probe, found), found)] + (changes_tables(found) if found["changes"] else [])
    return tables + [generated_table(results["generated"])] * bool(results["generated"])


def probe_table(title: str, found: dict[str, Any]) -> Table:
    """Mean probabilities of refusing, how well they tell harmful from benign prompts, and how much of what a policy
    would write the probe has asked about."""
    is_policy = found["arms"][found["first"]]["covered"] is not None
    rows = [
        (
            name,
            [
                *(share_estimate(each[part] and each[part]["probability"]) for part in (HARMFUL, BENIGN)),
                estimate_cell(each["auroc"], "{:.3f}".format, "{:.2f}".format),
                share_estimate(each["missed"]),
                share_estimate(each["over_refusal"]),
                *[share_estimate(each["covered"])] * is_policy,
            ],
        )
        for name, each in found["arms"].items()
    ]
    header = ("Mean probability", f"{HARMFUL} [95%]", f"{BENIGN} [95%]", "AUROC", "missed", "over-refusal")
    return Table(rows, header + ("covered",) * is_policy, caption=title)


def changes_tables(found: dict[str, Any]) -> list[Table]:
    """How each arm differs from the first: in points of the probability, as logits with what it is called, and in how
    well it tells harmful from benign prompts."""
    parts = (HARMFUL, BENIGN, SHIFT, DISCRIMINATION)
    points, logits, telling = [], [], []
    for name, each in found["changes"].items():
        points.append((name, [points_cell(each["probability"][part]) for part in parts]))
        called = [Cell(each["mechanism"] or NOTHING), Cell(each.get("combination", NOTHING))]
        logits.append((name, [*(logit_cell(each["logit"][part]) for part in parts), *called]))
        auroc = estimate_cell(each["auroc"], "{:+.3f}".format, "{:+.2f}".format)
        telling.append((name, [auroc, *(points_cell(each[wrong]) for wrong in WRONG.values())]))
    against = f"against {found['first']} [95%]"
    return [
        Table(points, (f"Points, {against}", *parts)),
        Table(logits, (f"Logits, {against}", *parts, "mechanism", "combination"), texts=2),
        Table(telling, (f"Changes {against}", "AUROC", "missed", "over-refusal")),
    ]


def points_cell(value: Estimate | None) -> Cell:
    """A change of a probability, in percentage points."""
    return estimate_cell(value, lambda each: f"{100 * each:+.1f}", lambda each: f"{100 * each:+.0f}")


def logit_cell(value: Estimate | None) -> Cell:
    """A change of a logit."""
    return estimate_cell(value, "{:+.2f}".format, "{:+.2f}".format)


def generated_table(generated: dict[str, Any]) -> Table:
    """The probe of the openings beside answers that were generated."""
    rows = []
    for name, verdicts in generated.items():
        for by, each in verdicts.items():
            refused, total = each["refused"], each["prompts"]
            cells = [
                count(total),
                count(refused["both"] + refused["probe"]),
                count(refused["both"] + refused["answers"]),
            ]
            cells += [
                share_estimate(each["agreement"]),
                estimate_cell(each["kappa"], "{:.2f}".format, "{:.2f}".format),
            ]
            rows.append((name if len(verdicts) == 1 else f"{name}, by {by}", cells))
    return Table(
        rows, ("Generated answers", "prompts", "refused by the probe", "by the answer", "agree [95%]", "kappa [95%]")
    )


def categories_table(found: dict[str, Any]) -> Table | None:
    """Mean probability of refusing in each category, for each arm; None without categories."""
    arms = found["arms"]
    first = next(iter(arms.values()))["categories"]
    if not first:
        return None
    rows = [
        (
            f"{each['category'] or 'without a category'} ({each['label']}, {each['prompts']:,})",
            [share_estimate(arm["categories"][place]["probability"]) for arm in arms.values()],
        )
        for place, each in enumerate(first)
    ]
    return Table(rows, ("Category", *arms))
