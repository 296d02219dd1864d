"""Calibration, from margins worked out by hand and against a search over temperatures."""

import math

import numpy as np
import pytest

from hafrm_ds.evaluation.calibration import calibrate, fitted_temperature, log_loss, reliability


def margin_of(probability: float) -> float:
    return math.log(probability / (1 - probability))


def test_bins_ece_and_brier_by_hand():
    # Claimed 0.82 three times, right twice; claimed 0.62 twice, right once; a tie.
    margins = np.array([margin_of(p) for p in (0.82, 0.82, 0.18, 0.62, 0.38)] + [0.0])
    found = calibrate(margins)
    filled = {
        part["low"]: (part["pairs"], part["confidence"], part["accuracy"]) for part in found["bins"] if part["pairs"]
    }
    assert filled == {
        0.5: (1, 0.5, 0.5),
        0.6: (2, pytest.approx(0.62), 0.5),
        0.8: (3, pytest.approx(0.82), pytest.approx(2 / 3)),
    }
    assert found["ece"] == pytest.approx((2 * 0.12 + 3 * (0.82 - 2 / 3)) / 6)
    assert found["brier"] == pytest.approx((2 * 0.18**2 + 0.82**2 + 0.38**2 + 0.62**2 + 0.25) / 6)
    assert found["log_loss"] == pytest.approx(-sum(math.log(p) for p in (0.82, 0.82, 0.18, 0.62, 0.38, 0.5)) / 6)


def test_certainty_itself_falls_into_the_last_bin():
    assert [part["pairs"] for part in reliability(np.array([1e4, -1e4]))] == [0] * 9 + [2]


def test_the_temperature_undoes_a_scale():
    source = np.random.default_rng(0)
    honest = source.normal(scale=2, size=20_000)
    honest *= np.where(source.random(20_000) < 1 / (1 + np.exp(-np.abs(honest))), np.sign(honest), -np.sign(honest))
    assert fitted_temperature(honest) == pytest.approx(1, abs=0.05)
    assert fitted_temperature(3 * honest) == pytest.approx(3 * fitted_temperature(honest))
    found = calibrate(3 * honest)
    assert found["ece"] > 0.05 > 0.02 > found["ece_at_temperature"]


def test_the_temperature_is_where_the_log_loss_is_smallest():
    margins = np.random.default_rng(1).normal(loc=0.3, size=500)
    best = fitted_temperature(margins)
    grid = np.geomspace(best / 10, best * 10, 400)
    assert log_loss(margins / best) <= min(log_loss(margins / t) for t in grid) + 1e-12


@pytest.mark.parametrize("margins", [[1.0, -2.0], [0.0, 0.0], [1.0, 0.5], [1.0, 0.0]])
def test_where_no_temperature_is_best_there_is_none(margins):
    found = calibrate(np.array(margins))
    assert (found["temperature"], found["ece_at_temperature"], found["brier_at_temperature"]) == (None, None, None)
