"""Findings: each is there where its cause was planted, and none where there is none."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hafrm_ds.data.report import Counts
from hafrm_ds.evaluation.analysis import analyse
from hafrm_ds.evaluation.pair_scores import PairScores
from hafrm_ds.evaluation.report.findings import Finding, findings, label_noise
from hafrm_ds.evaluation.report.reading import Results, SetResult, by_step
from hafrm_ds.evaluation.report.writing import write_report
from tests.evaluation.report.folders import data_report, write_run

PAIRS = 4000
PAGE = Path(__file__).parents[3] / "launch" / "accuracy.md"


def scores(
    accuracy: float, *, longer: float = 0.5, right_if_longer: float | None = None, implicit: float | None = None
):
    """A set whose reward head is right, and whose chosen answer is longer, with these probabilities."""
    rng = np.random.default_rng(0)
    is_longer = rng.random(PAIRS) < longer
    probability = np.full(PAIRS, accuracy)
    if right_if_longer is not None:
        probability = np.where(is_longer, right_if_longer, 1 - right_if_longer)

    def values(probability: np.ndarray) -> np.ndarray:
        margin = np.where(rng.random(PAIRS) < probability, 1.0, -1.0) * rng.uniform(0.5, 1.5, PAIRS)
        return np.stack([margin, np.zeros(PAIRS)], axis=1).astype(np.float32)

    policy = None if implicit is None else values(np.full(PAIRS, implicit))
    return PairScores(
        set="held out",
        step=500,
        beta=1.0,
        ids=[str(number) for number in range(PAIRS)],
        sources=["s"] * PAIRS,
        prompts=[str(number) for number in range(PAIRS)],
        num_tokens=np.stack([np.where(is_longer, 60, 40), np.full(PAIRS, 50)], axis=1),
        reward=values(probability),
        logprob=policy,
        reference=None if policy is None else np.zeros_like(policy),
    )


def rows(steps: int = 500, *, accuracy: float = 0.75, last_loss: float = 0.4, norm: float = 0.5):
    losses = np.linspace(0.69, last_loss, steps)
    return by_step(
        [
            {"step": step + 1, "accuracy/reward": accuracy, "loss/reward": losses[step], "grad_norm": norm}
            for step in range(steps)
        ]
    )


def results(**changes) -> Results:
    found = Results(Path("run"), "run", True, "finished", config={"optimizer": {"max_gradient_norm": 1.0}})
    held_out = changes.pop("held_out", scores(0.74))
    sets = {"held out": SetResult(by_step([]), held_out, analyse(held_out))}
    return replace(found, **{"training": rows(), "sets": sets} | changes)


def sections(found: Results) -> list[str]:
    return [finding.section for finding in findings(found)]


def test_a_sound_run_has_none():
    assert findings(results(data={"train": replace(data_report(), total=Counts(read=1200, kept=1200))})) == []


REPORT = replace(data_report(), total=Counts(read=1000, kept=1000))


@pytest.mark.parametrize(
    ("changes", "section", "words"),
    [
        (
            {"data": {"train": replace(REPORT, both_orders=30, duplicates=70)}},
            "The best reachable accuracy",
            "about 18%",
        ),
        (
            {"data": {"train": replace(REPORT, total=Counts(read=9, kept=9, cut=5))}},
            "Template and truncation",
            "lost tokens",
        ),
        ({"data": {"train": data_report()}}, "Template and truncation", "most of them: empty <i>"),
        (
            {"data": {"train": replace(REPORT, left_out={"system messages": 7})}},
            "Template and truncation",
            "of 7 pairs",
        ),
        ({"data": {"train": replace(REPORT, with_marks=300)}}, "Template and truncation", "30%"),
        ({"held_out": scores(0.6, longer=0.66)}, "Length", "taking the longer answer"),
        ({"held_out": scores(0.5, longer=0.7, right_if_longer=0.9)}, "Length", "where the longer answer is the worse"),
        ({"held_out": scores(0.74, implicit=0.9)}, "The head and the body", "right in 89.8%"),
        ({"training": rows(accuracy=0.95)}, "Training against held-out", "95.0% of the last fifth"),
        ({"training": rows(last_loss=0.685)}, "Learning rate and steps", "0.69"),
        ({"training": rows(steps=60)}, "Learning rate and steps", "60 steps"),
        ({"training": rows(norm=7.0)}, "Learning rate and steps", "in 100% of the steps"),
        ({"gradients": by_step([{"step": 9, "policy_share": 0.04}])}, "The share of the policy loss", "4%"),
        ({"gradients": by_step([{"step": 9, "policy_share": 0.97}])}, "The share of the policy loss", "97%"),
    ],
)
def test_a_planted_cause_is_found(changes, section, words):
    found = [finding for finding in findings(results(**changes)) if finding.section == section]
    assert any(words in finding.text for finding in found), found


def test_training_pairs_that_were_seen_once_are_not_known_by_heart():
    """20 rows of 64 pairs are the last fifth of 100 steps, which saw 6,400 of 10,000 pairs."""
    config = {"batch": {"global_batch_size": 64}}
    train = replace(REPORT, total=Counts(read=10_000, kept=10_000))
    [gap] = [
        finding.text
        for finding in findings(results(training=rows(100, accuracy=0.95), config=config, data={"train": train}))
        if finding.section == "Training against held-out"
    ]
    assert "by heart" not in gap and "seen for the first time" in gap
    few = results(training=rows(5, accuracy=0.875), config={"batch": {"global_batch_size": 8}})
    assert "Training against held-out" not in sections(few)  # one step of 8 pairs


def first(few, number: int):
    """The scores of the first pairs of a set."""
    names = ("ids", "sources", "prompts", "num_tokens", "reward")
    return replace(few, **{name: getattr(few, name)[:number] for name in names})


def test_a_set_of_one_pair_has_no_interval_of_a_yardstick():
    assert "The size of the test set" in sections(results(held_out=first(scores(0.74), 1)))


def test_a_small_set_and_a_judge_that_is_too_sure():
    few = first(scores(0.74), 300)
    found = results(held_out=replace(few, reward=few.reward * 30))
    assert "The size of the test set" in sections(found)
    assert any("too sure" in finding.text for finding in findings(found))


def test_label_noise_is_what_was_flipped():
    rng = np.random.default_rng(0)
    flips = rng.random((2, 100_000)) < 0.1
    assert label_noise(int((flips[0] != flips[1]).sum()), 100_000) == pytest.approx(0.1, abs=0.003)
    assert (label_noise(0, 0), label_noise(5, 5)) == (0.0, 0.5)


def test_every_finding_points_to_a_part_of_the_page(tmp_path):
    parts = [line.removeprefix("## ") for line in PAGE.read_text().splitlines() if line.startswith("## ")]
    source = (Path(findings.__code__.co_filename)).read_text()
    named = {part for part in parts if f'"{part}"' in source}
    assert named == set(parts) - {"If nothing of this is it"}
    assert Finding._fields == ("section", "text")
    page = write_report(write_run(tmp_path / "run")).read_text()
    assert "What may hold the accuracy down" in page and "launch/accuracy.md" in page
