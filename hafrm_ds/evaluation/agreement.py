"""How far rewards agree on shared pairs, and which aspects are worth adding to a holistic reward.

    inconsistency of two rewards   share of pairs in which they prefer different answers (ALaRM); where one or both
                                   prefer neither, a pair counts half, as a coin would
    ALaRM's rule                   keep an aspect that is more often consistent with the holistic reward than not
    held-out accuracy              keep an aspect that raises the accuracy of the composition with it over the holistic
                                   reward alone, on pairs whose prompts neither means nor deviations were fitted on

ALaRM selects the least inconsistent aspects; that the line is drawn at one half is said here. Either verdict is
"undecided" where the 95% interval holds the line.

Legend: P pairs, R rewards; the second axis of [P, 2] is (chosen, rejected).
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hafrm_ds.data.tables import Estimate
from hafrm_ds.evaluation.best_of_n.statistics import spearman
from hafrm_ds.evaluation.bootstrap import estimate, estimates
from hafrm_ds.evaluation.calibration import correctness
from hafrm_ds.rewards.hierarchy import Rule, shaped

AGREEMENT_FILE = "agreement.json"
NUM_FOLDS = 5
LENGTH_EDGES = (-400, -100, 0, 1, 101, 401)
"""Bins of the length difference of a pair, chosen less rejected, in characters."""
KEEP, LEAVE_OUT, UNDECIDED = "keep", "leave out", "undecided"


@dataclass(frozen=True)
class SharedPairs:
    """Scores of the same pairs by several rewards.

    prompts: [P] a name of each pair's prompt. lengths: [P, 2] characters of the answers.
    scores: name of a reward -> [P, 2] float64.
    """

    prompts: Sequence[str]
    lengths: np.ndarray
    scores: Mapping[str, np.ndarray]

    def margins(self, name: str) -> np.ndarray:
        """Score of the chosen answer less that of the rejected one, [P]."""
        return margin(self.scores[name])


def margin(scores: np.ndarray) -> np.ndarray:
    """[P, 2] -> [P]."""
    return scores[:, 0] - scores[:, 1]


def inconsistency(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """For each pair 1 where two rewards prefer different answers, 0 where the same, and a half where one or both prefer
    neither: [P] of margins [P] and [P]."""
    return (1 - np.sign(one) * np.sign(other)) / 2


def agreement_of(pairs: SharedPairs, holistic: str, rule: Rule) -> dict[str, Any]:
    """Everything that agreement.json says of the scores.

    Args:
        holistic: the reward that the others are aspects of.
        rule: how a composition makes one number of them.

    Returns:
        pairs, prompts; rewards: mean and deviation over all answers, accuracy and ties of each; between: of each two of
        them inconsistency, Spearman's correlation of their margins (None where one is constant) and the inconsistency
        by length difference; aspects: of each its inconsistency with the holistic reward, its gain and both verdicts;
        compositions: held-out accuracy of several, None where all pairs have one prompt.
    """
    margins = {name: pairs.margins(name) for name in pairs.scores}
    right = {name: correctness(each) for name, each in margins.items()}
    accuracy = estimates(right, pairs.prompts, are_shares=True)
    rewards = {
        name: fit(scores) | {"accuracy": accuracy[name], "ties": int((margins[name] == 0).sum())}
        for name, scores in pairs.scores.items()
    }
    held_out = held_out_correctness(pairs, holistic, rule)
    return {
        "pairs": len(pairs.prompts),
        "prompts": len(set(pairs.prompts)),
        "holistic": holistic,
        "rule": {"mode": rule.mode, "threshold": rule.threshold, "weight": rule.weight},
        "rewards": rewards,
        "between": [between(pairs, margins, *two) for two in itertools.combinations(margins, 2)],
        "aspects": {
            name: aspect(pairs, margins, holistic, name, held_out) for name in pairs.scores if name != holistic
        },
        "compositions": held_out and estimates(held_out, pairs.prompts, are_shares=True),
    }


def fit(scores: np.ndarray) -> dict[str, float]:
    """Mean and deviation of a reward over all answers, by 1 / n."""
    return {"mean": float(scores.mean()), "deviation": float(scores.std())}


def between(pairs: SharedPairs, margins: Mapping[str, np.ndarray], one: str, other: str) -> dict[str, Any]:
    """How far two rewards agree."""
    differ, prompts = inconsistency(margins[one], margins[other]), np.asarray(pairs.prompts)
    correlation = spearman(margins[one], margins[other])
    return {
        "rewards": [one, other],
        "inconsistency": estimate(differ, pairs.prompts, are_shares=True),
        "spearman": None if np.isnan(correlation) else correlation,
        "by_length_difference": [
            {
                "low": low,
                "high": high,
                "pairs": int(inside.sum()),
                "inconsistency": estimate(differ[inside], prompts[inside].tolist(), are_shares=True),
            }
            for low, high, inside in by_length_difference(pairs.lengths)
        ],
    }


def by_length_difference(lengths: np.ndarray) -> Iterator[tuple[int | None, int | None, np.ndarray]]:
    """(smallest, largest difference, the pairs between them [P] bool) of each bin that has pairs; None: no limit."""
    place = np.searchsorted(LENGTH_EDGES, margin(lengths), side="right")
    lows, highs = (None, *LENGTH_EDGES), (*(edge - 1 for edge in LENGTH_EDGES), None)
    for number, (low, high) in enumerate(zip(lows, highs)):
        if (inside := place == number).any():
            yield low, high, inside


# ---- aspects -------------------------------------------------------------------------------------------------------

ALONE, EVERY = "holistic reward alone", "with every aspect"
BY_RULE, BY_ACCURACY = "with those that ALaRM's rule keeps", "with those that raise the accuracy"


def aspect(
    pairs: SharedPairs,
    margins: Mapping[str, np.ndarray],
    holistic: str,
    name: str,
    held_out: dict[str, np.ndarray] | None,
) -> dict[str, Any]:
    """What an aspect is worth beside the holistic reward."""
    differ = estimate(inconsistency(margins[name], margins[holistic]), pairs.prompts, are_shares=True)
    found: dict[str, Any] = {"inconsistency": differ, "by_rule": verdict(differ, 0.5, keep_below=True)}
    if held_out is None:
        return found | {"gain": None, "by_accuracy": UNDECIDED}
    gain = estimate(held_out[with_aspect(name)] - held_out[ALONE], pairs.prompts)
    return found | {"gain": gain, "by_accuracy": verdict(gain, 0.0, keep_below=False)}


def with_aspect(name: str) -> str:
    return f"with {name}"


def verdict(estimate: Estimate, line: float, *, keep_below: bool) -> str:
    """What an interval says of an aspect; undecided where it holds the line, or is not known."""
    low, high = estimate["low"], estimate["high"]
    if low is None or high is None or low <= line <= high:
        return UNDECIDED
    return KEEP if (high < line) == keep_below else LEAVE_OUT


def held_out_correctness(pairs: SharedPairs, holistic: str, rule: Rule) -> dict[str, np.ndarray] | None:
    """Composition -> [P] whether it is right on each pair (a tie: a half). Means, deviations and the choice of aspects
    come from the pairs of other prompts. None if all pairs have one prompt."""
    aspects = [name for name in pairs.scores if name != holistic]
    prompts = np.asarray(pairs.prompts)
    folds = folds_of(pairs.prompts)
    if folds is None:
        return None
    found: dict[str, np.ndarray] = {}

    def put(name: str, inside: np.ndarray, values: np.ndarray) -> None:
        found.setdefault(name, np.empty(len(prompts)))[inside] = values

    for fold in range(folds.max() + 1):
        inside = folds == fold
        fitted = {name: fit(scores[~inside]) for name, scores in pairs.scores.items()}
        scaled = {name: normalised(scores, **fitted[name]) for name, scores in pairs.scores.items()}
        right = {
            name: correctness(margin(composed(scaled, holistic, own, rule)))
            for name, own in {ALONE: [], **{with_aspect(each): [each] for each in aspects}, EVERY: aspects}.items()
        }
        rest = {name: each[~inside].mean() for name, each in right.items()}
        signs = {name: margin(scores[~inside]) for name, scores in pairs.scores.items()}
        chosen = {
            BY_RULE: [each for each in aspects if inconsistency(signs[each], signs[holistic]).mean() < 0.5],
            BY_ACCURACY: [each for each in aspects if rest[with_aspect(each)] > rest[ALONE]],
        }
        right |= {name: correctness(margin(composed(scaled, holistic, own, rule))) for name, own in chosen.items()}
        for name, each in right.items():
            put(name, inside, each[inside])
    return found


def folds_of(prompts: Sequence[str]) -> np.ndarray | None:
    """[P] the fold of each pair: pairs of one prompt stand in one. The same in every run; None for a single prompt."""
    names, place = np.unique(np.asarray(prompts), return_inverse=True)
    if len(names) < 2:
        return None
    order = np.random.default_rng(0).permutation(len(names))
    return (order % min(NUM_FOLDS, len(names)))[place]


def normalised(scores: np.ndarray, mean: float, deviation: float) -> np.ndarray:
    """(score - mean) / deviation; 0 of a reward that is constant."""
    return (scores - mean) / deviation if deviation else np.zeros_like(scores)


def composed(scaled: Mapping[str, np.ndarray], holistic: str, aspects: list[str], rule: Rule) -> np.ndarray:
    """The values of a composition [P, 2] from normalised scores, every aspect with the weight 1."""
    total = np.zeros_like(scaled[holistic])
    for name in aspects:
        total += np.vectorize(lambda value: shaped((value,)), otypes=[np.float64])(scaled[name])
    return np.vectorize(rule.value, otypes=[np.float64])(scaled[holistic], total)
