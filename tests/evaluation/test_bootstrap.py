"""Intervals of means, against a naive bootstrap and against theory."""

import math

import numpy as np
import pytest

from hafrm_ds.evaluation.bootstrap import estimate, estimates, means_of_sets


def naive(values: np.ndarray, prompts: list[str], resamples: int = 4000) -> tuple[float, float]:
    """Draw prompts with replacement, take all of their pairs, average."""
    source = np.random.default_rng(5)
    groups = [values[[k for k, name in enumerate(prompts) if name == prompt]] for prompt in sorted(set(prompts))]
    means = [
        np.concatenate([groups[k] for k in source.integers(len(groups), size=len(groups))]).mean()
        for _ in range(resamples)
    ]
    return tuple(np.quantile(means, [0.025, 0.975]))


def test_the_interval_is_that_of_a_naive_cluster_bootstrap():
    source = np.random.default_rng(1)
    prompts = [f"prompt {k}" for k in source.integers(40, size=150)]
    values = source.normal(size=150)
    found = estimate(values, prompts)
    low, high = naive(values, prompts)
    assert found["value"] == pytest.approx(values.mean())
    assert found["low"] == pytest.approx(low, abs=0.02) and found["high"] == pytest.approx(high, abs=0.02)


def test_independent_pairs_have_the_interval_of_a_proportion():
    right = np.repeat([1.0, 0.0], [700, 300])
    found = estimate(right, [str(k) for k in range(1000)])
    half = 1.96 * math.sqrt(0.7 * 0.3 / 1000)
    assert (found["low"], found["high"]) == pytest.approx((0.7 - half, 0.7 + half), abs=0.004)


def test_repeating_every_pair_under_its_prompt_adds_no_certainty():
    source = np.random.default_rng(2)
    values, prompts = source.normal(size=60), [str(k) for k in range(60)]
    once, often = estimate(values, prompts), estimate(np.tile(values, 5), prompts * 5)
    assert (often["low"], often["high"]) == pytest.approx((once["low"], once["high"]))


def test_seeds_that_differ_widen_the_interval():
    prompts = [str(k) for k in range(100)]
    row = np.random.default_rng(3).normal(size=100)
    same, apart = estimate(np.stack([row, row]), prompts), estimate(np.stack([row - 1, row + 1]), prompts)
    assert same["value"] == pytest.approx(apart["value"])
    assert apart["high"] - apart["low"] > 2 * (same["high"] - same["low"])


def test_several_values_are_estimated_as_each_alone():
    source = np.random.default_rng(4)
    prompts = [str(k) for k in source.integers(30, size=80)]
    columns = {"one": source.normal(size=80), "two": source.normal(size=80)}
    for name, found in estimates(columns, prompts).items():
        alone = estimate(columns[name], prompts)
        assert found == pytest.approx(alone)


def test_a_share_that_never_fails_has_an_exact_interval():
    found = estimate(np.ones(30), [str(k // 2) for k in range(30)], are_shares=True)
    assert (found["value"], found["high"]) == (1, 1)
    # So many right in a row, of 15 prompts, have this probability at the lower end.
    assert found["low"] ** 15 == pytest.approx(0.025)
    never = estimate(np.zeros(15), [str(k) for k in range(15)], are_shares=True)
    assert never["high"] == pytest.approx(1 - found["low"])
    mixed = np.array([1.0, 0.0]), ["a", "b"]
    assert estimate(*mixed, are_shares=True) == estimate(*mixed)


def test_a_single_prompt_tells_of_no_interval():
    found = estimate(np.array([1.0, 0.0, 1.0]), ["only"] * 3)
    assert found == {"value": pytest.approx(2 / 3), "low": None, "high": None}
    assert estimate(np.ones(3), ["only"] * 3, are_shares=True)["low"] == pytest.approx(0.025)


def test_no_pairs_have_no_mean():
    with pytest.raises(ValueError, match="no pairs"):
        estimate(np.empty(0), [])


def test_a_prompt_of_several_sets_is_drawn_for_all_of_them_together():
    """The mean of a set with itself is the set; half of it shared, the interval is that of a naive joint bootstrap."""
    source = np.random.default_rng(0)
    values, names = source.normal(size=(1, 400)), [str(k) for k in range(400)]
    alone, twice = estimate(values, names), means_of_sets({"": [values, values]}, [names, names])[""]
    assert twice["high"] - twice["low"] == pytest.approx(alone["high"] - alone["low"], rel=0.1)

    near, far = values[:, :300], values[:, 100:]  # 200 prompts of both, 100 of each alone
    found = means_of_sets({"": [near, far]}, [names[:300], names[100:]])[""]
    means = []
    for _ in range(4000):
        own, both, other = (
            source.integers(low, high, size=high - low) for low, high in ((0, 100), (100, 300), (300, 400))
        )
        means.append(np.mean([values[0, np.concatenate([each, both])].mean() for each in (own, other)]))
    assert (found["low"], found["high"]) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.1 * np.std(means))
