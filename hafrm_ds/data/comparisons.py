"""Comparisons: what is known of the answers of a group, two by two. Every loss, metric and evaluation reads them.

Legend: G groups, N answers of all of them, C comparisons. A preference pair is a group of two answers with one comparison.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

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


OF_A_PAIR = (Comparison(0, 1),)
"""The chosen answer, which stands first, is better than the rejected one."""
