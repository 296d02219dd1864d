"""Comparisons: what is known of the answers of a group, two by two. Every loss, metric and evaluation reads them.

Legend: G groups, N answers of all of them, C comparisons. A preference pair is a group of two answers with one comparison.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Comparison(NamedTuple):
    """Of two answers of a group, one is better.

    better, worse: their positions among the answers of the group.
    margin: by how much, in the units of the data; None where the data does not say.
    target: the probability that `better` is preferred, above 1/2 and at most 1.
    weight: how much it counts beside the other comparisons of its group, above 0.
    """

    better: int
    worse: int
    margin: float | None = None
    target: float = 1.0
    weight: float = 1.0

    def among(self, places: dict[int, int]) -> "Comparison":
        """The same where the answers have other positions: old -> new."""
        return self._replace(better=places[self.better], worse=places[self.worse])


OF_A_PAIR = (Comparison(0, 1),)
"""The chosen answer, which stands first, is better than the rejected one."""


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
