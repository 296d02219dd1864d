"""Comparisons of the answers of a group."""

from itertools import combinations, pairwise, permutations

from hypothesis import given
from hypothesis import strategies as st

from hafrm_ds.data.comparisons import Comparison, is_order


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)).filter(lambda each: each[0] != each[1]), max_size=9))
def test_comparisons_are_an_order_if_any_permutation_satisfies_them_all(edges):
    satisfied = any(
        all(order.index(better) < order.index(worse) for better, worse in edges) for order in permutations(range(5))
    )
    assert is_order(5, edges) == satisfied
    assert is_order(5, [Comparison(*edge) for edge in edges]) == satisfied


def test_an_order_of_many_answers_and_one_comparison_against_it():
    places = [7 * place % 40 for place in range(40)]
    order = list(combinations(places, 2))
    assert is_order(40, order) and is_order(40, pairwise(places))
    assert not is_order(40, [*order, (places[-1], places[0])])
    assert not is_order(40, [*pairwise(places), (places[-1], places[0])])
    assert not is_order(2, [(0, 1), (1, 0)]) and is_order(3, [])
