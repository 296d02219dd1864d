"""Scoring many prompts and responses with an engine, all ranks together: the reference pass and evaluation."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from hafrm_ds.data.micro_batches import DUMMY_PAIR
from hafrm_ds.data.packing import lay_out, padded_rows, token_costs
from hafrm_ds.data.planning import DUMMY, partition_by_length
from hafrm_ds.data.preparation import PreparedPairs
from hafrm_ds.data.tokenization import PromptWithResponses
from hafrm_ds.engine.engine import Engine
from hafrm_ds.errors import UserError
from hafrm_ds.objective import ResponseScores

SECONDS_BETWEEN_QUESTIONS = 1.0


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
        False if it was interrupted by must_stop.

    Raises:
        UserError: the device has no room for a micro-batch.
    """
    if not len(costs):
        return True
    batches = partition_by_length(costs, num_ranks, max_tokens, padded_rows(layout, len(costs), num_responses))[rank]
    with torch.no_grad():
        for positions in batches:
            if must_stop():
                return False
            is_dummy = positions == [DUMMY]
            items = [DUMMY_PAIR.group] if is_dummy else [item(position) for position in positions]
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


def score_pairs(
    engine: Engine,
    pairs: PreparedPairs,
    index: np.ndarray,
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
        on_progress: told how many pairs this rank has finished since the last call.
        must_stop: asked before the first micro-batches and about once a second after them, by all ranks together.

    Returns:
        "reward" and "logprob" as asked for: [P, 2] fp32, (chosen, rejected); None if interrupted by must_stop.
    """
    names = ["reward"] * with_reward + ["logprob"] * with_logprob
    scored: list[int] = []
    # They stay on the device until the end: fetching them would make a GPU wait for the next micro-batch.
    results = [torch.empty(0, 2 * len(names), device=engine.device)]

    def keep(positions: list[int], scores: ResponseScores) -> None:
        scored.extend(positions)
        results.append(torch.cat([scores.of(name).view(-1, 2) for name in names], dim=1))
        on_progress(len(positions))

    is_whole = score_items(
        engine,
        lambda position: pairs[int(index[position])].group,
        token_costs({name: lengths[index] for name, lengths in pairs.lengths.items()}, layout),
        num_responses=2,
        layout=layout,
        max_tokens=max_tokens,
        on_scores=keep,
        with_reward=with_reward,
        with_logprob=with_logprob,
        rank=dist.get_rank(),
        num_ranks=dist.get_world_size(),
        must_stop=OccasionalQuestion(must_stop, engine.device),
    )
    if not is_whole:
        return None
    table = torch.zeros(len(index), 2 * len(names) + 1, dtype=torch.float64)
    table[scored, :-1] = torch.cat(results).double().cpu()
    table[:, -1] = torch.bincount(torch.tensor(scored, dtype=torch.int64), minlength=len(index))
    table = sum_over_ranks(table, engine.device)
    assert bool((table[:, -1] == 1).all()), "a pair was scored by no rank or by several"
    return {name: table[:, 2 * k : 2 * k + 2].float().numpy() for k, name in enumerate(names)}


@dataclass
class OccasionalQuestion:
    """A question that ranks ask one another about once a second, though each calls this before every micro-batch.

    A GPU has to finish what it was given before it answers, and some micro-batches take milliseconds; others take
    seconds on a CPU, and a signal must not wait for several. All ranks must ask at the same call. So whenever they do,
    they agree from the slowest on the number of calls until the next time.
    """

    ask: Callable[[], bool]
    device: torch.device
    interval: int = 1
    """Calls from one time to the next."""
    calls: int = 0
    """Since the last time."""
    last_time: float | None = None

    def __call__(self) -> bool:
        self.calls += 1
        if self.calls < self.interval:
            return False
        answer = self.ask()
        if self.last_time is not None:
            seconds = over_all_ranks(dist.ReduceOp.MAX, self.device, time.monotonic() - self.last_time)
            self.interval = max(1, int(SECONDS_BETWEEN_QUESTIONS * self.calls / seconds))
        self.calls, self.last_time = 0, time.monotonic()
        return answer


def over_all_ranks(operation: dist.ReduceOp.RedOpType, device: torch.device, value: float) -> float:
    """A number of each rank, combined by `operation`."""
    on_device = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(on_device, op=operation)
    return on_device.item()


def sum_over_ranks(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Sum a CPU tensor over all ranks, by way of the device that the process group works on."""
    on_device = values.to(device)
    dist.all_reduce(on_device)
    return on_device.cpu()
