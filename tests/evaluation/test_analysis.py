"""What evaluation.json says about a set, from scores written by hand."""

import dataclasses
import json

import numpy as np
import pytest

from hafrm_ds.errors import DataError
from hafrm_ds.evaluation.analysis import agreement, analyse, coverage
from hafrm_ds.evaluation.pair_scores import PairScores

SCORES = PairScores(
    set="hand",
    step=None,
    beta=0.1,
    ids=["f:1", "f:2", "f:3", "f:4"],
    sources=["a", "a", "b", "b"],
    prompts=["x", "x", "y", "z"],
    num_tokens=np.array([[10, 5], [5, 10], [7, 7], [200, 10]]),
    reward=np.array([[2.0, 1.0], [-1.0, 0.0], [0.5, 0.5], [3.0, 1.0]], dtype=np.float32),
    logprob=np.array([[-9.0, -8.0], [-7.0, -5.0], [-6.0, -6.0], [-1.0, -2.0]], dtype=np.float32),
    reference=np.array([[-9.0, -8.0], [-9.0, -5.0], [-6.0, -8.0], [-1.0, -2.0]], dtype=np.float32),
)


def test_a_set_by_hand():
    found = analyse(SCORES)
    assert (found["pairs"], found["prompts"]) == (4, 3)
    assert found["ties"] == {"reward": 1, "implicit": 2, "logprob": 1}
    values = {judge: value["value"] for judge, value in found["accuracy"].items()}
    assert values == {"reward": 0.625, "implicit": (0.5 + 1 + 0 + 0.5) / 4, "logprob": (0 + 0 + 0.5 + 1) / 4}
    assert found["margin"]["reward"]["value"] == pytest.approx((1 - 1 + 0 + 2) / 4)
    assert found["margin"]["implicit"]["value"] == pytest.approx(0.1 * (0 + 2 - 2 + 0) / 4)
    assert found["yardsticks"]["longer"]["value"] == 0.625 and found["yardsticks"]["shorter"]["value"] == 0.375
    assert found["agreement"] == {
        "reward/implicit": (0.5 + 0 + 0.5 + 0.5) / 4,
        "reward/logprob": (0 + 1 + 1 + 1) / 4,
        "implicit/logprob": (0.5 + 0 + 0.5 + 0.5) / 4,
    }
    sources = {name: (part["pairs"], part["accuracy"]["reward"]["value"]) for name, part in found["by_source"].items()}
    assert sources == {"a": (2, 0.5), "b": (2, 0.75)}
    lengths = [
        (part["low"], part["high"], part["pairs"], part["accuracy"]["reward"]["value"], part["longer"])
        for part in found["by_length_difference"]
    ]
    assert lengths == [(-25, -1, 1, 0.0, 0.0), (0, 0, 1, 0.5, 0.5), (1, 25, 1, 1.0, 1.0), (101, None, 1, 1.0, 1.0)]
    assert found["calibration"].keys() == {"reward", "implicit"}
    # Right, wrong, a tie and right of the head; a tie, right, wrong and a tie of the implicit reward.
    assert found["heads"].keys() == {"disagree"} and found["heads"]["disagree"]["pairs"] == 4
    json.dumps(found, allow_nan=False)


def test_a_judge_that_may_leave_out_what_it_is_least_sure_of():
    margins = {"reward": np.array([3.0, -0.1, 2.0, -1.0, 0.5]), "implicit": np.array([-3.0, 0.1, 0.0, 1.0, 2.0])}
    found = {row["share"]: (row["pairs"], row["accuracy"]) for row in coverage(margins)}
    assert found[0.1] == (1, {"reward": 1.0, "implicit": 0.0})
    assert found[0.4] == (2, {"reward": 1.0, "implicit": 0.5})
    assert found[0.6] == (3, {"reward": pytest.approx(2 / 3), "implicit": pytest.approx(2 / 3)})
    assert found[1.0] == (5, {"reward": 0.6, "implicit": 0.7})
    assert coverage({}) == []


def test_pairs_are_parted_by_whether_both_heads_agree():
    reward = np.array([[1, 0], [0, 1], [1, 0], [0, 0]], dtype=np.float32)
    logprob = np.array([[1, 0], [0, 1], [0, 1], [1, 0]], dtype=np.float32)
    scores = dataclasses.replace(SCORES, reward=reward, logprob=logprob, reference=np.zeros((4, 2), np.float32))
    heads = analyse(scores)["heads"]
    shares = {
        name: (part["pairs"], part["accuracy"]["reward"]["value"], part["accuracy"]["implicit"]["value"])
        for name, part in heads.items()
    }
    assert shares == {"agree": (2, 0.5, 0.5), "disagree": (2, 0.75, 0.5)}
    assert analyse(dataclasses.replace(scores, reward=None))["heads"] == {}


def test_the_interval_holds_the_value():
    for value in analyse(SCORES)["accuracy"].values():
        assert 0 <= value["low"] <= value["value"] <= value["high"] <= 1


def test_two_ties_agree():
    assert agreement(np.array([0.0, 1.0]), np.array([0.0, -1.0])) == 0.5


def test_a_score_that_is_not_finite_is_named():
    reward = SCORES.reward.copy()
    reward[2, 1] = np.nan
    with pytest.raises(DataError, match="hand: the reward of pair f:3 is not finite"):
        analyse(dataclasses.replace(SCORES, reward=reward))
