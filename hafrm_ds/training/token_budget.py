"""How many tokens a micro-batch may hold: found at the start of a run from what two micro-batches need."""

import socket
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

from hafrm_ds.data.micro_batches import make_micro_batch
from hafrm_ds.data.packing import PackedBatch
from hafrm_ds.data.prepared import PreparedGroups
from hafrm_ds.data.splitting import TrainingItems
from hafrm_ds.engine.engine import Engine, TrainingEngine
from hafrm_ds.engine.scoring import over_all_ranks
from hafrm_ds.errors import UserError
from hafrm_ds.hardware.measurement import free_memory_bytes, peak_growth_bytes

SAFE_SHARE = 0.85
"""Share of the free memory that is planned with: the rest is for fragments and for what the line does not catch."""
SMALLEST_PROBE, SMALLEST_PROBE_ON_GPU = 1024, 4096
"""Tokens. On a GPU the constant part (a chunk of logits, gathered weights, the allocator's steps) is larger."""
PROBE_RATIO = 2
ROUNDING = 64


def find_token_budget(
    engine: Engine,
    groups: PreparedGroups,
    layout: str,
    *,
    longest: int,
    largest_useful: int,
    with_reward: bool,
    with_logprob: bool,
) -> int:
    """The largest token budget whose micro-batches fit into memory, the same on all ranks.

    Memory grows linearly with tokens in every layout (attention never holds its scores), so a forward and backward of
    two sizes gives the line. Backward runs on a loss of 0: like a dummy it adds exactly nothing to the gradients of the
    first step. An engine without optimizer is measured in forward alone. All ranks call this together.

    Args:
        groups: what the two micro-batches are made of.
        longest: tokens of the longest item that a micro-batch must hold.
        largest_useful: more tokens would change nothing.

    Raises:
        UserError: even the longest item does not fit.
    """
    usual = SMALLEST_PROBE_ON_GPU if engine.device.type == "cuda" else SMALLEST_PROBE
    smallest = max(longest, min(usual, largest_useful))
    items = TrainingItems.of(groups, layout, smallest)  # a group that is longer is split in training too
    usable = items.of_groups(np.arange(len(groups)))
    costs = items.lengths.costs(layout)[usable]

    def probe(batch: PackedBatch) -> Callable[[], None]:
        def work() -> None:
            with torch.set_grad_enabled(isinstance(engine, TrainingEngine)):
                scores = engine(batch, with_reward=with_reward, with_logprob=with_logprob)
                if isinstance(engine, TrainingEngine):
                    parts = (scores.reward, scores.logprob, scores.attributes)
                    total = torch.stack([part.sum() for part in parts if part is not None]).sum()
                    engine.backward(0.0 * total, is_last=False)

        return work

    def growth(batch: PackedBatch) -> float:
        return over_all_ranks(dist.ReduceOp.MAX, engine.device, peak_growth_bytes(engine.device, probe(batch)))

    small_batch, large_batch = (
        make_micro_batch(items, usable[groups_worth(costs, layout, num_tokens)], layout).batch
        for num_tokens in (smallest, PROBE_RATIO * smallest)
    )
    try:
        probe(small_batch)()  # what is allocated once, as gradient buffers, belongs to neither size
        free = over_all_ranks(dist.ReduceOp.MIN, engine.device, free_memory_bytes(engine.device, ranks_of_this_node()))
        room = SAFE_SHARE * free - engine.bytes_of_first_step
        small = growth(small_batch)
        more_tokens = large_batch.num_positions - small_batch.num_positions
        if largest_useful <= smallest or PROBE_RATIO * small > room or not more_tokens:
            return smallest
        bytes_per_token = max(growth(large_batch) - small, 1.0) / more_tokens
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the memory of {engine.device} does not hold a micro-batch of {smallest} tokens (the longest pair has "
            f"{longest}): lower --data.max_length, set --model.gradient_checkpointing selective or true, or shard "
            f"more: {error}"
        ) from error
    budget = small_batch.num_positions + max(0.0, room - small) / bytes_per_token
    return max(smallest, int(min(budget, largest_useful)) // ROUNDING * ROUNDING)


def groups_worth(costs: np.ndarray, layout: str, num_tokens: int) -> list[int]:
    """Positions of groups of at most `num_tokens` tokens together, or of the longest alone; repeated if there are too
    few."""
    worth = np.full_like(costs, costs.max()) if layout == "padded" else costs  # beside the longest
    order = np.random.default_rng(0).permutation(len(costs))
    order = np.concatenate([[costs.argmax()], np.tile(order, 1 + num_tokens // max(1, int(worth.sum())))])
    fitting = np.searchsorted(np.cumsum(worth[order]), num_tokens, side="right")
    return order[: max(1, fitting)].tolist()


def ranks_of_this_node() -> int:
    hosts: list = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    return hosts.count(socket.gethostname())
