"""What may hold the accuracy of a run down, as far as its own figures tell: the findings at the top of its page.

Each points to the part of launch/accuracy.md that says what to do. A finding is a hint with its figures, not a verdict.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from hafrm_ds.config import options_of
from hafrm_ds.data.report import DataReport
from hafrm_ds.data.tables import Estimate
from hafrm_ds.evaluation.combined import NORMAL_QUANTILE
from hafrm_ds.evaluation.figures import unit_of
from hafrm_ds.evaluation.report.reading import Results, known

WIDE_INTERVAL = 0.03
"""Half of a 95% interval from which on differences between good settings, one to three points, cannot be seen."""
FEWEST_REPEATS = 20
"""Repeated pairs from which the noise of the labels is estimated."""
NOTABLE_NOISE = 0.03
LARGE_GAP = 0.1
FEW_STEPS = 100
LEAST_FALL = 0.02
"""Of the reward loss, in nats, from the first fifth of a run to the last; at chance the loss is log 2 = 0.693."""
NEARLY_ALL = 0.9
SMALL_SHARE, LARGE_SHARE = 0.1, 0.9
OVERCONFIDENT = 2.0
NOTABLE_SHARE = 0.02
"""Of the pairs of a set, from which on their fate is worth a word."""


class Finding(NamedTuple):
    """section: of launch/accuracy.md. text: what was seen, with its figures."""

    section: str
    text: str


def findings(results: Results) -> list[Finding]:
    """All that is worth a look, in the order in which it is best looked at."""
    name, first = next(iter(results.sets.items()), ("", None))
    found: list[Finding] = []
    for report_name, report in results.data.items():
        found += of_data(report_name, report)
    if first is not None and first.analysis is not None:
        found += of_accuracy(name, first.analysis)
    if results.is_run:
        found += of_training(results)
    return found


def of_data(name: str, report: DataReport) -> Iterator[Finding]:
    """Noise of the labels, truncation, dropped pairs, templates."""
    repeats = report.both_orders + report.duplicates
    noise = label_noise(report.both_orders, repeats)
    if repeats >= FEWEST_REPEATS and noise >= NOTABLE_NOISE:
        yield Finding(
            "The best reachable accuracy",
            f"{name}: of {repeats:,} repeated pairs {report.both_orders:,} stand there in both orders. If the labels "
            f"were given independently, about {noise:.0%} are wrong, and no judge gets more than {1 - noise:.0%} right",
        )
    total = report.total
    if total.kept and (share := total.cut / total.kept) > NOTABLE_SHARE:
        yield Finding("Template and truncation", f"{name}: {share:.0%} of the pairs lost tokens to data.max_length")
    if (share := total.dropped_share) > NOTABLE_SHARE:
        reason = max(total.dropped, key=lambda each: total.dropped[each])
        yield Finding(
            "Template and truncation", f"{name}: {share:.0%} of the pairs were dropped, most of them: {reason}"
        )
    if report.left_out:
        kind, number = max(report.left_out.items(), key=lambda item: item[1])
        yield Finding("Template and truncation", f"{name}: of {number:,} pairs the template does not write {kind}")
    if total.kept and (share := report.with_marks / total.kept) > NOTABLE_SHARE:
        yield Finding(
            "Template and truncation", f"{name}: {share:.0%} of the pairs hold special tokens or marks of a template"
        )


def label_noise(contradictions: int, repeats: int) -> float:
    """The probability e of a wrong label, if two independent ones of a pair contradict with probability 2 e (1 - e)."""
    share = contradictions / repeats if repeats else 0.0
    return (1 - math.sqrt(max(1 - 2 * share, 0.0))) / 2


def of_accuracy(name: str, analysis: dict) -> Iterator[Finding]:
    """What the scores of the first set say: its size, lengths, the two heads beside one another, confidence."""
    accuracy = analysis["accuracy"]
    unit = unit_of(analysis)
    judge, best = next(iter(accuracy.items()))
    if best["low"] is None:
        return
    half = (best["high"] - best["low"]) / 2
    if half > WIDE_INTERVAL:
        needed = analysis["pairs"] * (half / 0.01) ** 2
        yield Finding(
            "The size of the test set",
            f"{name}: {analysis['pairs']:,} {unit}s give the accuracy to within {100 * half:.1f} points. For 1 point "
            f"about {needed:,.0f} {unit}s are needed",
        )
    length, yardstick = max(analysis["yardsticks"].items(), key=lambda item: item[1]["value"])
    if yardstick["low"] is None:  # of one prompt: an exact interval of the judge's accuracy, none of this
        return
    if yardstick["value"] >= best["low"] and yardstick["low"] > 0.5:
        yield Finding(
            "Length",
            f"{name}: taking the {length} answer is right in {yardstick['value']:.1%}, and the {judge} judge in "
            f"{best['value']:.1%}",
        )
    against = [
        part
        for part in analysis["by_length_difference"]
        if (part["longer"] == 0.0) == (length == "longer") and part["longer"] in (0.0, 1.0)
    ]
    pairs = sum(part["pairs"] for part in against)
    if pairs and yardstick["low"] > 0.5:
        right = sum(part["pairs"] * part["accuracy"][judge]["value"] for part in against) / pairs
        if right < best["value"] - LARGE_GAP:
            yield Finding(
                "Length",
                f"{name}: where the {length} answer is the worse one ({pairs:,} {unit}s), the {judge} judge is right "
                f"in {right:.1%}, against {best['value']:.1%} of all",
            )
    implicit = accuracy.get("implicit")
    if judge == "reward" and implicit is not None and implicit["value"] > best["high"]:
        yield Finding(
            "The head and the body",
            f"{name}: the implicit reward is right in {implicit['value']:.1%}, the reward head in "
            f"{best['value']:.1%}: the body knows more than the head tells",
        )
    temperature = (analysis["calibration"].get(judge) or {}).get("temperature")
    if temperature is not None and temperature > OVERCONFIDENT:
        yield Finding(
            "Training against held-out",
            f"{name}: the {judge} judge is too sure of itself; its margins should be divided by {temperature:.1f}",
        )


def of_gap(results: Results, reached: np.ndarray, evaluated: Estimate) -> Iterator[Finding]:
    """Whether the training pairs of the last fifth of a run are judged better than held-out ones, beyond chance.

    Args:
        reached: accuracy of the reward head on the training pairs of each row.
        evaluated: that on held-out pairs.
    """
    batch = results.config.get("batch", {}).get("global_batch_size", 1)  # pairs in a row
    low, high = evaluated["low"], evaluated["high"]
    if low is None or high is None:
        return
    last = reached[-max(len(reached) // 5, 1) :]
    right = float(last.mean())
    chance = math.hypot(NORMAL_QUANTILE * math.sqrt(right * (1 - right) / (len(last) * batch)), (high - low) / 2)
    if right - evaluated["value"] <= max(LARGE_GAP, chance):
        return
    train = results.data.get("train")
    is_repeated = train is None or results.training.index[-1] * batch > train.total.kept
    by_heart = "it learns them by heart"
    of_another_kind = "as each was seen for the first time, the held-out ones must be of another kind"
    yield Finding(
        "Training against held-out",
        f"the reward head is right in {right:.1%} of the last fifth's training pairs and in "
        f"{evaluated['value']:.1%} of held-out ones: {by_heart if is_repeated else of_another_kind}",
    )


def of_training(results: Results) -> Iterator[Finding]:
    """What the curves of a run say: the gap to held-out pairs, the learning rate, clipping, the share of the policy."""
    rows, options = results.training, dict(options_of(results.config))
    reached = known(rows, "accuracy/reward")
    evaluated = next((each.accuracy.get("reward") for each in results.sets.values()), None)
    if len(reached) and evaluated is not None:
        yield from of_gap(results, reached, evaluated)
    losses = known(rows, "loss/reward")
    if len(losses) >= 10:
        first, last = losses[: len(losses) // 5].mean(), losses[-(len(losses) // 5) :].mean()
        if first - last < LEAST_FALL:
            yield Finding(
                "Learning rate and steps",
                f"the reward loss went from {first:.3f} to {last:.3f} between the first fifth of the steps and the "
                "last",
            )
    if len(rows) and rows.index[-1] < FEW_STEPS:
        yield Finding("Learning rate and steps", f"the run has made {rows.index[-1]:,} steps")
    norms, limit = known(rows, "grad_norm"), options.get("optimizer.max_gradient_norm")
    if len(norms) and limit and (share := float(np.mean(norms > limit))) > NEARLY_ALL:
        yield Finding(
            "Learning rate and steps",
            f"the gradient was clipped to {limit:g} in {share:.0%} of the steps; its median norm was "
            f"{np.median(norms):.3g}",
        )
    shares = known(results.gradients, "policy_share")
    if len(shares):
        share = float(shares.mean())
        if share < SMALL_SHARE or share > LARGE_SHARE:
            effect = "hardly changes the body" if share < SMALL_SHARE else "leaves the reward little of the body"
            yield Finding(
                "The share of the policy loss",
                f"the policy loss made {share:.0%} of the pull on the body: it {effect}",
            )
