"""Which evaluation of a run is the best."""

import math

import pytest

from hafrm_ds.training.run_state import Best


def test_the_best_evaluation_is_remembered_with_the_last():
    best = Best("held_out/accuracy/reward")
    for step, value in ((0, 0.9), (10, 0.6), (20, 0.8), (30, 0.8), (40, 0.7)):
        best.consider(step, value)
    assert (best.step, best.value) == (20, 0.8)
    assert (best.latest_step, best.latest_value) == (40, 0.7)


def test_evaluations_without_improvement_are_counted():
    best, counts = Best("hh/loss/reward"), []
    for step, value in enumerate((0.6, 0.7, 0.6, 0.5, 0.5, 0.4), start=1):
        best.consider(step, value)
        counts.append(best.evaluations_since)
    assert counts == [0, 1, 2, 0, 1, 0]


def test_a_value_that_is_no_number_is_never_the_best():
    best = Best("held_out/accuracy/reward")
    for step, value in ((1, math.nan), (2, 0.7), (3, math.nan)):
        best.consider(step, value)
    assert (best.step, best.value, best.evaluations_since) == (2, 0.7, 1)


@pytest.mark.parametrize(
    ("metric", "step"),
    [("hh/loss/reward", 20), ("hh/loss/policy", 20), ("hh/margin/implicit", 30), ("org/loss/accuracy/reward", 30)],
)
def test_a_loss_is_better_when_it_is_smaller(metric, step):
    best = Best(metric)
    for at, value in ((10, 0.6), (20, 0.3), (30, 0.9)):
        best.consider(at, value)
    assert best.step == step
