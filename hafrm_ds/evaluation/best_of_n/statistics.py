"""Best-of-N: what the answers that a reward model picks are worth to a gold scorer.

    win rate of a model       share of prompts where its pick is jointly the best of all models' picks (HAF-RM, Fig. 5)
    top-k recall              share of prompts where the gold best is among the model's k best (HAF-RM, Table 4)
    curve                     expected gold score of the pick among n random candidates, n = 1 to N

Candidates with the same score stand in random order: every value is the exact expectation over it. So nothing depends
on the order in which they were given, and a model that scores everything alike is the random choice.

Legend: P prompts, N candidates of a prompt (it may differ from prompt to prompt), M models.
"""

from collections.abc import Sequence
from itertools import combinations
from math import comb
from typing import Any

import numpy as np

from hafrm_ds.data.tables import Estimate
from hafrm_ds.evaluation.bootstrap import estimate, estimates

TOP_KS = (1, 2)


# ---- one prompt ----------------------------------------------------------------------------------------------------


def pick_probabilities(scores: np.ndarray, n: int) -> np.ndarray:
    """How probable it is that each candidate is the best scored of n different ones drawn at random: [N], sum 1.

    Of the comb(N, n) draws, comb(b, n) - comb(a, n) have their best among the candidates of a given score, where a
    candidates are below it and b at most equal; those of one score share this alike. (With all scores different, the
    estimator of Nakano et al. 2021, WebGPT, app. I.)

    Args:
        scores: [N]. n: 1 to N.
    """
    total = comb(len(scores), n)
    ordered = np.sort(scores)
    below = np.searchsorted(ordered, scores, side="left")
    up_to = np.searchsorted(ordered, scores, side="right")
    return np.array([(comb(int(b), n) - comb(int(a), n)) / total / int(b - a) for a, b in zip(below, up_to)])


def gold_of_pick(scores: np.ndarray, gold: np.ndarray, n: int) -> float:
    """Expected gold score of the pick among n random candidates; n = N is the pick, n = 1 the random choice.

    Args:
        scores, gold: [N].
    """
    return float(pick_probabilities(scores, n) @ gold)


def top_k_recall(scores: np.ndarray, gold: np.ndarray, k: int) -> float:
    """Probability that a gold best candidate is among the model's k best.

    Several candidates may share the best gold score: any of them will do. Constant scores give the random choice, which
    is k / N where the gold best is one.

    Args:
        scores, gold: [N]. k: 1 to N.
    """
    is_best = gold == gold.max()
    last_in = np.sort(scores)[-k]  # score of the last of the k; those that share it stand for the places left
    if is_best[scores > last_in].any():
        return 1.0
    shares, places = scores == last_in, k - int((scores > last_in).sum())
    num_shares, num_best = int(shares.sum()), int(is_best[shares].sum())
    return 1 - comb(num_shares - num_best, places) / comb(num_shares, places)


def jointly_best(scores: Sequence[np.ndarray], gold: np.ndarray) -> np.ndarray:
    """Probability that each model's pick is as good as that of every other model, by gold score: [M].

    Models that pick the same answer, or answers of the same gold score, win together.

    Args:
        scores: [N] of each model. gold: [N].
    """
    picks = [gold[each == each.max()] for each in scores]  # gold scores of what may be picked
    return np.array(
        [
            np.mean([np.prod([(other <= value).mean() for j, other in enumerate(picks) if j != i]) for value in mine])
            for i, mine in enumerate(picks)
        ]
    )


def pick_against_pick(scores: np.ndarray, other: np.ndarray, gold: np.ndarray) -> tuple[float, float]:
    """Probability that a model's pick has a higher gold score than another model's, and that it has the same.

    Args:
        scores, other, gold: [N].
    """
    mine, theirs = gold[scores == scores.max()], gold[other == other.max()]
    return float((mine[:, None] > theirs).mean()), float((mine[:, None] == theirs).mean())


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's correlation of [N] and [N], equal values at their mean rank; nan where one of them is constant."""

    def centred_ranks(values: np.ndarray) -> np.ndarray:
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
        return ranks - ranks.mean()

    return correlation(centred_ranks(a), centred_ranks(b))


