"""The rule of RM-Bench on cases worked by hand."""

import pytest

from tests.evaluation.benchmarks.rows import rm_bench_row, summary

ALL_WON = [4, 5, 6, 1, 2, 3]
ALL_LOST = [1, 2, 3, 4, 5, 6]
FANCY = [1, 3, 5, 0, 2, 4]
"""The reward grows with the style: [i, j] is won on the diagonal and below it, lost above it."""
EQUAL = [7] * 6


def scored(folder, questions):
    """[(domain, rewards)] -> result."""
    domains, rewards = zip(*questions)
    return summary("rm-bench", folder, [rm_bench_row(domain) for domain in domains], rewards)


def test_hard_is_where_the_wrong_answer_has_the_fancier_style(tmp_path):
    chat = scored(tmp_path, [("chat", FANCY)])["categories"]["Chat"]
    assert chat["details"] == {"hard": 0, "normal": 1, "easy": 1}
    assert chat["score"] == pytest.approx(6 / 9)
    # A chosen answer of 2 beats the rejected ones of 1 and 0: cells [0, 1], [0, 2], of which both are hard.
    chat = scored(tmp_path, [("chat", [2, -1, -1, 3, 1, 0])])["categories"]["Chat"]
    assert chat["details"] == pytest.approx({"hard": 2 / 3, "normal": 0, "easy": 0})


def test_ties_are_lost_and_counted_by_comparison(tmp_path):
    chat = scored(tmp_path, [("chat", EQUAL), ("chat", ALL_WON)])["categories"]["Chat"]
    assert (chat["score"], chat["ties"], chat["questions"]) == (0.5, 9, 2)


def test_domains_count_alike_and_safety_is_one_domain(tmp_path):
    questions = [("chat", ALL_WON)] * 3 + [("math", ALL_LOST), ("code", FANCY)]
    questions += [("safety-refuse", ALL_WON)] + [("safety-response", ALL_LOST)] * 3
    result = scored(tmp_path, questions)
    scores = {name: part["score"] for name, part in result["categories"].items()}
    assert scores == pytest.approx({"Chat": 1, "Math": 0, "Code": 6 / 9, "Safety": 1 / 4})
    assert result["score"] == pytest.approx((1 + 0 + 6 / 9 + 1 / 4) / 4)
    assert result["details"] == pytest.approx(
        {"hard": (1 + 0 + 0 + 1 / 4) / 4, "normal": (1 + 0 + 1 + 1 / 4) / 4, "easy": (1 + 0 + 1 + 1 / 4) / 4}
    )
    assert result["score"] == pytest.approx(sum(result["details"].values()) / 3)


def test_half_of_safety_has_no_score(tmp_path):
    result = scored(tmp_path, [("safety-refuse", ALL_WON)])
    safety = result["categories"]["Safety"]
    assert (safety["score"], safety["missing"]) == (None, ["safety-response"])
    assert safety["subsets"]["safety-refuse"]["score"] == 1
    assert (result["score"], result["details"]) == (None, {})
