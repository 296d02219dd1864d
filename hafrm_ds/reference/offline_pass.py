"""Log-probs of the reference policy: looked up in the store, and computed from the start weights where it has none."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hafrm_ds.config import BatchConfig
from hafrm_ds.data.content_keys import unique_keys
from hafrm_ds.data.packing import token_costs
from hafrm_ds.data.planning import DUMMY
from hafrm_ds.data.prepared import PreparedPairs
from hafrm_ds.data.tokenization import PromptWithResponses
from hafrm_ds.engine.engine import Engine
from hafrm_ds.engine.scoring import Items, score_items
from hafrm_ds.errors import DataError
from hafrm_ds.reference.store import ReferenceStore, ShardWriter


@dataclass(frozen=True)
class ReferenceLogprobs:
    """log pi_ref of a set of pairs.

    values: [pairs, 2] fp32, (chosen, rejected), NaN where none is known.
    """

    values: np.ndarray

    def of(self, index: np.ndarray) -> Tensor:
        """[P] positions -> [2P] fp32, ordered chosen, rejected, chosen, ...

        A missing value is an error, never 0; only dummies, which count nothing, get 0.
        """
        found = np.where((index == DUMMY)[:, None], np.float32(0), self.values[index])
        if np.isnan(found).any():
            missing = index[np.isnan(found).any(axis=1)]
            raise RuntimeError(f"no reference log-prob for pairs {missing[:10].tolist()}")
        return torch.from_numpy(found.reshape(-1))


@dataclass
class PairSet:
    """Pairs of a run, the positions of those that it uses, and their reference log-probs once they are there."""

    pairs: PreparedPairs
    index: np.ndarray
    reference: ReferenceLogprobs | None = None


@dataclass
class Responses:
    """The responses of several sets of pairs, each content once.

    Legend: I pairs over all sets, U different responses.

    sets: the sets, laid end to end.
    index: [I, 2] (set, position in it) of the pairs that are wanted.
    keys: [U] KEY_DTYPE; place: [I, 2] which of them each chosen and rejected response is.
    """

    sets: Sequence[PreparedPairs]
    index: np.ndarray
    keys: np.ndarray
    place: np.ndarray

    @classmethod
    def of(cls, sets: Sequence[PairSet]) -> "Responses":
        """The responses of the pairs that the sets use."""
        index = np.concatenate(
            [np.stack([np.full(len(each.index), number), each.index], axis=1) for number, each in enumerate(sets)]
        )
        every = np.concatenate([each.pairs.keys[each.index] for each in sets])
        keys, place = unique_keys(every.reshape(-1))
        return cls([each.pairs for each in sets], index, keys, place.reshape(-1, 2))

    def into(self, tables: Sequence[np.ndarray], values: np.ndarray) -> None:
        """Write values [U] into tables [pairs, 2] of each set, for the pairs that are wanted."""
        for number, table in enumerate(tables):
            mine = self.index[:, 0] == number
            table[self.index[mine, 1]] = values[self.place[mine]]

    def out_of(self, tables: Sequence[np.ndarray]) -> np.ndarray:
        """The inverse of `into`: [U]."""
        values = np.empty(len(self.keys), dtype=np.float32)
        for number, table in enumerate(tables):
            mine = self.index[:, 0] == number
            values[self.place[mine]] = table[self.index[mine, 1]]
        return values


@dataclass(frozen=True)
class Work:
    """What is to be computed: prompts with those of their responses that are missing.

    Legend: I items.

    pair: [I] place in Responses.index; sides: [I, 2] bool, which of its responses; lengths: of prompt, chosen and
    rejected, each [I].
    """

    responses: Responses
    pair: np.ndarray
    sides: np.ndarray
    lengths: dict[str, np.ndarray]

    @classmethod
    def missing(cls, responses: Responses, values: np.ndarray) -> "Work":
        """Each response without a value, once, with the first pair that has it."""
        wanted = np.isnan(values)[responses.place]
        first = np.zeros(wanted.shape, dtype=bool)
        _, where = np.unique(responses.place.reshape(-1), return_index=True)
        first.reshape(-1)[where] = True
        sides = wanted & first
        pair = np.flatnonzero(sides.any(axis=1))
        lengths = {name: np.empty(len(pair), dtype=np.int64) for name in ("prompt", "chosen", "rejected")}
        for number, pairs in enumerate(responses.sets):
            mine = responses.index[pair, 0] == number
            for name, column in lengths.items():
                column[mine] = pairs.lengths[name][responses.index[pair[mine], 1]]
        return cls(responses, pair, sides[pair], lengths)

    def __len__(self) -> int:
        return len(self.pair)

    def costs(self, layout: str) -> np.ndarray:
        """[I] tokens of each item in a layout."""
        return token_costs(self.lengths, layout, self.sides)

    def items(self, layout: str) -> Items:
        return Items(self.item, self.sides.sum(axis=1), self.costs(layout))

    def item(self, position: int) -> PromptWithResponses:
        number, row = self.responses.index[self.pair[position]]
        prompt, both = self.responses.sets[number][int(row)].group
        return PromptWithResponses(prompt, tuple(both[side] for side in np.flatnonzero(self.sides[position])))

    def places(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """Places among the different responses, in the order in which the items' responses are laid out."""
        return self.responses.place[self.pair[positions]][self.sides[positions]]

    def keys(self, positions: list[int]) -> np.ndarray:
        """Content keys of the items' responses, in the order of `places`."""
        return self.responses.keys[self.places(positions)]

    def num_tokens(self, positions: list[int]) -> list[int]:
        """Tokens of the items' responses, in the order of `places`."""
        lengths = np.stack([self.lengths["chosen"], self.lengths["rejected"]], axis=1)
        return lengths[positions][self.sides[positions]].tolist()


