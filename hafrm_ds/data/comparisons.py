"""Comparisons: what is known of the answers of a group, two by two. Every loss, metric and evaluation reads them.

Legend: G groups, N answers of all of them, C comparisons. A preference pair is a group of two answers with one
comparison.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hafrm_ds.data.pairs import Comparison


def is_order(num_answers: int, comparisons: Iterable[Sequence[Any]]) -> bool:
    """Whether the answers can be put in an order that no comparison contradicts: (better, worse, ...) each.

    False where each of two answers is better than the other, and for any longer cycle.
    """
    worse: list[list[int]] = [[] for _ in range(num_answers)]
    num_better = [0] * num_answers
    for comparison in comparisons:
        worse[comparison[0]].append(comparison[1])
        num_better[comparison[1]] += 1
    order = [answer for answer, number in enumerate(num_better) if not number]
    for answer in order:  # which grows: those that only answers before them are better than
        for other in worse[answer]:
            num_better[other] -= 1
            if not num_better[other]:
                order.append(other)
    return len(order) == num_answers


def is_whole_order(num_answers: int, comparisons: Sequence[Sequence[Any]]) -> bool:
    """Whether comparisons are an order that lacks none of what its others imply and says nothing twice: that of all
    scores or ranks, or of the best against the rest, but not of each answer against the next alone."""
    better = np.zeros((num_answers, num_answers), dtype=np.int64)
    for comparison in comparisons:
        better[comparison[0], comparison[1]] += 1
    is_implied = better @ better > 0
    return bool((better <= 1).all()) and not (is_implied & (better == 0)).any() and is_order(num_answers, comparisons)


class ComparisonTable(NamedTuple):
    """Columns of the C comparisons of a set, those of a group beside one another.

    better, worse: [C] int32 positions among the answers of the group. margin: [C] fp32, NaN where the data has none.
    target, weight: [C] fp32.
    """

    better: np.ndarray
    worse: np.ndarray
    margin: np.ndarray
    target: np.ndarray
    weight: np.ndarray

    def take(self, places: np.ndarray | slice) -> "ComparisonTable":
        return ComparisonTable(*(column[places] for column in self))

    def rows(self) -> tuple[Comparison, ...]:
        columns = [column.tolist() for column in self]
        columns[2] = [None if margin != margin else margin for margin in columns[2]]  # NaN
        better, worse, margin, target, weight = columns
        return tuple(map(Comparison, better, worse, margin, target, weight))


@dataclass(frozen=True)
class Comparisons:
    """C comparisons among the N answers of G groups, as tensors on one device. Each group has one at least.

    better, worse: [C] int64 positions among the N answers. group: [C] int64, ascending.
    share: [C] fp32, what a comparison counts in the mean of its group; the shares of a group sum to 1.
    target: [C] fp32, the probability that `better` is preferred. margin: [C] fp32, 0 where the data has none.
    num_groups: G.
    """

    better: Tensor
    worse: Tensor
    group: Tensor
    share: Tensor
    target: Tensor
    margin: Tensor
    num_groups: int

    @classmethod
    def of(cls, groups: Sequence[tuple[int, Sequence[Comparison]]]) -> "Comparisons":
        """The comparisons of groups that are laid out one after another: (number of answers, comparisons) of each."""
        rows: list[tuple[int, int, int, float, float, float]] = []
        start = 0
        for number, (num_answers, comparisons) in enumerate(groups):
            total = sum(each.weight for each in comparisons)
            rows += [
                (start + each.better, start + each.worse, number, each.weight / total, each.target, each.margin or 0.0)
                for each in comparisons
            ]
            start += num_answers
        better, worse, group, share, target, margin = (torch.tensor(column) for column in zip(*rows, strict=True))
        return cls(better, worse, group, share, target, margin, len(groups))

    def difference(self, values: Tensor) -> Tensor:
        """[N] -> [C]: the value of the better answer less that of the worse one."""
        return values[self.better] - values[self.worse]

    def mean(self, values: Tensor) -> Tensor:
        """[C] -> [G]: the mean over each group, by the shares (InstructGPT, Ouyang et al. 2022, eq. 1, for each K)."""
        return values.new_zeros(self.num_groups).index_add(0, self.group, values * self.share)
