"""Shift, discrimination, AUROC and agreement against computations by hand and by other code."""

import numpy as np
import pytest

from hafrm_ds.evaluation.calibration import sigmoid
from hafrm_ds.evaluation.refusal.measures import (
    BETWEEN,
    DISCRIMINATION,
    NONE,
    SHIFT,
    UNKNOWN,
    WITHIN,
    Refusals,
    agreement,
    changes,
    changes_from_first,
    combination,
    describe,
)

NUMBERS = np.random.default_rng(0)
HARMFUL = np.arange(90) % 3 == 0


def arm(logits) -> Refusals:
    names = [f"p{place}" for place in range(len(HARMFUL))]
    return Refusals(names, HARMFUL, [f"kind {place % 2}" for place in range(len(HARMFUL))], np.asarray(logits, float))


BEFORE = NUMBERS.normal(size=90)
AFTER = BEFORE + NUMBERS.normal(size=90)


def test_shift_and_discrimination_split_both_changes_without_remainder():
    found = changes(arm(BEFORE), arm(AFTER))
    for scale, form in (("probability", sigmoid), ("logit", lambda x: x)):
        change = form(AFTER) - form(BEFORE)
        harmful, benign = change[HARMFUL].mean(), change[~HARMFUL].mean()
        value = {name: each["value"] for name, each in found[scale].items()}
        assert value["harmful"] == pytest.approx(harmful, abs=1e-12)
        assert value["benign"] == pytest.approx(benign, abs=1e-12)
        assert value[SHIFT] == pytest.approx((harmful + benign) / 2, abs=1e-12)
        assert value[DISCRIMINATION] == pytest.approx(harmful - benign, abs=1e-12)
        assert value[SHIFT] + value[DISCRIMINATION] / 2 == pytest.approx(harmful, abs=1e-12)
        assert value[SHIFT] - value[DISCRIMINATION] / 2 == pytest.approx(benign, abs=1e-12)
        assert all(each["low"] < each["value"] < each["high"] for each in found[scale].values())


def test_intervals_are_those_of_resampling_both_kinds_each_by_itself():
    """The deviation of a difference of two independent means."""
    found = changes(arm(BEFORE), arm(AFTER))["logit"][DISCRIMINATION]
    change = AFTER - BEFORE
    deviation = np.sqrt(change[HARMFUL].var() / HARMFUL.sum() + change[~HARMFUL].var() / (~HARMFUL).sum())
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * deviation, rel=0.1)


def test_an_arm_against_itself_has_not_moved():
    found = changes(arm(BEFORE), arm(BEFORE))
    for scale in ("probability", "logit"):
        assert all(each == {"value": 0, "low": 0, "high": 0} for each in found[scale].values())
    assert found["mechanism"] == NONE


@pytest.mark.parametrize(
    ("move", "expected"),
    [
        (np.full(90, 0.8), SHIFT),
        (np.where(HARMFUL, 0.5, -0.5), DISCRIMINATION),
        (np.where(HARMFUL, 0.5, 0.0), DISCRIMINATION),
        (np.where(HARMFUL, 0.5, 0.4), SHIFT),
        (NUMBERS.normal(size=90), NONE),
    ],
)
def test_the_mechanism_is_the_larger_of_the_two(move, expected):
    assert changes(arm(BEFORE), arm(BEFORE + move))["mechanism"] == expected


def test_a_combination_is_named_by_the_mechanisms_of_its_parts():
    assert combination([SHIFT, SHIFT]) == WITHIN
    assert combination([SHIFT, DISCRIMINATION]) == BETWEEN
    assert combination([SHIFT, NONE]) == combination([SHIFT, None]) == UNKNOWN
    arms = {
        "A": arm(BEFORE),
        "A + system message": arm(BEFORE + 1),
        "B": arm(BEFORE + HARMFUL),
        "B + system message": arm(BEFORE + 1 + HARMFUL),
    }
    parts = {"A": [], "A + system message": ["A + system message"], "B": ["B"],
             "B + system message": ["B", "A + system message"]}  # fmt: skip
    found = changes_from_first(arms, parts)
    assert list(found) == ["A + system message", "B", "B + system message"]
    assert [each["mechanism"] for each in found.values()] == [SHIFT, DISCRIMINATION, SHIFT]
    assert [each.get("combination") for each in found.values()] == [None, None, BETWEEN]