def kendall(a: np.ndarray, b: np.ndarray) -> float:
    """Kendall's tau-b of [N] and [N]; nan where one of them is constant."""
    return correlation(*(np.sign(values[:, None] - values).ravel() for values in (a, b)))


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Of values whose mean is 0."""
    size = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / size) if size else float("nan")


# ---- all prompts ---------------------------------------------------------------------------------------------------


def compare_with_gold(
    scores: dict[str, list[np.ndarray]], gold: list[np.ndarray], prompts: Sequence[str]
) -> dict[str, Any]:
    """Means over the prompts with 95% bootstrap intervals, as best_of_n.json holds them.

    Args:
        scores: model -> [N] of each prompt. gold: [N] of each prompt. N >= 2.
        prompts: [P] a name of each prompt; rows with the same one are resampled together.
    """
    fewest = min(map(len, gold))
    ks = [k for k in TOP_KS if k < fewest]

    def each(function, *columns, **options) -> np.ndarray:
        return np.array([function(*row, **options) for row in zip(*columns)])

    def recall(own: list[np.ndarray]) -> dict[str, Estimate]:
        return estimates({str(k): each(top_k_recall, own, gold, k=k) for k in ks}, prompts, are_shares=True)

    def curve(own: list[np.ndarray]) -> list[Estimate]:
        columns = {n: each(gold_of_pick, own, gold, n=n) for n in range(1, fewest + 1)}
        return list(estimates(columns, prompts).values())

    constant = [np.zeros(len(each_gold)) for each_gold in gold]
    mean, best, worst = (each(function, gold) for function in (np.mean, np.max, np.min))
    wins = each(lambda *row: jointly_best(row[:-1], row[-1]), *scores.values(), gold)  # [P, M]
    models = {}
    for number, (name, own) in enumerate(scores.items()):
        pick = np.array([gold_of_pick(*row, n=len(row[0])) for row in zip(own, gold)])
        models[name] = {
            **estimates({"pick": pick, "gain": pick - mean}, prompts),
            "top_k_recall": recall(own),
            "spearman": mean_where_defined(each(spearman, own, gold), prompts),
            "kendall": mean_where_defined(each(kendall, own, gold), prompts),
            "curve": curve(own),
        }
        if len(scores) > 1:
            models[name]["win_rate"] = estimate(wins[:, number], prompts, are_shares=True)
    return {
        "gold": estimates({"mean": mean, "best": best, "worst": worst}, prompts),
        "random": {"top_k_recall": recall(constant)},
        "models": models,
        "best_curve": curve(gold),
        "pairs": [compare_two(a, b, scores, gold, prompts) for a, b in combinations(scores, 2)],
    }


def compare_two(
    a: str, b: str, scores: dict[str, list[np.ndarray]], gold: list[np.ndarray], prompts: Sequence[str]
) -> dict[str, Any]:
    """How often the pick of model `a` has the higher, the same and the lower gold score than that of `b`."""
    outcomes = np.array([pick_against_pick(*row) for row in zip(scores[a], scores[b], gold)])  # [P, 2]
    wins, ties = outcomes.T
    values = {"wins": wins, "ties": ties, "losses": 1 - wins - ties}
    return {"models": [a, b]} | {name: estimate(value, prompts, are_shares=True) for name, value in values.items()}


def mean_where_defined(values: np.ndarray, prompts: Sequence[str]) -> dict[str, Any] | None:
    """Mean over the prompts where a correlation is defined, and how many these are; None where there is none."""
    defined = ~np.isnan(values)
    if not defined.any():
        return None
    return {**estimate(values[defined], np.asarray(prompts)[defined]), "prompts": int(defined.sum())}
