"""How judges order groups, against loops over the answers as the definitions have them."""

import itertools
import math
import time

import numpy as np
import pytest

from hafrm_ds.evaluation.analysis import analyse
from hafrm_ds.evaluation.order import GoldOrder, leads, ndcg, tau_b, top_1
from tests.evaluation.groups import group_scores, rated_groups


def naive_tau(gold: list[float], judged: list[float]) -> float:
    same = other = gold_apart = judged_apart = 0
    for i, j in itertools.combinations(range(len(gold)), 2):
        by_gold, by_judge = gold[i] - gold[j], judged[i] - judged[j]
        same += by_gold * by_judge > 0
        other += by_gold * by_judge < 0
        gold_apart += by_gold != 0
        judged_apart += by_judge != 0
    return (same - other) / math.sqrt(gold_apart * judged_apart) if judged_apart else 0.0


def naive_top(gold: list[float], judged: list[float]) -> float:
    chosen = [place for place, value in enumerate(judged) if value == max(judged)]
    return sum(gold[place] == max(gold) for place in chosen) / len(chosen)


def naive_ndcg(gold: list[float], judged: list[float]) -> float:
    """The mean over all orders that the judge's values allow."""
    n = len(gold)
    gain = [sum(x > y for y in gold) - sum(x < y for y in gold) for x in gold]
    gain = [each - min(gain) for each in gain]

    def dcg(order: tuple[int, ...]) -> float:
        return sum(gain[place] / math.log2(2 + k) for k, place in enumerate(order))

    allowed = [
        order
        for order in itertools.permutations(range(n))
        if all(judged[one] >= judged[next_one] for one, next_one in itertools.pairwise(order))
    ]
    return float(np.mean([dcg(order) for order in allowed])) / max(map(dcg, itertools.permutations(range(n))))


@pytest.fixture(scope="module")
def drawn():
    """Groups of 2 to 6 answers with gold scores and a judge's, both with ties."""
    source = np.random.default_rng(0)
    groups = []
    while len(groups) < 60:
        size = source.integers(2, 7)
        gold, judged = source.integers(0, 4, size=size).tolist(), source.integers(0, 4, size=size).tolist()
        if len(set(gold)) > 1:
            groups.append((gold, judged))
    return groups


@pytest.mark.parametrize("ranking", ["all", "adjacent"])
def test_every_measure_is_what_its_definition_says(drawn, ranking):
    scores = rated_groups([gold for gold, _ in drawn], [judged for _, judged in drawn], ranking)
    order = GoldOrder.of(scores)
    found = order.measures("reward")
    # The measures stand by size: a group's prompt is its number.
    numbers = [int(prompt) for prompt in order.prompts]
    assert sorted(numbers) == list(range(len(drawn)))
    for name, naive in (("tau_b", naive_tau), ("top_1", naive_top), ("ndcg", naive_ndcg)):
        np.testing.assert_allclose(found[name], [naive(*drawn[number]) for number in numbers], atol=1e-12, err_msg=name)


def test_a_judge_that_ties_all_answers_is_as_good_as_chance():
    lead, values = np.array([[2, 0, -2]]), np.zeros((1, 3))
    assert (tau_b(lead, values), top_1(lead, values)) == (0.0, pytest.approx(1 / 3))
    chance = np.mean([1, 1 / math.log2(3), 1 / 2]) * (4 + 2)
    assert ndcg(lead, values) == pytest.approx(chance / (4 + 2 / math.log2(3)))


def beats(size: int, *won: tuple[int, int]) -> np.ndarray:
    found = np.zeros((1, size, size), dtype=bool)
    for better, worse in won:
        found[0, better, worse] = True
    return found


def test_wins_count_along_chains_and_in_a_cycle_as_they_stand():
    assert leads(beats(5, (0, 1), (1, 2), (2, 3), (3, 4))).tolist() == [[4, 2, 0, -2, -4]]
    # Of neighbouring levels {0}, {1}, {2, 3, 4} the direct wins alone would put 1 above 0.
    assert leads(beats(5, (0, 1), (1, 2), (1, 3), (1, 4))).tolist() == [[4, 2, -2, -2, -2]]
    assert leads(beats(4, (0, 1), (1, 2), (2, 0), (0, 3))).tolist() == [[1, 0, 0, -1]]
    assert leads(beats(2, (0, 1), (1, 0))).tolist() == [[0, 0]]


def test_ranks_are_shared_by_ties_and_groups_without_an_order_are_left_out():
    cycle = [(0, 1), (1, 2), (2, 0)]
    ranked = [(0, 2), (0, 1), (3, 1), (3, 2)]
    values = np.array([3.0, 2.0, 1.0, 4.0])
    scores = group_scores([(cycle, values), (ranked, values)])
    order = GoldOrder.of(scores)
    assert order.prompts == ["1"] and order.measures("reward")["tau_b"] == pytest.approx(4 / math.sqrt(4 * 6))
    assert order.rank.tolist() == [0, 0, 0] + [0, 2, 2, 0]
    assert GoldOrder.of(group_scores([(cycle, values)])) is None
    assert GoldOrder.of(group_scores([([(0, 1)], values), ([(1, 0)], values)])) is None  # pairs


def test_evaluation_json_says_it_of_every_judge_with_intervals(drawn):
    gold, judged = zip(*drawn)
    scores = rated_groups(gold, judged)
    found = analyse(scores)
    assert (found["groups"], found["answers"]) == (60, sum(map(len, gold)))
    assert found["prompts"] == 60 and found["pairs"] == len(scores)
    for name, naive in (("tau_b", naive_tau), ("top_1", naive_top), ("ndcg", naive_ndcg)):
        estimate = found["ranking"]["reward"][name]
        assert estimate["value"] == pytest.approx(np.mean([naive(*each) for each in drawn]))
        assert estimate["low"] < estimate["value"] < estimate["high"]
    perfect = analyse(rated_groups(gold, gold))["ranking"]["reward"]
    assert {name: each["value"] for name, each in perfect.items()} == pytest.approx(dict.fromkeys(perfect, 1.0))
    assert perfect["top_1"]["low"] == pytest.approx(0.025 ** (1 / 60))


def test_ten_thousand_groups_take_a_moment():
    source = np.random.default_rng(0)
    scores = rated_groups(source.permuted(np.tile(np.arange(4), (10_000, 1)), axis=1), source.normal(size=(10_000, 4)))
    started = time.process_time()
    order = GoldOrder.of(scores)
    order.measures("reward")
    assert time.process_time() - started < 2
