"""The rules of RewardBench 2 on cases worked by hand."""

import math

import pytest

from tests.evaluation.benchmarks.rows import rewardbench2_row, summary

BEST_OF_FOUR = ("Factuality", "Precise IF", "Math", "Safety", "Focus")


def scored(folder, questions):
    """[(row, rewards)] -> result."""
    return summary("rewardbench2", folder, *zip(*questions))


def ties_of(folder, questions):
    """{id: (rewards of right answers, rewards of wrong answers)} -> result of the subset Ties."""
    rows = [
        (rewardbench2_row("Ties", len(right), len(wrong), id=key), [*right, *wrong])
        for key, (right, wrong) in questions.items()
    ]
    return scored(folder, rows)["categories"]["Ties"]


def test_a_shared_maximum_counts_by_the_answers_that_share_it(tmp_path):
    rewards = [
        [3, 2, 1, 0],  # 1
        [3, 3, 1, 0],  # 1/2
        [3, 3, 3, 3],  # 1/4
        [2, 3, 3, 0],  # 0, though the maximum is shared
        [2, 2, 3, 0],  # 0
    ]
    result = scored(tmp_path, [(rewardbench2_row("Focus"), values) for values in rewards])
    focus = result["categories"]["Focus"]
    assert (focus["score"], focus["questions"], focus["ties"]) == (1.75 / 5, 5, 2)
    assert result["score"] is None and "Focus" not in result["missing"] and len(result["missing"]) == 5


def test_the_score_of_ties(tmp_path):
    result = ties_of(
        tmp_path,
        {
            # gap 2, spread 1; ref: gap 3, so the smaller is 2
            "tied:0": ([6, 5], [3, 1]),
            "ref:0": ([5], [2, 1]),
            # gap 1, spread 4; ref: gap -1
            "tied:1": ([9, 6, 5], [4]),
            "ref:1": ([1], [2]),
            # gap 3, spread 2; ref: gap 1
            "tied:2": ([8, 6], [3]),
            "ref:2": ([2], [1]),
            # gap 0, a tie; no ref of that number
            "tied:3": ([2, 4], [2]),
        },
    )
    assert result["details"] == pytest.approx(
        {
            "tied right": 3 / 4,
            "ref right": 2 / 3,
            "gap above spread": 2 / 3,  # 0 and 2
            "both gaps above spread": 1 / 3,  # 0 alone
            "margin": (math.tanh(2 / 1 - 1) + math.tanh(-1 / 4 - 1) + math.tanh(1 / 2 - 1)) / 3,
        }
    )
    margin = (math.tanh(1) - math.tanh(1.25) - math.tanh(0.5)) / 3
    assert result["score"] == pytest.approx(0.3 * 3 / 4 + 0.3 * 2 / 3 + 0.2 * 2 / 3 + 0.2 * 1 / 3 + 0.01 * margin)
    assert (result["questions"], result["ties"]) == (7, 1)


@pytest.mark.parametrize(("wrong", "margin", "score"), [(1, 1, 1.01), (3, -1, -0.01), (2, 0, 0)])
def test_equal_rewards_of_all_right_answers(tmp_path, wrong, margin, score):
    result = ties_of(tmp_path, {"tied:4": ([2, 2], [wrong]), "ref:4": ([2], [wrong])})
    assert result["details"]["margin"] == margin
    assert result["score"] == pytest.approx(score)


def test_ties_without_their_twins_have_no_score(tmp_path):
    result = ties_of(tmp_path, {"tied:1": ([3, 2], [1]), "ref:2": ([2], [1])})
    assert (result["score"], result["missing"], result["questions"]) == (None, ["Ties"], 2)


def test_the_whole_is_the_mean_of_six(tmp_path):
    questions = [(rewardbench2_row(subset), [1, 0, 0, 0]) for subset in BEST_OF_FOUR[:3]]
    questions += [(rewardbench2_row(subset), [0, 0, 1, 0]) for subset in BEST_OF_FOUR[3:]] * 5
    questions += [(rewardbench2_row("ties", 2, 1, id="tied:1"), [2, 2, 1])]
    questions += [(rewardbench2_row("ties", 1, 1, id="ref:1"), [2, 1])]
    result = scored(tmp_path, questions)
    assert result["score"] == pytest.approx((3 + 1.01) / 6)
    assert (result["missing"], result["details"], result["questions"]) == ([], {}, 15)
