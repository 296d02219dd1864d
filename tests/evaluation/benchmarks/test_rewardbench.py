"""The rule of RewardBench 1 on cases worked by hand."""

import pytest

from hafrm_ds.evaluation.benchmarks.rewardbench import PRIOR, SECTIONS
from tests.evaluation.benchmarks.rows import rewardbench_row, summary

WON, TIE, LOST = [2.0, 1.0], [1.0, 1.0], [0.0, 1.0]
CORE = [subset for subsets in SECTIONS.values() for subset in subsets]


def scored(folder, outcomes):
    """Outcomes of the pairs of each subset -> result."""
    pairs = [(rewardbench_row(subset), rewards) for subset, of_subset in outcomes.items() for rewards in of_subset]
    return summary("rewardbench", folder, *zip(*pairs))


def test_the_weights_are_those_of_the_benchmark():
    counts = {section: sum(subsets.values()) for section, subsets in SECTIONS.items()}
    assert counts == {"Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 984 + 984}
    assert len(CORE) == 23 and sum(counts.values()) - 984 + 447 == 2985  # pairs of the split `filtered`


def test_subsets_count_by_their_published_sizes_and_ties_are_lost(tmp_path):
    outcomes = {subset: [LOST] for subset in CORE}
    outcomes["alpacaeval-easy"] = [WON]
    outcomes["mt-bench-med"] = [WON, TIE, TIE, LOST]
    outcomes["math-prm"] = [WON]
    outcomes["hep-rust"] = [WON, LOST]
    result = scored(tmp_path, outcomes)
    score = {name: part["score"] for name, part in result["categories"].items()}
    assert score["Chat"] == pytest.approx((100 + 0.25 * 40) / 358)
    assert score["Chat Hard"] == score["Safety"] == 0
    assert score["Reasoning"] == pytest.approx(0.5 + 0.5 * 164 / 1968)
    assert result["score"] == pytest.approx((score["Chat"] + score["Reasoning"]) / 4)
    assert (result["questions"], result["ties"], result["missing"]) == (27, 2, [])
    med = result["categories"]["Chat"]["subsets"]["mt-bench-med"]
    assert (med["score"], med["questions"], med["ties"]) == (0.25, 4, 2)


def test_the_prior_sets_count_half(tmp_path):
    outcomes = {subset: [LOST] for subset in CORE} | {subset: [LOST] for subset in PRIOR}
    outcomes |= {subset: [WON] for subset in SECTIONS["Safety"]} | {"shp": [WON, WON, LOST, TIE]}
    result = scored(tmp_path, outcomes)
    assert result["categories"]["Prior Sets"]["score"] == 0.5 / 4
    assert result["score"] == pytest.approx((1 + 0.5 * 0.5 / 4) / 4.5)


def test_a_part_has_no_score_where_something_is_missing(tmp_path):
    result = scored(tmp_path, {subset: [WON] for subset in [*SECTIONS["Chat"], "hep-go"]})
    assert result["score"] is None
    assert result["missing"] == ["Chat Hard", "Safety", "Reasoning"]
    assert result["categories"]["Chat"]["score"] == 1
    reasoning = result["categories"]["Reasoning"]
    assert (reasoning["score"], reasoning["questions"], reasoning["subsets"]["hep-go"]["score"]) == (None, 1, 1)
    assert reasoning["missing"] == [subset for subset in SECTIONS["Reasoning"] if subset != "hep-go"]
