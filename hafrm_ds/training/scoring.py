"""Scoring many pairs with the training engine, all ranks together: the reference pass and evaluation."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist

from hafrm_ds.data.micro_batches import make_micro_batch
from hafrm_ds.data.planning import DUMMY, cut_by_length
from hafrm_ds.data.tokenization import TokenizedPair
from hafrm_ds.training.engine import Engine


def score_pairs(
    engine: Engine,
    pairs: Sequence[TokenizedPair],
    index: np.ndarray,
    costs: np.ndarray,
    *,
    layout: str,
    max_tokens: int,
    with_reward: bool,
    with_logprob: bool,
    on_progress: Callable[[int], None] = lambda num_pairs: None,
) -> dict[str, np.ndarray]:
    """Score the pairs at `index` without gradients; every rank gets all results.

    Args:
        index: [P] positions in `pairs`.
        costs: [pairs] tokens of each pair in this layout.
        on_progress: told how many pairs this rank has finished since the last call.

    Returns:
        "reward" and "logprob" as asked for: [P, 2] fp32, (chosen, rejected).
    """
    world_size, rank = dist.get_world_size(), dist.get_rank()
    names = ["reward"] * with_reward + ["logprob"] * with_logprob
    # One row a pair: the values, then how often the pair was scored.
    table = torch.zeros(len(index), 2 * len(names) + 1, dtype=torch.float64)
    with torch.no_grad():
        for places in cut_by_length(costs[index], world_size, max_tokens)[rank]:
            is_dummy = places == [DUMMY]
            members = [DUMMY] if is_dummy else index[places].tolist()
            micro_batch = make_micro_batch(pairs, members, layout)
            scores = engine(micro_batch.batch, with_reward=with_reward, with_logprob=with_logprob)
            if is_dummy:
                continue
            columns = [getattr(scores, name).view(-1, 2).double().cpu() for name in names]
            table[places] = torch.cat([*columns, torch.ones(len(places), 1, dtype=torch.float64)], dim=1)
            on_progress(len(places))
    table = table.to(engine.device)
    dist.all_reduce(table)
    table = table.cpu()
    assert bool((table[:, -1] == 1).all()), "a pair was scored by no rank or by several"
    return {name: table[:, 2 * k : 2 * k + 2].float().numpy() for k, name in enumerate(names)}
