"""Scoring many prompts and responses with an engine, all ranks together: the reference pass and evaluation."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist

from hafrm_ds.data.packing import from_pairs
from hafrm_ds.data.tokenization import TokenizedPair
from hafrm_ds.model.batched_scoring import score_items
from hafrm_ds.objective import ResponseScores
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
    must_stop: Callable[[], bool] = lambda: False,
) -> dict[str, np.ndarray] | None:
    """Score the pairs at `index`; every rank gets all results.

    Args:
        index: [P] positions in `pairs`.
        costs: [pairs] tokens of each pair in this layout.
        on_progress: told how many pairs this rank has finished since the last call.
        must_stop: asked before each micro-batch, by all ranks together.

    Returns:
        "reward" and "logprob" as asked for: [P, 2] fp32, (chosen, rejected); None if cut short by must_stop.
    """
    names = ["reward"] * with_reward + ["logprob"] * with_logprob
    results = {name: torch.zeros(len(index), 2, dtype=torch.float64) for name in names}
    times_scored = torch.zeros(len(index), 1, dtype=torch.float64)

    def keep(positions: list[int], scores: ResponseScores) -> None:
        for name in names:
            results[name][positions] = getattr(scores, name).view(-1, 2).double().cpu()
        times_scored[positions] += 1
        on_progress(len(positions))

    is_whole = score_items(
        engine,
        lambda position: from_pairs([pairs[int(index[position])]])[0],
        costs[index],
        num_responses=2,
        layout=layout,
        max_tokens=max_tokens,
        on_scores=keep,
        with_reward=with_reward,
        with_logprob=with_logprob,
        rank=dist.get_rank(),
        num_ranks=dist.get_world_size(),
        must_stop=must_stop,
    )
    if not is_whole:
        return None
    table = sum_over_ranks(torch.cat([*results.values(), times_scored], dim=1), engine.device)
    assert bool((table[:, -1] == 1).all()), "a pair was scored by no rank or by several"
    return {name: table[:, 2 * k : 2 * k + 2].float().numpy() for k, name in enumerate(names)}


def over_all_ranks(operation: dist.ReduceOp, device: torch.device, value: float) -> float:
    """A number of each rank, combined by `operation`."""
    on_device = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(on_device, op=operation)
    return on_device.item()


def sum_over_ranks(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Sum a CPU tensor over all ranks, by way of the device that the process group works on."""
    on_device = values.to(device)
    dist.all_reduce(on_device)
    return on_device.cpu()
