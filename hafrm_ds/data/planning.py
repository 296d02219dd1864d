"""The batch plan: which pairs make an optimizer step, and how a step is cut into micro-batches.

The order of pairs depends on (number of pairs, seed, global batch size) alone, never on the number of ranks: the same
global batches come in the same order on 1 or 1,000 GPUs, and resuming is going on at a step number.
"""

import heapq
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from hafrm_ds.errors import DataError

DUMMY = -1
"""Stands for "no pair" in a micro-batch: the rank runs a tiny pair of weight 0, as all ranks must run equally often."""


@dataclass(frozen=True)
class BatchPlan:
    """Global batches over repeated passes through `num_pairs` pairs.

    The passes are laid end to end, each in an order of its own: every pair is used once a pass, no pair is left out at
    the end of a pass, and a global batch may span two passes.
    """

    num_pairs: int
    global_batch_size: int
    seed: int

    def permutation(self, epoch: int) -> np.ndarray:
        return pass_order(self.num_pairs, self.seed, epoch)

    def global_batch(self, step: int) -> np.ndarray:
        """Indices [global_batch_size] of the pairs of optimizer step `step` (from 0)."""
        position, end, parts = step * self.global_batch_size, (step + 1) * self.global_batch_size, []
        while position < end:
            epoch, offset = divmod(position, self.num_pairs)
            part = self.permutation(epoch)[offset : offset + end - position]
            parts.append(part)
            position += len(part)
        return np.concatenate(parts)

    def pairs_until(self, num_steps: int) -> np.ndarray:
        """Sorted indices of all pairs that the first `num_steps` steps use."""
        used = num_steps * self.global_batch_size
        full, rest = divmod(used, self.num_pairs)
        return np.arange(self.num_pairs) if full else np.sort(self.permutation(0)[:rest])


@lru_cache(maxsize=2)  # asked for at every step, and a step spans two passes at most, as a rule
def pass_order(num_pairs: int, seed: int, epoch: int) -> np.ndarray:
    """The order [num_pairs] of one pass."""
    return np.random.default_rng((seed, epoch)).permutation(num_pairs)


def check_budget(costs: np.ndarray, max_tokens: int, ids) -> None:
    """Raise DataError naming the pairs that alone exceed the token budget of a micro-batch.

    Args:
        costs: [pairs] tokens that each pair occupies in the chosen layout.
        ids: sequence of the pairs' ids (file and row).
    """
    over = np.flatnonzero(costs > max_tokens)
    if len(over):
        worst = over[np.argsort(-costs[over])][:5]
        named = ", ".join(f"{ids[int(index)]} ({costs[index]} tokens)" for index in worst)
        raise DataError(
            f"{len(over)} of {len(costs)} pairs do not fit in one micro-batch of "
            f"batch.max_tokens_per_micro_batch = {max_tokens} tokens: {named}. "
            f"Raise --batch.max_tokens_per_micro_batch to {costs.max()} or lower --data.max_length."
        )


def cut_into_micro_batches(costs: np.ndarray, num_ranks: int, max_tokens: int) -> list[list[list[int]]]:
    """Cut one batch into num_ranks x n micro-batches of about equal work, with the smallest n that keeps the budget.

    n is the same on all ranks (under ZeRO-3 a rank with fewer forwards hangs the others). Longest-first greedy: each
    pair goes to the lightest micro-batch so far.

    Args:
        costs: [pairs] tokens of each pair; none above max_tokens.

    Returns:
        [rank][n] lists of positions into `costs`, each ascending; a micro-batch without pairs is [DUMMY].
    """
    order = np.argsort(-costs, kind="stable")
    n = max(1, -(-int(costs.sum()) // (max_tokens * num_ranks)))
    while (bins := pack(costs, order, num_ranks * n, max_tokens)) is None:
        n += 1
    # Bins come heaviest first; dealing them out to and fro evens the ranks' totals.
    ranks: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    for row in range(n):
        dealt = bins[row * num_ranks : (row + 1) * num_ranks]
        for rank, content in enumerate(dealt if row % 2 == 0 else reversed(dealt)):
            ranks[rank].append(sorted(content) or [DUMMY])
    return ranks


def imbalance(costs: np.ndarray, ranks: list[list[list[int]]]) -> float:
    """Share of their time that ranks wait for the one with the most tokens, as they meet after every micro-batch.

    Args:
        costs, ranks: given to and returned by `cut_into_micro_batches`.
    """
    tokens = np.array([[costs[[place for place in part if place != DUMMY]].sum() for part in own] for own in ranks])
    return float(1 - tokens.mean(axis=0).sum() / tokens.max(axis=0).sum())


def pack(costs: np.ndarray, order: np.ndarray, num_bins: int, max_tokens: int) -> list[list[int]] | None:
    """Longest-first greedy packing: `num_bins` lists, heaviest first, or None when one would exceed max_tokens."""
    heap = [(0, index) for index in range(num_bins)]
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [0] * num_bins
    for pair in order.tolist():
        load, index = heapq.heappop(heap)
        load += int(costs[pair])
        if load > max_tokens:
            return None
        bins[index].append(pair)
        loads[index] = load
        heapq.heappush(heap, (load, index))
    return [bins[index] for index in sorted(range(num_bins), key=lambda index: -loads[index])]


def cut_by_length(costs: np.ndarray, num_ranks: int, max_tokens: int) -> list[list[list[int]]]:
    """Cut many pairs (a whole evaluation set) into full micro-batches of similar lengths, the same number a rank.

    Sorted by length, so that a padded layout pads little; dealt out in turn, so that ranks work alike.

    Returns:
        As `cut_into_micro_batches`.
    """
    batches, current, load = [], [], 0
    for pair in np.argsort(-costs, kind="stable").tolist():
        if current and load + int(costs[pair]) > max_tokens:
            batches.append(current)
            current, load = [], 0
        current.append(pair)
        load += int(costs[pair])
    batches.append(current)
    batches += [[DUMMY]] * (-len(batches) % num_ranks)
    return [batches[rank::num_ranks] for rank in range(num_ranks)]
