"""What evaluation.json says about a set, from scores written by hand."""

import dataclasses
import json

import numpy as np
import pytest

from hafrm_ds.errors import DataError
from hafrm_ds.evaluation.analysis import agreement, analyse
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
    json.dumps(found, allow_nan=False)


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
