"""Statistics of best-of-N against enumeration of all draws and all orders of ties, and values worked by hand."""

import json
from itertools import combinations, permutations, product

import numpy as np
import pytest

from hafrm_ds.evaluation.best_of_n.statistics import (
    compare_with_gold,
    gold_of_pick,
    jointly_best,
    kendall,
    pick_against_pick,
    pick_probabilities,
    spearman,
    top_k_recall,
)

RANDOM = np.random.default_rng(0)


def cases(count: int = 20):
    """Scores and gold scores of 2 to 5 candidates, most of them with ties."""
    for _ in range(count):
        size = RANDOM.integers(2, 6)
        yield RANDOM.integers(0, 4, size).astype(float), RANDOM.integers(0, 4, size).astype(float)


def orders(scores: np.ndarray) -> list[list[int]]:
    """Every order, best first, that random tie-breaks can give; each is as probable as any other."""
    return [list(order) for order in permutations(range(len(scores))) if (np.diff(scores[list(order)]) <= 0).all()]


def test_the_pick_among_n_against_every_draw_of_n():
    for scores, gold in cases():
        for n in range(1, len(scores) + 1):
            drawn = [list(subset) for subset in combinations(range(len(scores)), n)]
            picks = [[subset[k] for k in np.flatnonzero(scores[subset] == scores[subset].max())] for subset in drawn]
            assert gold_of_pick(scores, gold, n) == pytest.approx(np.mean([gold[pick].mean() for pick in picks]))
            assert pick_probabilities(scores, n).sum() == pytest.approx(1)


def test_the_curve_goes_from_the_mean_to_the_pick():
    scores, gold = np.array([0.1, 0.9, 0.5]), np.array([3.0, 6.0, 0.0])
    # Two of three: {0, 1} and {1, 2} pick candidate 1, {0, 2} picks candidate 2.
    assert [gold_of_pick(scores, gold, n) for n in (1, 2, 3)] == pytest.approx([3.0, 4.0, 6.0])


def test_many_candidates_are_no_trouble():
    scores = np.arange(1000.0)
    # The largest of n of 1 to N is n (N + 1) / (n + 1) on average.
    assert gold_of_pick(scores, scores + 1, 500) == pytest.approx(500 * 1001 / 501)


def test_top_k_recall_against_every_order_of_ties():
    for scores, gold in cases():
        for k in range(1, len(scores) + 1):
            hits = [(gold[order[:k]] == gold.max()).any() for order in orders(scores)]
            assert top_k_recall(scores, gold, k) == pytest.approx(np.mean(hits))


def test_equal_scores_are_the_random_choice():
    gold = np.array([0.3, 0.1, 0.7, 0.2])
    assert [top_k_recall(np.ones(4), gold, k) for k in (1, 2, 4)] == [0.25, 0.5, 1]
    assert gold_of_pick(np.ones(4), gold, 4) == pytest.approx(gold.mean())


def test_win_rates_against_every_pick_of_ties():
    for scores, gold in cases():
        models = [scores, RANDOM.integers(0, 4, len(gold)).astype(float), RANDOM.permutation(scores)]
        picks = np.array(list(product(*(np.flatnonzero(each == each.max()) for each in models))))
        worth = gold[picks]
        wins = (worth == worth.max(axis=1, keepdims=True)).mean(axis=0)
        assert jointly_best(models, gold) == pytest.approx(wins)
        win, tie = pick_against_pick(models[0], models[1], gold)
        assert win == pytest.approx((worth[:, 0] > worth[:, 1]).mean())
        assert tie == pytest.approx((worth[:, 0] == worth[:, 1]).mean())


def test_rank_correlations_worked_by_hand():
    rising = np.array([1.0, 2, 3, 4])
    assert spearman(rising, np.array([1.0, 3, 2, 4])) == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)
    assert kendall(rising, np.array([1.0, 3, 2, 4])) == pytest.approx(4 / 6)  # 5 pairs agree, 1 does not
    tied = np.array([1.0, 2, 2, 3])  # ranks 1, 2.5, 2.5, 4
    assert spearman(tied, rising) == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert kendall(tied, rising) == pytest.approx(5 / np.sqrt(5 * 6))
    assert spearman(rising, -rising) == kendall(rising, -rising) == pytest.approx(-1)
    assert np.isnan(spearman(np.ones(4), rising)) and np.isnan(kendall(rising, np.ones(4)))


@pytest.fixture
def results():
    """Two prompts of three and four candidates; `good` picks 5 and 2, `bad` 1 and 2, `blind` the mean of all."""
    gold = [np.array([5.0, 3, 1]), np.array([0.0, 2, 0, 2])]
    scores = {
        "good": [np.array([0.9, 0.5, 0.1]), np.array([0.1, 0.9, 0.2, 0.8])],
        "bad": [np.array([0.1, 0.5, 0.9]), np.array([0.3, 0.2, 0.1, 0.4])],
        "blind": [np.zeros(3), np.zeros(4)],
    }
    return compare_with_gold(scores, gold, ["a", "b"])


def test_means_over_prompts_worked_by_hand(results):
    models = results["models"]
    value = {name: {key: each["value"] for key, each in found.items() if key in ("pick", "gain", "win_rate")}
             for name, found in models.items()}  # fmt: skip
    assert {name: each["value"] for name, each in results["gold"].items()} == {"mean": 2, "best": 3.5, "worst": 0.5}
    assert value["good"] == pytest.approx({"pick": 3.5, "gain": 1.5, "win_rate": 1})
    # bad: the worst, then shares the best with good; blind: 1/3 of the time 5, half of the time 2.
    assert value["bad"] == pytest.approx({"pick": 1.5, "gain": -0.5, "win_rate": 0.5})
    assert value["blind"] == pytest.approx({"pick": 2, "gain": 0, "win_rate": (1 / 3 + 1 / 2) / 2})
    recalls = {name: [found["top_k_recall"][k]["value"] for k in "12"] for name, found in models.items()}
    assert recalls["good"] == [1, 1] and recalls["bad"] == [0.5, 0.5]
    random = [results["random"]["top_k_recall"][k]["value"] for k in "12"]
    assert recalls["blind"] == random == pytest.approx([(1 / 3 + 1 / 2) / 2, (2 / 3 + 5 / 6) / 2])
    assert [len(found["curve"]) for found in models.values()] == [3, 3, 3]
    assert models["blind"]["spearman"] is None and models["good"]["kendall"]["prompts"] == 2


def test_pairs_of_models_add_up(results):
    assert [pair["models"] for pair in results["pairs"]] == [["good", "bad"], ["good", "blind"], ["bad", "blind"]]
    pair = {key: results["pairs"][0][key]["value"] for key in ("wins", "ties", "losses")}
    assert pair == {"wins": 0.5, "ties": 0.5, "losses": 0}
    json.dumps(results, allow_nan=False)
