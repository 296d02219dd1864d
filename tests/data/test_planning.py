import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hafrm_ds.data.planning import (
    DUMMY,
    BatchPlan,
    check_budget,
    imbalance,
    occupied,
    partition_by_length,
    partition_into_micro_batches,
)
from hafrm_ds.errors import DataError


def test_every_pair_is_used_once_a_pass_and_passes_differ():
    plan = BatchPlan(num_groups=10, global_batch_size=4, seed=3)
    stream = np.concatenate([plan.global_batch(step) for step in range(5)])
    first, second = stream[:10], stream[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert list(first) != list(second)


def test_order_depends_on_the_seed_alone():
    batches = [BatchPlan(1000, 16, seed).global_batch(7).tolist() for seed in (1, 1, 2)]
    assert batches[0] == batches[1] != batches[2]


def test_a_global_batch_larger_than_the_set_spans_several_passes():
    batch = BatchPlan(num_groups=3, global_batch_size=7, seed=0).global_batch(0)
    assert np.bincount(batch).tolist() in ([3, 2, 2], [2, 3, 2], [2, 2, 3])


def test_groups_until_are_those_of_the_batches():
    plan = BatchPlan(num_groups=100, global_batch_size=8, seed=5)
    used = np.unique(np.concatenate([plan.global_batch(step) for step in range(6)]))
    assert plan.groups_until(6).tolist() == used.tolist()
    assert plan.groups_until(13).tolist() == list(range(100))


def partition_by_squares(costs, num_ranks, max_tokens, rows):
    """Work that grows faster than tokens, as that of attention. It needs no more micro-batches; by luck, fewer."""
    ranks = partition_into_micro_batches(costs, num_ranks, max_tokens, rows, costs**2)
    assert len(ranks[0]) <= len(partition_into_micro_batches(costs, num_ranks, max_tokens, rows)[0])
    return ranks


@given(
    widths=st.lists(st.integers(1, 100), min_size=1, max_size=60),
    num_responses=st.sampled_from([[1], [2], [1, 2]]),
    is_padded=st.booleans(),
    num_ranks=st.integers(1, 9),
    max_tokens=st.integers(200, 800),
)
@settings(max_examples=200, deadline=None)
@pytest.mark.parametrize("cut", [partition_into_micro_batches, partition_by_length, partition_by_squares])
def test_cuts_hold_every_pair_once_within_the_budget_and_equally_often_on_all_ranks(
    cut, widths, num_responses, is_padded, num_ranks, max_tokens
):
    rows = np.resize(num_responses, len(widths))
    ranks = cut(rows * widths, num_ranks, max_tokens, rows if is_padded else None)
    assert len(ranks) == num_ranks
    assert len({len(batches) for batches in ranks}) == 1
    real = [batch for batches in ranks for batch in batches if batch != [DUMMY]]
    assert sorted(pair for batch in real for pair in batch) == list(range(len(widths)))
    for batch in real:
        lengths = [widths[pair] for pair in batch for _ in range(rows[pair])]
        assert (len(lengths) * max(lengths) if is_padded else sum(lengths)) <= max_tokens


def test_micro_batches_are_balanced_and_few():
    costs = np.random.default_rng(0).integers(50, 500, size=128)
    ranks = partition_into_micro_batches(costs, 8, max_tokens=2048)
    loads = np.array([[costs[batch].sum() for batch in batches] for batches in ranks])
    assert loads.shape[1] == -(-costs.sum() // (8 * 2048))
    assert loads.sum(1).max() < 1.05 * loads.sum(1).mean()


@pytest.mark.parametrize("max_tokens", [100_000, 5000])
def test_work_is_balanced_where_it_is_not_the_tokens(max_tokens):
    """Each of them waits less than by tokens alone, also where the budget leaves little room."""
    source = np.random.default_rng(0)
    costs = source.integers(50, 1000, size=128)
    work = costs * source.uniform(1.0, 4.0, size=128)
    by_tokens, by_work = (partition_into_micro_batches(costs, 4, max_tokens, work=given) for given in (None, work))
    assert occupied(costs, [part for own in by_work for part in own]).max() <= max_tokens
    assert imbalance(work, by_work) < 0.01 < imbalance(work, by_tokens)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_padded_micro_batches_are_as_even_as_rows_of_similar_width_can_be(seed, num_ranks):
    """The largest of them against that of every way to cut the sorted pairs into as many."""
    lengths = np.sort(np.random.default_rng(seed).integers(5, 100, size=9))
    ranks = partition_into_micro_batches(2 * lengths, num_ranks, 400, np.full(9, 2))
    num_batches = num_ranks * len(ranks[0])

    def largest(batches: list[np.ndarray]) -> int:
        return max(2 * len(batch) * batch.max() for batch in batches)

    def naive(number: int) -> int:
        return min(largest(np.split(lengths, cuts)) for cuts in itertools.combinations(range(1, 9), number - 1))

    ours = [lengths[batch] for batches in ranks for batch in batches if batch != [DUMMY]]
    assert largest(ours) == naive(num_batches)
    assert num_batches == num_ranks or naive(num_batches - num_ranks) > 400, "fewer would have done"


def test_imbalance_is_the_share_of_time_that_ranks_wait():
    costs = np.array([10, 10, 30, 20])
    assert imbalance(costs, [[[0]], [[1]]]) == 0
    # Micro-batch 1: 10 and 30 tokens, micro-batch 2: 20 and nothing. 60 of 2 * (30 + 20) are used.
    assert imbalance(costs, [[[0], [3]], [[2], [DUMMY]]]) == pytest.approx(0.4)
    # Two padded rows each: 2 rows of 15 against 4 of 5, then 2 of 10 against nothing. 70 of 2 * (30 + 20).
    assert imbalance(costs, [[[2], [3]], [[0, 1], [DUMMY]]], np.full(4, 2)) == pytest.approx(0.3)


def test_a_pair_above_the_budget_is_named():
    with pytest.raises(DataError, match=r"1 of 3 pairs.*b.jsonl:2 \(900 tokens\).*max_tokens_per_micro_batch to 900"):
        check_budget(np.array([10, 900, 20]), 512, ["b.jsonl:1", "b.jsonl:2", "b.jsonl:3"], "pairs")
