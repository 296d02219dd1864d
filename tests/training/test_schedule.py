import math

import pytest

from hafrm_ds.config import OptimizerConfig
from hafrm_ds.training.schedule import learning_rate_factor


def factors(num_steps: int, **options) -> list[float]:
    config = OptimizerConfig(**options)
    return [learning_rate_factor(step, num_steps, config) for step in range(num_steps)]


def test_linear():
    expected = [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    assert factors(10, schedule="linear", warmup_share=0.2) == pytest.approx(expected)


def test_cosine():
    expected = [0.5, 1.0] + [(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
    assert factors(10, schedule="cosine", warmup_share=0.2) == pytest.approx(expected)
    assert expected[6] == pytest.approx(0.5)


def test_constant():
    assert factors(10, schedule="constant", warmup_share=0.2, min_learning_rate_share=0.5) == [0.5] + [1.0] * 9


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_decay_would_reach_its_end_one_step_after_the_last(schedule):
    config = OptimizerConfig(schedule=schedule, warmup_share=0.2, min_learning_rate_share=0.1)
    assert learning_rate_factor(10, 10, config) == pytest.approx(0.1)
    assert learning_rate_factor(6, 10, config) == pytest.approx(0.55)  # half-way
    assert learning_rate_factor(9, 10, config) > 0.1


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup_share", [0.0, 0.03, 0.5, 1.0])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 1000])
def test_every_step_learns_and_one_has_the_peak(schedule, warmup_share, num_steps):
    values = factors(num_steps, schedule=schedule, warmup_share=warmup_share)
    assert all(0 < value <= 1 for value in values)
    assert max(values) == 1
    peak = values.index(1)
    assert values[: peak + 1] == sorted(values[: peak + 1])
    assert values[peak:] == sorted(values[peak:], reverse=True)


@pytest.mark.parametrize(("share", "num_steps", "warmup"), [(0.1, 10, 1), (0.03, 100, 3), (0.03, 101, 4), (0.25, 6, 2)])
def test_the_last_step_of_the_warm_up_has_factor_1(share, num_steps, warmup):
    values = factors(num_steps, warmup_share=share)
    assert values[:warmup] == pytest.approx([(step + 1) / warmup for step in range(warmup)])


def test_the_warm_up_counts_steps_in_decimal():
    values = factors(100, warmup_share=0.07)
    assert values[6] == 1
