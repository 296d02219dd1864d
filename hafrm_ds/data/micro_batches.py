"""From a plan's indices to what one forward pass takes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hafrm_ds.data.packing import PackedBatch, lay_out, move
from hafrm_ds.data.planning import DUMMY
from hafrm_ds.data.tokenization import Pairs, TokenizedPair


@dataclass(frozen=True)
class MicroBatch:
    """Pairs of one forward pass. Legend: P pairs, N = 2P responses.

    index: [P] position of each pair in the data set, or [DUMMY].
    weight: [P] fp32, 1, or 0 for a dummy, which is computed but counts nothing.
    margin: [P] fp32, 0 where the data has none.
    reference: [N] fp32, log pi_ref of each response; None if the objective uses none.
    """

    batch: PackedBatch
    index: np.ndarray
    weight: Tensor
    margin: Tensor
    reference: Tensor | None = None

    def to(self, device: torch.device) -> "MicroBatch":
        return move(self, device)


DUMMY_PAIR = TokenizedPair([0], [0], [0], margin=None, source="", id="dummy")


def make_micro_batch(
    pairs: Pairs, index: Sequence[int] | np.ndarray, layout: str, reference: Tensor | None = None
) -> MicroBatch:
    """Lay out the pairs at `index`; DUMMY is a pair of single tokens."""
    chosen = [DUMMY_PAIR if position == DUMMY else pairs[position] for position in index]
    return MicroBatch(
        batch=lay_out([pair.group for pair in chosen], layout),
        index=np.asarray(index, dtype=np.int64),
        weight=torch.tensor([0.0 if position == DUMMY else 1.0 for position in index]),
        margin=torch.tensor([pair.margin or 0.0 for pair in chosen]),
        reference=reference,
    )
