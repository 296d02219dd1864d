"""Lengths of many groups in flat arrays, against the groups themselves."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hafrm_ds.data.lengths import GroupLengths, places_of, starts_of
from hafrm_ds.data.packing import PackedBatch, lay_out
from hafrm_ds.data.tokenization import PromptWithResponses

LAYOUTS = ("shared_prefix", "packed", "padded")
GROUPS = st.lists(st.tuples(st.integers(1, 20), st.lists(st.integers(1, 30), min_size=1, max_size=6)), max_size=8)


def lengths_of(groups: list[tuple[int, list[int]]]) -> GroupLengths:
    return GroupLengths(
        np.array([prompt for prompt, _ in groups], dtype=np.int64),
        np.array([length for _, responses in groups for length in responses], dtype=np.int64),
        starts_of(np.array([len(responses) for _, responses in groups], dtype=np.int64)),
    )


def visible_keys(batch: PackedBatch) -> int:
    """Counted token by token."""
    lengths = [*zip(batch.segments.q_lengths, batch.segments.k_lengths)] if batch.segments else None
    rows = [(length, length) for length in batch.row_lengths or ()]
    return sum(k - q + token + 1 for q, k in lengths or rows for token in range(q))


@given(groups=GROUPS)
@settings(max_examples=50, deadline=None)
def test_counts_and_costs_are_those_of_what_is_laid_out(groups):
    lengths = lengths_of(groups)
    assert len(lengths) == len(groups)
    assert lengths.num_responses.tolist() == [len(responses) for _, responses in groups]
    assert lengths.all_responses.tolist() == [sum(responses) for _, responses in groups]
    assert lengths.longest_response.tolist() == [max(responses) for _, responses in groups]
    assert lengths.longest_conversation.tolist() == [prompt + max(responses) for prompt, responses in groups]
    for layout in LAYOUTS:
        items = [PromptWithResponses([1] * prompt, tuple([1] * n for n in responses)) for prompt, responses in groups]
        batches = [lay_out([item], layout) for item in items]
        assert lengths.costs(layout).tolist() == [batch.input_ids.numel() for batch in batches]
        assert lengths.visible_keys(layout).tolist() == [visible_keys(batch) for batch in batches]


@given(groups=GROUPS, data=st.data())
@settings(max_examples=50, deadline=None)
def test_some_groups_in_any_order(groups, data):
    index = data.draw(st.lists(st.integers(0, len(groups) - 1), max_size=10) if groups else st.just([]))
    taken, expected = lengths_of(groups).take(np.array(index, dtype=np.int64)), lengths_of([groups[i] for i in index])
    for name in ("prompt", "response", "first"):
        assert getattr(taken, name).tolist() == getattr(expected, name).tolist()


@given(sets=st.lists(GROUPS, max_size=4))
@settings(max_examples=50, deadline=None)
def test_several_sets_one_after_another(sets):
    joined = GroupLengths.joined(map(lengths_of, sets))
    expected = lengths_of([group for groups in sets for group in groups])
    for name in ("prompt", "response", "first"):
        assert getattr(joined, name).tolist() == getattr(expected, name).tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pairs_are_groups_of_two(layout):
    pairs = GroupLengths.of_pairs(np.array([5, 1]), np.array([2, 3]), np.array([4, 1]))
    assert pairs.costs(layout).tolist() == lengths_of([(5, [2, 4]), (1, [3, 1])]).costs(layout).tolist()


def test_places_of_parts_by_hand():
    first = starts_of(np.array([2, 0, 3, 1]))
    assert first.tolist() == [0, 2, 2, 5, 6]
    assert places_of(first, np.array([2, 0, 1, 2])).tolist() == [2, 3, 4, 0, 1, 2, 3, 4]
    assert places_of(first, np.array([], dtype=np.int64)).tolist() == []
