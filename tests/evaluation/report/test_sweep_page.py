"""The page of a sweep: curves over every number that was varied, from planted gains."""

import re

import pytest

from hafrm_ds.evaluation.comparison_tables import gain_table
from hafrm_ds.evaluation.report.sweep_page import entries_of, gain, gain_charts, panels_over
from hafrm_ds.evaluation.report.writing import write_report
from hafrm_ds.training.sweep import Arm
from tests.evaluation.report.folders import write_sweep

SHARES_AND_SIZES = {
    "objective.policy_share": [0, 0.5, 0.9, 1],
    "data.train.portion": [":80", ":320"],
    "model.reward_head_init": ["normal", "from_model"],
}


def planted(arm: Arm, judge: str) -> float:
    """Baseline 0.6 and 0.7 of the sizes; the share of HaF adds a tenth of it, and its implicit reward five points."""
    (labels, *_) = arm.cells.values()
    base = {"80": 0.6, "320": 0.7}[labels["pairs"]]
    if arm.kind == "dpo":
        return base + 0.02
    return base + 0.1 * float(labels.get("share", 0)) + (0.05 if judge == "implicit" else 0)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return write_sweep(tmp_path_factory.mktemp("sweep"), SHARES_AND_SIZES, planted)


def values(results: dict, line: list, judge: str = "reward") -> list[tuple[float, float]]:
    return [(number, round(gain(results, entry, judge, "near")["value"], 4)) for number, entry in line]


def test_a_share_ends_at_baseline_and_dpo_with_a_line_for_each_size(results):
    panels = panels_over(results, entries_of(results), "share")
    assert list(panels) == ["reward-head-init normal", "reward-head-init from_model"]
    for lines in panels.values():
        assert list(lines) == ["pairs 80", "pairs 320"]
        for line in lines.values():
            assert values(results, line) == [(0, 0), (0.5, 0.05), (0.9, 0.09), (1, 0.02)]
            assert values(results, line, "implicit") == [(0, 0), (0.5, 0.1), (0.9, 0.14), (1, 0.02)]


def test_a_size_has_a_line_for_each_method_against_the_baseline_of_its_size(results):
    panels = panels_over(results, entries_of(results), "pairs")
    assert list(panels) == ["reward-head-init normal", "reward-head-init from_model"]
    for lines in panels.values():
        assert {label: values(results, line) for label, line in lines.items()} == {
            "DPO": [(80, 0.02), (320, 0.02)],
            "HaF share 0.5": [(80, 0.05), (320, 0.05)],
            "HaF share 0.9": [(80, 0.09), (320, 0.09)],
        }


def test_every_number_has_charts_for_each_judge_and_texts_none(results):
    found = dict(gain_charts(results, ["near", "far"]))
    assert list(found) == [
        f"{judge}: gain over Baseline by {axis}"
        for judge in ("Reward head", "Implicit reward")
        for axis in ("share", "pairs")
    ]
    charts = found["Reward head: gain over Baseline by share"]
    assert [chart.title for chart in charts] == [
        f"{name} · reward-head-init {start}" for start in ("normal", "from_model") for name in ("near", "far")
    ]
    assert "pairs 80: 0% at 0, 5% at 0.5, 9% at 0.9, 2% at 1" in charts[0].svg
    assert [key.label for key in charts[0].legend] == ["pairs 80", "pairs 320"]


def test_alphas_begin_at_baseline_and_rates_have_methods(tmp_path):
    def right(arm: Arm, judge: str) -> float:
        (labels, *_) = arm.cells.values()
        return 0.6 + 0.01 * float(labels.get("alpha", 0)) + (0.1 if arm.kind == "dpo" else 0)

    sweep = {"objective.alpha": [1, 5], "optimizer.reward_head_learning_rate": [1e-4, 1e-3]}
    results = write_sweep(tmp_path, sweep, right)
    lines = panels_over(results, entries_of(results), "alpha")[""]
    assert {label: values(results, line) for label, line in lines.items()} == {
        f"head-lr {rate}": [(0, 0), (1, 0.01), (5, 0.05)] for rate in ("0.0001", "0.001")
    }
    lines = panels_over(results, entries_of(results), "head-lr")[""]
    assert list(lines) == ["DPO", "HaF alpha 1", "HaF alpha 5"]
    assert values(results, lines["DPO"]) == [(1e-4, 0.1), (1e-3, 0.1)]  # one training, against either Baseline
    rows = dict(gain_table(results, ["near"], "gains").rows)
    assert rows["baseline-head-lr0.001, reward head"][0].text == "60.0%"
    assert "dpo, implicit reward (against baseline-head-lr0.001)" in rows
    assert rows["haf-alpha5-head-lr0.001, reward head"][0].text.startswith("+5.0 [")
    assert rows["haf-alpha5-head-lr0.001, reward head"][0].detail.startswith("65.0%, ")


def test_methods_that_feel_the_same_number_have_a_line_each(tmp_path):
    sweep = {"objective.beta": [0.05, 0.5], "epochs": [1, 4]}
    results = write_sweep(tmp_path, sweep, lambda arm, judge: 0.7 if arm.kind == "dpo" else 0.6)
    lines = panels_over(results, entries_of(results), "beta")[""]
    assert {label: values(results, line) for label, line in lines.items()} == {
        f"{kind} epochs {epochs}": [(0.05, gained), (0.5, gained)]
        for epochs in (1, 4)
        for kind, gained in (("DPO", 0.1), ("HaF", 0))
    }


def test_the_page_has_curves_and_a_table_and_no_runs(tmp_path):
    write_sweep(tmp_path, {"objective.policy_share": [0.5], "data.train.portion": [":80", ":320"]}, planted)
    page = write_report(tmp_path).read_text()
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))
    assert "4 methods, 3 seeds" in text and "share: 0.5 · pairs: 80, 320" in text
    assert "Reward head: gain over Baseline by pairs" in text and "by share" not in text
    assert "+5.0 [" in text and "Overview" not in text and page.count("<svg class=") == 2 * 2
