"""What the scores of a set say about a model: accuracies with intervals, calibration, lengths, agreement, orders.

Legend: P pairs, which in groups of more than two answers are the comparisons. Judges: see `PairScores.judges`.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from hafrm_ds.data.tables import Estimate
from hafrm_ds.errors import DataError
from hafrm_ds.evaluation.bootstrap import estimates
from hafrm_ds.evaluation.calibration import calibrate, correctness
from hafrm_ds.evaluation.order import MEASURES, GoldOrder
from hafrm_ds.evaluation.pair_scores import PairScores

PROBABILISTIC = ("reward", "implicit", "combined")
"""Judges whose margins are log-odds, by the loss that trains them or the fit. Those of log pi are not."""
COVERAGES = tuple(share / 10 for share in range(1, 11))
"""Shares of the pairs of which a judge may choose the ones that it is surest of."""
LENGTH_EDGES = (-100, -25, 0, 1, 26, 101)
"""Bins of the length difference of a pair, chosen less rejected, in tokens: up to -101, -100 to -26, ..., 0, ..., from
101."""


def analyse(scores: PairScores) -> dict[str, Any]:
    """Everything that evaluation.json says about one set.

    Returns:
        pairs, prompts (different ones); ties, accuracy and margin of each judge, the last two as value, low, high (95%
        bootstrap intervals, clustered by prompt; a tie counts half in accuracy); yardsticks: accuracy of choosing the
        longer and the shorter answer; calibration of the judges that give probabilities; by_source;
        by_length_difference; agreement: share of pairs in which two judges prefer the same answer; coverage: accuracy
        of each judge that gives probabilities on the share of the pairs that it is surest of; heads, where there are
        both of them: the pairs on which reward head and implicit reward agree, and the others. Of a set with groups of
        more than two answers also groups, answers (those that are compared), and ranking: judge -> tau_b, top_1 and
        ndcg as value, low, high, means over the groups that have an order.

    Raises:
        DataError: there is no pair, or a score is not finite.
    """
    check(scores)
    margins = {judge: scores.margins(judge) for judge in scores.judges}
    prompts = np.asarray(scores.prompts)

    def accuracies(inside: np.ndarray) -> dict[str, Estimate]:
        """Of each judge on the pairs `inside` [P] bool."""
        right = {judge: correctness(each[inside]) for judge, each in margins.items()}
        return estimates(right, prompts[inside], are_shares=True)

    def part(inside: np.ndarray) -> dict[str, Any]:
        return {"pairs": int(inside.sum()), "accuracy": accuracies(inside)}

    probabilistic = {judge: each for judge, each in margins.items() if judge in PROBABILISTIC}
    longer = correctness(length_difference(scores))
    yardsticks = {"longer": longer, "shorter": 1 - longer}
    return {
        "pairs": len(scores),
        "prompts": len(set(scores.prompts)),
        "ties": {judge: int((each == 0).sum()) for judge, each in margins.items()},
        "accuracy": accuracies(np.ones(len(scores), dtype=bool)),
        "margin": estimates(margins, scores.prompts),
        "yardsticks": estimates(yardsticks, scores.prompts),
        "calibration": {judge: calibrate(each) for judge, each in probabilistic.items()},
        "by_source": {name: part(inside) for name, inside in by_source(scores)},
        "by_length_difference": [
            {"low": low, "high": high} | part(inside) | {"longer": float(longer[inside].mean())}
            for low, high, inside in by_length_difference(scores)
        ],
        "agreement": {
            f"{one}/{other}": agreement(margins[one], margins[other])
            for one, other in itertools.combinations(margins, 2)
        },
        "coverage": coverage(probabilistic),
        "heads": {name: part(inside) for name, inside in by_agreement(margins)},
        **orders(scores),
    }


def orders(scores: PairScores) -> dict[str, Any]:
    """What `analyse` says of groups alone; nothing where all of them are pairs."""
    order = GoldOrder.of(scores)
    if order is None:
        return {}
    values = {(judge, name): each for judge in scores.judges for name, each in order.measures(judge).items()}
    top = {key: values.pop(key) for key in list(values) if key[1] == "top_1"}
    found = estimates(values, order.prompts) | estimates(top, order.prompts, are_shares=True)
    return {
        "groups": len(scores.answers.sizes),
        "answers": len(scores.answers.group),
        "ranking": {judge: {name: found[judge, name] for name in MEASURES} for judge in scores.judges},
    }


def check(scores: PairScores) -> None:
    """Raises DataError where there is no pair, or a score that is not finite."""
    if not len(scores):
        raise DataError(f"{scores.set}: the set has no pairs")
    for judge, values in scores.judges.items():
        if not np.isfinite(values).all():
            worst = scores.ids[int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])]
            raise DataError(f"{scores.set}: the {judge} of pair {worst} is not finite; try --dtype float32")


def agreement(one: np.ndarray, other: np.ndarray) -> float:
    """Share of pairs in which two judges prefer the same answer; a tie of one of them counts half. [P], [P]."""
    return float(np.mean(1 - np.abs(np.sign(one) - np.sign(other)) / 2))


def coverage(margins: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Accuracy of judges where each leaves out the pairs that it is least sure of, by the size of its margins [P].

    Returns:
        For each of COVERAGES the share, the number of pairs, and accuracy: judge -> value.
    """
    right = {judge: correctness(each[np.argsort(-np.abs(each), kind="stable")]) for judge, each in margins.items()}
    rows = []
    for share in COVERAGES if right else ():
        pairs = max(1, round(share * len(next(iter(right.values())))))
        accuracy = {judge: float(each[:pairs].mean()) for judge, each in right.items()}
        rows.append({"share": share, "pairs": pairs, "accuracy": accuracy})
    return rows


def by_agreement(margins: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """("agree", pairs on which both heads prefer the same answer [P] bool), and ("disagree", all others), each where
    there are any."""
    if {"reward", "implicit"} <= margins.keys():
        agree = margins["reward"] * margins["implicit"] > 0
        yield from ((name, each) for name, each in (("agree", agree), ("disagree", ~agree)) if each.any())


def length_difference(scores: PairScores) -> np.ndarray:
    """Tokens of the chosen answer less those of the rejected one, [P]."""
    return scores.num_tokens[:, 0] - scores.num_tokens[:, 1]


def by_source(scores: PairScores) -> Iterator[tuple[str, np.ndarray]]:
    """(source, its pairs [P] bool), in order of appearance."""
    sources = np.asarray(scores.sources)
    for name in dict.fromkeys(scores.sources):
        yield name, sources == name


def by_length_difference(scores: PairScores) -> Iterator[tuple[int | None, int | None, np.ndarray]]:
    """(smallest, largest difference, the pairs between them [P] bool) of each bin that has pairs; None: no limit."""
    difference = length_difference(scores)
    place = np.searchsorted(LENGTH_EDGES, difference, side="right")
    lows, highs = (None, *LENGTH_EDGES), (*(edge - 1 for edge in LENGTH_EDGES), None)
    for number, (low, high) in enumerate(zip(lows, highs)):
        if (inside := place == number).any():
            yield low, high, inside
