"""Scoring many prompts and responses in micro-batches of similar lengths."""

from collections.abc import Callable

import numpy as np
import torch

from hafrm_ds.data.micro_batches import DUMMY_ITEM
from hafrm_ds.data.packing import PromptWithResponses, lay_out, padded_rows
from hafrm_ds.data.planning import DUMMY, cut_by_length
from hafrm_ds.errors import UserError
from hafrm_ds.objective import ResponseScores


def score_items(
    forward: Callable[..., ResponseScores],
    item: Callable[[int], PromptWithResponses],
    costs: np.ndarray,
    *,
    num_responses: np.ndarray | int,
    layout: str,
    max_tokens: int,
    on_scores: Callable[[list[int], ResponseScores], None],
    with_reward: bool = True,
    with_logprob: bool = True,
    rank: int = 0,
    num_ranks: int = 1,
    must_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Score items without gradients, each on one rank.

    Args:
        forward: the model, or the engine around it; takes a PackedBatch on the CPU.
        item: position -> prompt and responses.
        costs: [items] tokens of each item in this layout.
        num_responses: of each item, [items] or the same of all.
        on_scores: told the positions of a micro-batch and the scores of their responses, on the rank that has them.
        must_stop: asked before each micro-batch, by all ranks together.

    Returns:
        False if it was cut short by must_stop.

    Raises:
        UserError: the device has no room for a micro-batch.
    """
    if not len(costs):
        return True
    batches = cut_by_length(costs, num_ranks, max_tokens, padded_rows(layout, len(costs), num_responses))[rank]
    with torch.no_grad():
        for positions in batches:
            if must_stop():
                return False
            is_dummy = positions == [DUMMY]
            items = [DUMMY_ITEM] if is_dummy else [item(position) for position in positions]
            batch = lay_out(items, layout)
            try:
                scores = forward(batch, with_reward=with_reward, with_logprob=with_logprob)
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"there is no room for a micro-batch of {batch.num_positions:,} tokens; lower "
                    f"max_tokens_per_micro_batch (now {max_tokens:,}): {error}"
                ) from error
            if not is_dummy:
                on_scores(positions, scores)
    return True