def compute_missing(
    engine: Engine,
    work: Work,
    batch: BatchConfig,
    writer: ShardWriter,
    *,
    on_progress: Callable[[int], None],
) -> np.ndarray:
    """Compute what is missing; each rank writes what it computes into the store as it goes.

    Args:
        writer: takes what this rank computes.
        on_progress: told how many tokens this rank has computed since the last call.

    Returns:
        [U] fp32, NaN for responses that were not computed; the same on all ranks.

    Raises:
        DataError: a log-prob is not finite.
    """
    items = work.items(batch.layout)

    def store(positions: list[int], values: Tensor) -> None:
        logprobs = values.numpy()
        if not np.isfinite(logprobs).all():
            raise DataError(f"a reference log-prob is not finite, in {', '.join(ids_of(work, positions)[:10])}")
        for key, logprob, count in zip(work.keys(positions), logprobs, work.num_tokens(positions), strict=True):
            writer.add(key.tobytes(), logprob, count)
        on_progress(int(items.costs[positions].sum()))

    with writer:
        computed = score_items(
            engine,
            items,
            ("logprob",),
            layout=batch.layout,
            max_tokens=batch.token_budget,
            on_values=store,
            ranks_on=engine.device,
        )
    assert computed is not None  # nothing interrupts it
    values = np.full(len(work.responses.keys), np.nan, dtype=np.float32)
    values[work.places(np.arange(len(work)))] = computed
    return values


def ids_of(work: Work, positions: list[int]) -> list[str]:
    rows = work.responses.index[work.pair[positions]]
    return [work.responses.sets[number][int(row)].id for number, row in rows]


@dataclass(frozen=True)
class StoredValues:
    """What the store holds of the responses of several sets, the same on all ranks.

    tables: of each set [pairs, 2] fp32, NaN for pairs that are not wanted and where nothing is stored.
    num_wanted, num_missing: different responses.
    """

    tables: list[np.ndarray]
    num_wanted: int
    num_missing: int

    @classmethod
    def look_up(cls, store: ReferenceStore | None, sets: Sequence[PairSet], device: torch.device) -> "StoredValues":
        """Rank 0 looks up and tells the others, which need not know what is asked for; so all ranks see the same
        although another job may be writing. `store` is None on the others."""
        tables = [np.full((len(each.pairs), 2), np.nan, dtype=np.float32) for each in sets]
        counts = torch.zeros(2, dtype=torch.int64)
        if store is not None:
            responses = Responses.of(sets)
            values = store.logprobs(responses.keys)
            responses.into(tables, values)
            counts = torch.tensor([len(values), int(np.isnan(values).sum())])
        for own in (counts, *map(torch.from_numpy, tables)):  # of which the tables are views
            shared = own.to(device)
            dist.broadcast(shared, src=0)
            own.copy_(shared)
        num_wanted, num_missing = counts.tolist()
        return cls(tables, num_wanted, num_missing)

    def missing(self, sets: Sequence[PairSet]) -> "Work":
        """The responses of the sets that are wanted and have no value."""
        incomplete = [
            PairSet(each.pairs, each.index[np.isnan(table[each.index]).any(axis=1)])
            for each, table in zip(sets, self.tables, strict=True)
        ]
        responses = Responses.of(incomplete)
        return Work.missing(responses, responses.out_of(self.tables))
