"""Metrics of a set, from scores written by hand."""

import math

import numpy as np
import pytest

from hafrm_ds.config import ObjectiveConfig
from hafrm_ds.evaluation.accuracy import set_metrics
from hafrm_ds.evaluation.pair_scores import PairScores
from tests.evaluation.groups import group_scores

REWARD = np.array([[2.0, 1.0], [0.5, 0.5], [-1.0, 0.0], [3.0, 3.0]], dtype=np.float32)  # right, tie, wrong, tie
LOGPROB = np.array([[-8.0, -9.0], [-7.0, -5.0], [-6.0, -6.0], [-1.0, -2.0]], dtype=np.float32)
LENGTHS = np.array([[3, 4], [5, 6], [7, 8], [1, 2]])


def scored(**scores: np.ndarray) -> PairScores:
    names = [str(place) for place in range(4)]
    return PairScores("set", None, 0.1, names, ["source"] * 4, names, LENGTHS, **scores)


def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


def test_ties_count_half_and_are_counted():
    metrics = set_metrics(scored(reward=REWARD, logprob=LOGPROB, reference=LOGPROB), ObjectiveConfig())
    assert (metrics["pairs"], metrics["ties/reward"], metrics["accuracy/reward"]) == (4, 2, 0.5)
    assert (metrics["ties/logprob"], metrics["accuracy/logprob"]) == (1, 0.625)
    # The policy is its own reference: every pair is a tie, and the loss is ln 2.
    assert (metrics["ties/implicit"], metrics["accuracy/implicit"], metrics["margin/implicit"]) == (4, 0.5, 0.0)
    assert metrics["loss/policy"] == pytest.approx(math.log(2))


def test_losses_and_margins_are_means_over_pairs():
    reference = LOGPROB - np.float32([1.0, 0.0])
    metrics = set_metrics(scored(reward=REWARD, logprob=LOGPROB, reference=reference), ObjectiveConfig())
    assert metrics["loss/reward"] == pytest.approx(-np.mean([log_sigmoid(h) for h in (1.0, 0.0, -1.0, 0.0)]))
    assert metrics["margin/reward"] == 0.0
    assert metrics["loss/policy"] == pytest.approx(-log_sigmoid(0.1))
    assert metrics["margin/implicit"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("scores", "objective", "names"),
    [
        (
            {"reward": REWARD},
            {"alpha": 0},
            {
                "pairs",
                "loss/reward",
                "accuracy/reward",
                "ties/reward",
                "margin/reward",
                "reward/mean",
                "reward/std",
            },
        ),
        (
            {"logprob": LOGPROB},
            {"rm_weight": 0, "policy_loss": "simpo"},
            {"pairs", "loss/policy", "accuracy/logprob", "ties/logprob", "margin/logprob"},
        ),
    ],
)
def test_what_was_not_scored_has_no_metric(scores, objective, names):
    assert set_metrics(scored(**scores), ObjectiveConfig(**objective)).keys() == names


def test_groups_have_the_loss_of_each_group_and_the_order_within_it():
    groups = [
        ([(0, 1), (0, 2), (1, 2)], [3.0, 1.0, 2.0]),  # two answers the wrong way round
        ([(1, 0)], [0.5, 1.0]),
    ]
    metrics = set_metrics(group_scores(groups), ObjectiveConfig(alpha=0))
    first = -np.mean([log_sigmoid(h) for h in (2.0, 1.0, -1.0)])
    assert metrics["loss/reward"] == pytest.approx((first - log_sigmoid(0.5)) / 2)  # not over the comparisons
    assert (metrics["pairs"], metrics["groups"], metrics["accuracy/reward"]) == (4, 2, 0.75)
    assert metrics["reward/mean"] == 1.5  # of each answer once
    assert (metrics["tau_b/reward"], metrics["top_1/reward"]) == (pytest.approx((1 / 3 + 1) / 2), 1)
    assert "groups" not in set_metrics(group_scores(groups[1:]), ObjectiveConfig(alpha=0))
