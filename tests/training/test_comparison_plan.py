"""What a comparison will take, from what its first trainings took."""

import pytest

from hafrm_ds.training import comparison_plan
from hafrm_ds.training.comparison_plan import ComparisonPlan, pairs_seen
from hafrm_ds.training.sweep import arms_of, axes_of
from tests.training.test_compare import config_of


def test_trainings_and_pairs_are_told_before_anything_is_known():
    plan = ComparisonPlan({"baseline": 100, "haf": 1000}, num_seeds=3)
    assert plan.in_words == "6 trainings, which see 3,300 pairs in all" and plan.seconds_left is None


def test_the_first_training_tells_the_time_of_others_by_their_pairs():
    plan = ComparisonPlan({"baseline": 100, "haf": 1000}, num_seeds=3)
    plan.note("baseline", 20.0)
    assert plan.seconds_left == pytest.approx((2 * 100 + 3 * 1000) * 20 / 100)
    assert plan.in_words.startswith(
        "6 trainings, 1 of which are finished; the others see 3,200 pairs in all, in about 0:"
    )
    plan.note("haf", 56.0)  # a start of 16 seconds, and 0.04 seconds a pair
    assert plan.seconds_left == pytest.approx(2 * 20 + 2 * 56)


def test_what_every_training_takes_to_start_is_not_counted_by_pairs():
    plan = ComparisonPlan({"small": 100, "large": 1000, "larger": 2000}, num_seeds=1)
    plan.note("small", 20.0)
    plan.note("large", 56.0)
    assert plan.seconds_left == pytest.approx(16 + 0.04 * 2000)


def test_a_small_one_that_took_longer_tells_nothing_of_a_line():
    plan = ComparisonPlan({"small": 100, "large": 1000, "larger": 2000}, num_seeds=1)
    plan.note("small", 90.0)
    plan.note("large", 20.0)
    assert plan.seconds_left == pytest.approx(110 / 1100 * 2000)


def test_a_finished_training_whose_time_is_not_known_is_counted():
    plan = ComparisonPlan({"baseline": 100}, num_seeds=2)
    plan.note("baseline", None)
    assert plan.left == {"baseline": 1} and plan.seconds_left is None


def test_pairs_are_those_of_all_steps_and_data_is_read_once(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(
        comparison_plan, "num_pairs", lambda config: read.append(config) or int(config.data.train[0].portion[1:])
    )
    config = config_of(tmp_path, batch={"global_batch_size": 32})
    sweep = {"data.train.portion": [":80", ":320"], "epochs": [1, 2], "objective.policy_share": [0.5]}
    found = pairs_seen(arms_of(config, axes_of(config, [], [], sweep)))
    assert found["baseline-pairs80-epochs1"] == 96 and found["haf-pairs80-epochs2-share0.5"] == 160
    assert found["haf-pairs320-epochs1-share0.5"] == 320 and len(read) == 2
    config = config.model_copy(update={"max_steps": 7})
    assert set(pairs_seen(arms_of(config, axes_of(config, [], [], {}))).values()) == {7 * 32} and len(read) == 2
