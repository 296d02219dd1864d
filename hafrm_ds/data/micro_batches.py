"""From a plan's indices to what one forward pass takes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hafrm_ds.data.comparisons import Comparisons
from hafrm_ds.data.packing import PackedBatch, lay_out, move
from hafrm_ds.data.pairs import OF_A_PAIR
from hafrm_ds.data.planning import DUMMY
from hafrm_ds.data.tokenization import Groups, TokenizedGroup


@dataclass(frozen=True)
class MicroBatch:
    """Groups of one forward pass. Legend: G groups, N responses of all of them, A attributes.

    index: [G] position of each group in the data set, or [DUMMY].
    weight: [G] fp32, what each counts in the step: 1, or the number of its comparisons where these count alike; of a
        part of a group its share of that; 0 for a dummy, which is computed but counts nothing.
    comparisons: of the responses.
    reference: [N] fp32, log pi_ref of each response; None if the objective uses none.
    trains_reward: [G] fp32, 1 for a group that trains the reward loss and 0 for one that does not; None where all do.
    attributes: [N, A] fp32, what the attributes of the model are by the data, NaN where it does not say; None of a
        model without.
    """

    batch: PackedBatch
    index: np.ndarray
    weight: Tensor
    comparisons: Comparisons
    reference: Tensor | None = None
    trains_reward: Tensor | None = None
    attributes: Tensor | None = None

    def to(self, device: torch.device) -> "MicroBatch":
        return move(self, device)


DUMMY_GROUP = TokenizedGroup([0], ([0], [0]), OF_A_PAIR, source="", id="dummy")


def make_micro_batch(
    groups: Groups,
    index: Sequence[int] | np.ndarray,
    layout: str,
    reference: Tensor | None = None,
    normalize_by: str = "group",
    attributes: Tensor | None = None,
) -> MicroBatch:
    """Lay out the groups at `index`; DUMMY is a pair of single tokens.

    Args:
        normalize_by: what counts alike in a step, "group" or "comparison".
    """
    chosen = [DUMMY_GROUP if position == DUMMY else groups[position] for position in index]

    def weight_of(position: int, group: TokenizedGroup) -> float:
        if position == DUMMY:
            return 0.0
        return group.share if normalize_by == "group" else sum(each.weight for each in group.comparisons)

    trains_reward = [group.trains_reward for group in chosen]
    return MicroBatch(
        batch=lay_out([group.ids for group in chosen], layout),
        index=np.asarray(index, dtype=np.int64),
        weight=torch.tensor([weight_of(position, group) for position, group in zip(index, chosen, strict=True)]),
        comparisons=Comparisons.of([(len(group.responses), group.comparisons) for group in chosen]),
        reference=reference,
        trains_reward=None if all(trains_reward) else torch.tensor(trains_reward, dtype=torch.float32),
        attributes=attributes,
    )
