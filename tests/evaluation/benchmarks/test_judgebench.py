"""The rule of JudgeBench on cases worked by hand."""

import pytest

from tests.evaluation.benchmarks.rows import judgebench_row, summary

WON, TIE, LOST = [2.0, 1.0], [1.0, 1.0], [0.0, 1.0]  # of (right, wrong)


def scored(folder, pairs):
    """[(source, rewards)] -> result."""
    sources, rewards = zip(*pairs)
    rows = [judgebench_row(source, "AB"[n % 2] + ">" + "BA"[n % 2]) for n, source in enumerate(sources)]
    return summary("judgebench", folder, rows, rewards)


def test_published_figures_of_a_reward_model(tmp_path):
    """Table 3 of the paper, Skywork-Reward-Gemma-2-27B, by the pairs that it must have won."""
    published = {"Knowledge": 59.74, "Reasoning": 66.33, "Math": 83.93, "Coding": 50.00, "overall": 64.29}
    pairs = [("mmlu-pro-law", WON)] * 50 + [("mmlu-pro-health", WON)] * 42 + [("mmlu-pro-health", LOST)] * 62
    pairs += [("livebench-reasoning", WON)] * 65 + [("livebench-reasoning", LOST)] * 33
    pairs += [("livebench-math", WON)] * 47 + [("livebench-math", LOST)] * 9
    pairs += [("livecodebench", WON)] * 21 + [("livecodebench", LOST)] * 21
    result = scored(tmp_path, pairs)
    found = {name: part["score"] for name, part in result["categories"].items()} | {"overall": result["score"]}
    assert {name: round(100 * score, 2) for name, score in found.items()} == published
    assert result["questions"] == 350
    assert result["categories"]["Knowledge"]["subsets"]["mmlu-pro-law"]["score"] == 1


def test_ties_are_lost_whatever_the_label(tmp_path):
    result = scored(tmp_path, [("livecodebench", TIE), ("livecodebench", TIE), ("livecodebench", WON)])
    coding = result["categories"]["Coding"]
    assert (coding["score"], coding["ties"]) == (pytest.approx(1 / 3), 2)


def test_a_category_without_pairs_leaves_no_overall_score(tmp_path):
    result = scored(tmp_path, [("livecodebench", WON), ("mmlu-pro-law", LOST)])
    assert (result["score"], result["missing"]) == (None, ["Reasoning", "Math"])
    assert result["categories"]["Math"] | {"details": {}} == {
        "score": None,
        "questions": 0,
        "ties": 0,
        "details": {},
        "missing": [],
        "subsets": {},
    }
