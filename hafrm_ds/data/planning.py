"""The batch plan: which groups make an optimizer step, and how a step is partitioned into micro-batches.

The order of groups depends on (number of groups, seed, global batch size) alone, never on the number of ranks: the same
global batches come in the same order on 1 or 1,000 GPUs, and resuming is starting at a step number.

Legend: I items, each a prompt with any number of responses.

Costs are the tokens [I] that items occupy, each by itself. Where rows are padded, `rows` tells how many [I] each has: a
micro-batch occupies all its rows at the width of the widest. Elsewhere `rows` is None, and costs add up.
"""

import heapq
from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from hafrm_ds.errors import DataError

DUMMY = -1
"""Stands for "no group" in a micro-batch: the rank runs a tiny pair of weight 0, as all must run equally often."""


@dataclass(frozen=True)
class BatchPlan:
    """Global batches over repeated passes through `num_groups` groups.

    The passes are laid end to end, each in an order of its own: every group is used once a pass, none is left out at
    the end of a pass, and a global batch may span two passes.
    """

    num_groups: int
    global_batch_size: int
    seed: int

    def permutation(self, epoch: int) -> np.ndarray:
        return pass_order(self.num_groups, self.seed, epoch)

    def global_batch(self, step: int) -> np.ndarray:
        """Indices [global_batch_size] of the groups of optimizer step `step` (from 0)."""
        position, end, parts = step * self.global_batch_size, (step + 1) * self.global_batch_size, []
        while position < end:
            epoch, offset = divmod(position, self.num_groups)
            part = self.permutation(epoch)[offset : offset + end - position]
            parts.append(part)
            position += len(part)
        return np.concatenate(parts)

    def groups_until(self, num_steps: int) -> np.ndarray:
        """Sorted indices of all groups that the first `num_steps` steps use."""
        used = num_steps * self.global_batch_size
        full, rest = divmod(used, self.num_groups)
        return np.arange(self.num_groups) if full else np.sort(self.permutation(0)[:rest])


@lru_cache(maxsize=2)  # asked for at every step, and a step spans two passes at most, as a rule
def pass_order(num_groups: int, seed: int, epoch: int) -> np.ndarray:
    """The order [num_groups] of one pass."""
    return np.random.default_rng((seed, epoch)).permutation(num_groups)


def check_budget(costs: np.ndarray, max_tokens: int, ids, unit: str) -> None:
    """Raise DataError naming the groups that alone exceed the token budget of a micro-batch.

    Args:
        costs: [G] tokens that each group needs in the chosen layout at least.
        ids: sequence of the groups' ids (file and row). unit: what they are called.
    """
    over = np.flatnonzero(costs > max_tokens)
    if len(over):
        worst = over[np.argsort(-costs[over])][:5]
        named = ", ".join(f"{ids[int(index)]} ({costs[index]} tokens)" for index in worst)
        raise DataError(
            f"{len(over)} of {len(costs)} {unit} do not fit in one micro-batch of "
            f"batch.max_tokens_per_micro_batch = {max_tokens} tokens: {named}. "
            f"Raise --batch.max_tokens_per_micro_batch to {costs.max()} or lower --data.max_length."
        )


