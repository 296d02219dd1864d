"""Scoring many prompts and responses with an engine, all ranks together: the reference pass and evaluation."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist

from hafrm_ds.data.micro_batches import DUMMY_ITEM
from hafrm_ds.data.packing import PromptWithResponses, budget_costs, from_pairs, lay_out
from hafrm_ds.data.planning import DUMMY, cut_by_length
from hafrm_ds.data.tokenization import TokenizedPair
from hafrm_ds.objective import ResponseScores
from hafrm_ds.training.engine import Engine


def score_items(
    engine: Engine,
    item: Callable[[int], PromptWithResponses],
    costs: np.ndarray,
    *,
    layout: str,
    max_tokens: int,
    on_scores: Callable[[list[int], ResponseScores], None],
    with_reward: bool = True,
    with_logprob: bool = True,
    must_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Score items without gradients, each on one rank, in micro-batches of similar lengths.

    Args:
        item: position -> prompt and responses.
        costs: [items] tokens of each item in this layout.
        on_scores: told the positions of a micro-batch and the scores of their responses, on the rank that has them.
        must_stop: asked before each micro-batch, by all ranks together.

    Returns:
        False if it was cut short by must_stop.
    """
    if not len(costs):
        return True
    batches = cut_by_length(budget_costs(costs, layout), dist.get_world_size(), max_tokens)[dist.get_rank()]
    with torch.no_grad():
        for positions in batches:
            if must_stop():
                return False
            is_dummy = positions == [DUMMY]
            items = [DUMMY_ITEM] if is_dummy else [item(position) for position in positions]
            scores = engine(lay_out(items, layout), with_reward=with_reward, with_logprob=with_logprob)
            if not is_dummy:
                on_scores(positions, scores)
    return True


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
        layout=layout,
        max_tokens=max_tokens,
        on_scores=keep,
        with_reward=with_reward,
        with_logprob=with_logprob,
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