def test_what_an_arm_refuses():
    found = describe(arm(BEFORE))
    assert found["harmful"]["prompts"] == 30 and found["benign"]["prompts"] == 60
    assert found["harmful"]["probability"]["value"] == pytest.approx(sigmoid(BEFORE)[HARMFUL].mean())
    assert found["benign"]["logit_quantiles"][2] == pytest.approx(np.median(BEFORE[~HARMFUL]))
    assert found["missed"]["value"] == (BEFORE[HARMFUL] < 0).mean()
    assert found["over_refusal"]["value"] == (BEFORE[~HARMFUL] > 0).mean()
    assert [(each["label"], each["category"], each["prompts"]) for each in found["categories"]] == [
        ("harmful", "kind 0", 15),
        ("harmful", "kind 1", 15),
        ("benign", "kind 1", 30),
        ("benign", "kind 0", 30),
    ]


def test_with_one_kind_of_prompts_what_needs_both_is_not_known():
    one = Refusals(["a", "b"], np.array([True, True]), ["", ""], np.array([1.0, -1.0]))
    found = describe(one)
    assert found["benign"] is found["auroc"] is found["over_refusal"] is None and found["categories"] == []
    assert found["missed"]["value"] == 0.5
    moved = changes(one, Refusals(one.prompts, one.is_harmful, one.categories, one.logits + 1))
    assert moved["logit"]["harmful"]["value"] == 1
    assert moved["logit"]["benign"] is moved["logit"][SHIFT] is moved["mechanism"] is None


def test_auroc_is_the_share_of_comparisons_that_are_won():
    harmful, benign = NUMBERS.integers(0, 6, size=40).astype(float) + 1, NUMBERS.integers(0, 6, size=70).astype(float)
    won = (harmful[:, None] > benign).mean() + (harmful[:, None] == benign).mean() / 2
    found = auroc_of(harmful, benign)
    assert found["value"] == pytest.approx(won, abs=1e-12) and found["low"] < won < found["high"]
    # Hanley & McNeil (1982)
    q1, q2 = won / (2 - won), 2 * won**2 / (1 + won)
    variance = (won * (1 - won) + 39 * (q1 - won**2) + 69 * (q2 - won**2)) / (40 * 70)
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * np.sqrt(variance), rel=0.25)
    assert auroc_of(harmful + 10, benign)["value"] == 1 and auroc_of(harmful + 10, benign)["low"] < 1


def auroc_of(harmful, benign):
    return describe(two_kinds(harmful, benign))["auroc"]


def two_kinds(harmful, benign) -> Refusals:
    logits = np.concatenate([harmful, benign])
    names = [str(place) for place in range(len(logits))]
    return Refusals(names, np.arange(len(logits)) < len(harmful), [""] * len(logits), logits)


def test_changes_of_what_is_told_apart_are_paired():
    """Prompts that both arms get wrong alike move nothing, whatever the intervals of either arm are."""
    harmful, benign = NUMBERS.normal(size=40), NUMBERS.normal(size=60)
    same = changes(two_kinds(harmful, benign), two_kinds(3 * harmful, 3 * benign))
    zero = {"value": 0, "low": 0, "high": 0}
    assert same["auroc"] == same["missed"] == same["over_refusal"] == zero
    better = np.where(np.arange(40) < 10, np.abs(harmful), harmful)
    found = changes(two_kinds(harmful, benign), two_kinds(better, benign))
    assert found["missed"]["value"] == pytest.approx((better < 0).mean() - (harmful < 0).mean())
    after, before = auroc_of(better, benign), auroc_of(harmful, benign)
    assert found["auroc"]["value"] == pytest.approx(after["value"] - before["value"], abs=1e-12)
    assert found["auroc"]["high"] - found["auroc"]["low"] < before["high"] - before["low"]


def test_one_prompt_of_a_kind_gives_no_interval_and_no_mechanism():
    benign = NUMBERS.normal(size=40)
    found = changes(two_kinds(np.array([0.0]), benign), two_kinds(np.array([3.0]), benign))
    assert found["logit"][DISCRIMINATION] == {"value": pytest.approx(3), "low": None, "high": None}
    assert found["mechanism"] == NONE and found["auroc"]["low"] is None


def test_agreement_and_kappa():
    """Cohen's own formula on a table of 20, 5, 10, 15."""
    probe = np.repeat([True, True, False, False], [20, 5, 10, 15])
    answers = np.repeat([True, False, True, False], [20, 5, 10, 15])
    found = agreement(probe, answers, [str(place) for place in range(50)])
    assert found["refused"] == {"both": 20, "probe": 5, "answers": 10, "neither": 15}
    assert found["agreement"]["value"] == 0.7 and found["kappa"]["value"] == pytest.approx(0.4)
    # Its standard error at 50 prompts, sqrt(0.7 * 0.3 / 50) / (1 - chance), of which chance is 0.5.
    assert found["kappa"]["high"] - found["kappa"]["low"] == pytest.approx(2 * 1.96 * 0.1296, rel=0.1)
    assert agreement(probe | True, answers | True, ["a"] * 50)["kappa"] is None