def partition_into_micro_batches(
    costs: np.ndarray,
    num_ranks: int,
    max_tokens: int,
    rows: np.ndarray | None = None,
    work: np.ndarray | None = None,
) -> list[list[list[int]]]:
    """Cut one batch into num_ranks x n micro-batches of about equal work, with the smallest n that keeps the budget.

    n is the same on all ranks (under ZeRO-3 a rank with fewer forwards hangs the others). Longest-first greedy: each
    item goes to the lightest micro-batch so far. Padded rows stay with those of about their width instead.

    Args:
        costs: none above max_tokens.
        work: [I] what is to be about equal, where that is not the costs. Padded rows are as even as their costs.

    Returns:
        [rank][n] lists of positions into `costs`, each ascending; a micro-batch without items is [DUMMY].
    """
    if rows is None:
        order = np.argsort(-costs, kind="stable")
        n = max(1, -(-int(costs.sum()) // (max_tokens * num_ranks)))

        def packed(num_bins: int) -> list[list[int]] | None:
            by_work = None if work is None else pack_by_work(costs, work, num_bins, max_tokens)
            return by_work or pack(costs, order, num_bins, max_tokens)

        while (bins := packed(num_ranks * n)) is None:
            n += 1
    else:
        n = -(-len(fill(costs, max_tokens, rows)) // num_ranks)
        bins = fill_evenly(costs, num_ranks * n, max_tokens, rows)
    # With the heaviest first, micro-batches that ranks run at once are alike; dealing to and fro evens their totals.
    loads = occupied(costs if work is None or rows is not None else work, bins, rows)
    bins = [bins[place] for place in np.argsort(-loads, kind="stable")]
    ranks: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    for row in range(n):
        dealt = bins[row * num_ranks : (row + 1) * num_ranks]
        for rank, content in enumerate(dealt if row % 2 == 0 else reversed(dealt)):
            ranks[rank].append(sorted(content) or [DUMMY])
    return ranks


def occupied(costs: np.ndarray, parts: list[list[int]], rows: np.ndarray | None = None) -> np.ndarray:
    """Tokens [len(parts)] int64 of micro-batches, with their padding; or of another quantity, of its dtype. DUMMY
    counts nothing."""
    micro_batch = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    item = np.array([place for part in parts for place in part], dtype=np.int64)
    micro_batch, item = micro_batch[item != DUMMY], item[item != DUMMY]
    sums = np.zeros(len(parts), dtype=np.result_type(costs, np.int64))
    widest = np.zeros_like(sums)
    np.add.at(sums, micro_batch, (costs if rows is None else rows)[item])
    if rows is None:
        return sums
    np.maximum.at(widest, micro_batch, costs[item] // rows[item])
    return sums * widest


def imbalance(costs: np.ndarray, ranks: list[list[list[int]]], rows: np.ndarray | None = None) -> float:
    """Share of their time that ranks wait for the one with the most tokens, as they meet after every micro-batch.

    Args:
        costs: or the work of each item, where nothing is padded.
        ranks: as `partition_into_micro_batches` returns it.
    """
    tokens = occupied(costs, [part for own in ranks for part in own], rows).reshape(len(ranks), -1)
    return float(1 - tokens.mean(axis=0).sum() / tokens.max(axis=0).sum())


def pack(costs: np.ndarray, order: np.ndarray, num_bins: int, max_tokens: int) -> list[list[int]] | None:
    """Longest-first greedy packing into `num_bins` lists, or None when one would exceed max_tokens."""
    heap = list(range(num_bins))  # load * num_bins + index of each: whole numbers are compared faster than pairs
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    too_heavy = (max_tokens + 1) * num_bins
    for item, cost in zip(order.tolist(), (costs[order] * num_bins).tolist()):
        lightest = heap[0]
        if lightest + cost >= too_heavy:
            return None
        bins[lightest % num_bins].append(item)
        heapq.heapreplace(heap, lightest + cost)
    return bins


def pack_by_work(costs: np.ndarray, work: np.ndarray, num_bins: int, max_tokens: int) -> list[list[int]] | None:
    """Greedy packing into `num_bins` lists, most work first: each item goes where least is to be done among those that
    have room for its tokens; None when there are none."""
    loads, tokens = np.zeros(num_bins), np.zeros(num_bins, dtype=np.int64)
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    for item in np.argsort(-work, kind="stable").tolist():
        has_room = tokens + costs[item] <= max_tokens
        if not has_room.any():
            return None
        place = int(np.where(has_room, loads, np.inf).argmin())
        bins[place].append(item)
        loads[place] += work[item]
        tokens[place] += costs[item]
    return bins


def fill(costs: np.ndarray, max_tokens: int, rows: np.ndarray | None = None) -> list[list[int]]:
    """Micro-batches of items in descending order of width, each full before the next begins."""
    widths = costs if rows is None else costs // rows
    order = np.argsort(-widths, kind="stable")
    columns = (order, costs[order], widths[order], costs[order] if rows is None else rows[order])
    batches: list[list[int]] = []
    tokens, widest = 0, 1
    for item, cost, width, units in zip(*(column.tolist() for column in columns)):
        tokens += units * widest
        if not batches or tokens > max_tokens:
            batches.append([])
            tokens, widest = cost, 1 if rows is None else width
        batches[-1].append(item)
    return batches


def fill_evenly(costs: np.ndarray, num_bins: int, max_tokens: int, rows: np.ndarray) -> list[list[int]]:
    """`num_bins` lists as `fill` makes them, under the lowest limit that it needs no more with."""
    limits = range(int(costs.max()), max_tokens)
    lowest = bisect_left(limits, True, key=lambda limit: len(fill(costs, limit, rows)) <= num_bins)
    bins = fill(costs, limits.start + lowest, rows)
    return bins + [[]] * (num_bins - len(bins))


def partition_by_length(
    costs: np.ndarray, num_ranks: int, max_tokens: int, rows: np.ndarray | None = None
) -> list[list[list[int]]]:
    """Cut many items (a whole evaluation set) into full micro-batches of similar lengths, the same number a rank.

    Sorted by length, so that a padded layout pads little; dealt out in turn, so that ranks work alike.

    Returns:
        As `partition_into_micro_batches`.
    """
    batches = fill(costs, max_tokens, rows)
    batches += [[DUMMY]] * (-len(batches) % num_ranks)
    return [batches[rank::num_ranks] for rank in range(num_ranks)]
