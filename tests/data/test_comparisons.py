"""Comparisons of groups: whether they are an order, and as columns and tensors of groups one after another."""

from itertools import combinations, pairwise, permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hafrm_ds.data.comparisons import Comparisons, ComparisonTable, is_order, is_whole_order
from hafrm_ds.data.pairs import OF_A_PAIR, Comparison

THREE = (3, [Comparison(2, 0, 0.5), Comparison(2, 1, weight=3.0), Comparison(0, 1, target=0.75, weight=0.5)])


def test_groups_that_follow_one_another_by_hand():
    both = Comparisons.of([(2, OF_A_PAIR), THREE, (2, [Comparison(1, 0, -1.0)])])
    assert both.better.tolist() == [0, 4, 4, 2, 6]
    assert both.worse.tolist() == [1, 2, 3, 3, 5]
    assert both.group.tolist() == [0, 1, 1, 1, 2]
    assert both.share.tolist() == pytest.approx([1, 1 / 4.5, 3 / 4.5, 0.5 / 4.5, 1])
    assert both.target.tolist() == [1, 1, 1, 0.75, 1]
    assert both.margin.tolist() == [0, 0.5, 0, 0, -1]
    assert both.num_groups == 3
    assert {each.dtype for each in (both.better, both.worse, both.group)} == {torch.int64}
    assert {each.dtype for each in (both.share, both.target, both.margin)} == {torch.float32}


def test_pairs_have_one_comparison_each_that_counts_whole():
    pairs = Comparisons.of([(2, OF_A_PAIR)] * 3)
    assert (pairs.better.tolist(), pairs.worse.tolist()) == ([0, 2, 4], [1, 3, 5])
    assert pairs.share.tolist() == pairs.target.tolist() == [1, 1, 1]


def test_differences_and_their_mean_over_each_group():
    comparisons = Comparisons.of([THREE, (2, OF_A_PAIR)])
    difference = comparisons.difference(torch.tensor([1.0, 2, 4, 10, 3]))
    assert difference.tolist() == [3, 2, -1, 7]
    assert comparisons.mean(difference).tolist() == pytest.approx([(3 + 3 * 2 - 0.5) / 4.5, 7])


def test_answers_with_other_positions():
    assert Comparison(4, 1, 0.5, 0.75, 2.0).among({1: 0, 3: 1, 4: 2}) == Comparison(2, 0, 0.5, 0.75, 2.0)


def test_columns_give_their_rows_back():
    rows = (Comparison(2, 0, 0.5), Comparison(1, 0, None, 0.75, 2.0), Comparison(0, 3, -1.0))
    better, worse, margin, target, weight = zip(*rows, strict=True)
    table = ComparisonTable(
        np.array(better, np.int32),
        np.array(worse, np.int32),
        *(np.array(column, np.float32) for column in (margin, target, weight)),
    )
    assert table.rows() == rows
    assert table.take(slice(1, 2)).rows() == rows[1:2]
    assert table.take(np.array([2, 0])).rows() == (rows[2], rows[0])


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)).filter(lambda each: each[0] != each[1]), max_size=9))
def test_comparisons_are_an_order_if_any_permutation_satisfies_them_all(edges):
    satisfied = any(
        all(order.index(better) < order.index(worse) for better, worse in edges) for order in permutations(range(5))
    )
    assert is_order(5, edges) == satisfied
    assert is_order(5, [Comparison(*edge) for edge in edges]) == satisfied


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)).filter(lambda each: each[0] != each[1]), max_size=8))
def test_a_whole_order_lacks_nothing_that_its_comparisons_imply(edges):
    implied = {(a, c) for a, b in edges for other, c in edges if b == other}
    is_whole = len({*edges}) == len(edges) and implied <= {*edges}
    assert is_whole_order(4, edges) == (is_whole and is_order(4, edges))


def test_an_order_of_many_answers_and_one_comparison_against_it():
    places = [7 * place % 40 for place in range(40)]
    order = list(combinations(places, 2))
    assert is_order(40, order) and is_order(40, pairwise(places))
    assert not is_order(40, [*order, (places[-1], places[0])])
    assert not is_order(40, [*pairwise(places), (places[-1], places[0])])
    assert not is_order(2, [(0, 1), (1, 0)]) and is_order(3, [])
