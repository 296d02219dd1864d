"""Scoring many prompts and responses with an engine, all ranks together: the reference pass and evaluation."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from hafrm_ds.data.lengths import places_of, starts_of
from hafrm_ds.data.micro_batches import DUMMY_GROUP
from hafrm_ds.data.packing import lay_out, padded_rows
from hafrm_ds.data.planning import DUMMY, partition_by_length
from hafrm_ds.data.prepared import PreparedGroups
from hafrm_ds.data.splitting import Slices
from hafrm_ds.data.tokenization import PromptWithResponses
from hafrm_ds.engine.engine import Engine
from hafrm_ds.errors import NoRoomError
from hafrm_ds.objective import ResponseScores

SECONDS_BETWEEN_QUESTIONS = 1.0


@dataclass(frozen=True)
class Items:
    """What is to be scored: prompts, each with its responses.

    Legend: I items.

    item: position -> prompt and responses. num_responses: [I]. costs: [I] tokens of each in the layout.
    """

    item: Callable[[int], PromptWithResponses]
    num_responses: np.ndarray
    costs: np.ndarray

    def __len__(self) -> int:
        return len(self.costs)


def score_items(
    forward: Callable[..., ResponseScores],
    items: Items,
    heads: Sequence[str],
    *,
    layout: str,
    max_tokens: int,
    read: Callable[[ResponseScores], torch.Tensor] | None = None,
    sizes: np.ndarray | None = None,
    on_values: Callable[[list[int], torch.Tensor], None] = lambda positions, values: None,
    ranks_on: torch.device | None = None,
    must_stop: Callable[[], bool] = lambda: False,
) -> np.ndarray | None:
    """Score items without gradients, each on one rank: the one way from prompts and responses to values.

    The values of a micro-batch come to the host while a GPU computes the next one.

    Args:
        forward: the model, or the engine around it; takes a PackedBatch on the CPU.
        heads: those that are run, of "reward" and "logprob".
        read: what is kept of the scores of a micro-batch, one flat fp32 tensor, item after item. Default: the heads'
            values, [responses, heads].
        sizes: [I] how many numbers `read` gives for each item. Default: responses times heads.
        on_values: told the positions of a micro-batch and what `read` gave, on the CPU of the rank that computed it,
            once the next micro-batch has been launched.
        ranks_on: the device of the process group if all its ranks score together; None if this process scores alone.
        must_stop: asked before each micro-batch, by all ranks together.

    Returns:
        [sum of sizes] fp32, item after item, the same on all ranks; None if interrupted by must_stop.

    Raises:
        NoRoomError: the device has no room for a micro-batch.
    """
    if not len(items):
        return np.empty(0, dtype=np.float32)
    read = read or (lambda scores: torch.stack([scores.of(head) for head in heads], dim=1).reshape(-1))
    sizes = items.num_responses * len(heads) if sizes is None else sizes
    rank, num_ranks = (0, 1) if ranks_on is None else (dist.get_rank(), dist.get_world_size())
    rows = padded_rows(layout, len(items), items.num_responses)
    scored: list[tuple[list[int], torch.Tensor]] = []
    pending: tuple[list[int], ToHost] | None = None

    def take(positions: list[int], values: ToHost) -> None:
        scored.append((positions, values.arrived()))
        on_values(*scored[-1])

    with torch.no_grad():
        for positions in partition_by_length(items.costs, num_ranks, max_tokens, rows)[rank]:
            if must_stop():
                return None
            is_dummy = positions == [DUMMY]
            batch = lay_out([DUMMY_GROUP.ids] if is_dummy else [items.item(place) for place in positions], layout)
            try:
                scores = forward(batch, with_reward="reward" in heads, with_logprob="logprob" in heads)
            except torch.OutOfMemoryError as error:
                raise NoRoomError(
                    f"there is no room for a micro-batch of {batch.num_positions:,} tokens; lower "
                    f"max_tokens_per_micro_batch (now {max_tokens:,}): {error}"
                ) from error
            launched = None if is_dummy else (positions, ToHost(read(scores)))
            if pending is not None:
                take(*pending)
            pending = launched
        if pending is not None:
            take(*pending)
    return in_order(scored, sizes, ranks_on)


class ToHost:
    """Values on their way from a device to the CPU.

    The copy stands behind what computes them, before anything that is launched later. Copied at the time when they are
    wanted, they would come after all that the GPU has been given by then.
    """

    def __init__(self, values: torch.Tensor):
        self.values = values.to("cpu", non_blocking=True)  # of a GPU into pinned memory
        self.copied = torch.cuda.Event() if values.is_cuda else None
        if self.copied is not None:
            self.copied.record(torch.cuda.current_stream(values.device))

    def arrived(self) -> torch.Tensor:
        """The values, once they are there."""
        if self.copied is None:
            return self.values
        self.copied.synchronize()
        return self.values.clone()  # the pinned memory is for the next


def in_order(
    scored: list[tuple[list[int], torch.Tensor]], sizes: np.ndarray, ranks_on: torch.device | None
) -> np.ndarray:
    """Values of micro-batches -> those of all items on all ranks, item after item: [sum of sizes] fp32.

    Args:
        scored: positions of the items of a micro-batch, and their values, on this rank.
        sizes: [I] numbers of each item.
    """
    order = np.array([position for positions, _ in scored for position in positions], dtype=np.int64)
    total, num_items = int(sizes.sum()), len(sizes)
    # Behind the values stands how often each item was scored.
    table = torch.zeros(total + num_items, dtype=torch.float64)
    if scored:
        places = places_of(starts_of(sizes), order)
        table[torch.from_numpy(places)] = torch.cat([values for _, values in scored]).double()
        table[total:] = torch.bincount(torch.from_numpy(order), minlength=num_items)
    if ranks_on is not None:
        table = sum_over_ranks(table, ranks_on)
    assert bool((table[total:] == 1).all()), "an item was scored by no rank or by several"
    return table[:total].float().numpy()


def score_groups(
    engine: Engine,
    groups: PreparedGroups,
    index: np.ndarray,
    heads: Sequence[str],
    *,
    layout: str,
    max_tokens: int,
    on_progress: Callable[[int], None] = lambda num_groups: None,
    must_stop: Callable[[], bool] = lambda: False,
) -> dict[str, np.ndarray] | None:
    """Score the responses of the groups at `index`; every rank gets all results. Groups that are too long for a
    micro-batch are laid out a few responses at a time.

    Args:
        index: [G] positions in `groups`.
        heads: of "reward" and "logprob".
        on_progress: told how many groups this rank has finished since the last call.
        must_stop: asked before the first micro-batches and about once a second after them, by all ranks together.

    Returns:
        Head -> [R] fp32, the responses of these groups one after another; None if interrupted by must_stop.
    """
    of_groups = groups.lengths.take(index)
    slices = Slices.of(of_groups, layout, max_tokens)
    lengths = slices.lengths(of_groups)

    def item(position: int) -> PromptWithResponses:
        group = slices.group[position]
        prompt, responses = groups[int(index[group])].ids
        first, end = (int(each[position] - of_groups.first[group]) for each in (slices.first, slices.end))
        return PromptWithResponses(prompt, responses[first:end])

    def finished(positions: list[int]) -> int:
        return int((slices.end[positions] == of_groups.first[slices.group[positions] + 1]).sum())

    values = score_items(
        engine,
        Items(item, lengths.num_responses, lengths.costs(layout)),
        heads,
        layout=layout,
        max_tokens=max_tokens,
        on_values=lambda positions, values: on_progress(finished(positions)),
        ranks_on=engine.device,
        must_stop=OccasionalQuestion(must_stop, engine.device),
    )
    if values is None:
        return None
    # Contiguous: numpy adds up other numbers in another order, and means would differ in their last bits.
    return {
        head: np.ascontiguousarray(each) for head, each in zip(heads, values.reshape(-1, len(heads)).T, strict=True)
    }


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
