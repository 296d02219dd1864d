"""Log-probs of the reference policy: looked up in the store, and computed from the start weights where it has none."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hafrm_ds.config import BatchConfig
from hafrm_ds.data.content_keys import unique_keys
from hafrm_ds.data.lengths import GroupLengths, places_of, starts_of
from hafrm_ds.data.planning import DUMMY
from hafrm_ds.data.prepared import PreparedGroups
from hafrm_ds.data.splitting import Slices
from hafrm_ds.data.tokenization import PromptWithResponses
from hafrm_ds.engine.engine import Engine
from hafrm_ds.engine.scoring import Items, score_items
from hafrm_ds.errors import DataError
from hafrm_ds.reference.store import ReferenceStore, ShardWriter


@dataclass(frozen=True)
class ReferenceLogprobs:
    """log pi_ref of the responses of a set.

    values: [R] fp32, of all its groups one after another, NaN where none is known.
    """

    values: np.ndarray

    def of(self, responses: np.ndarray) -> Tensor:
        """Positions of responses -> [N] fp32.

        A missing value is an error, never 0; only dummies, which count nothing, get 0.
        """
        found = np.where(responses == DUMMY, np.float32(0), self.values[responses])
        if np.isnan(found).any():
            missing = responses[np.isnan(found)]
            raise RuntimeError(f"no reference log-prob for the responses {missing[:10].tolist()}")
        return torch.from_numpy(found)


@dataclass
class GroupSet:
    """Groups of a run, the positions of those that it uses, and their reference log-probs once they are there."""

    groups: PreparedGroups
    index: np.ndarray
    reference: ReferenceLogprobs | None = None

    @property
    def responses(self) -> np.ndarray:
        """Positions of the responses of the groups that are used, among those of all."""
        return places_of(self.groups.lengths.first, self.index)

    def are_whole(self, known: np.ndarray) -> np.ndarray:
        """[groups that are used] bool, of which all responses are known, by [R] bool."""
        first = self.groups.lengths.first
        sizes = first[self.index + 1] - first[self.index]
        return np.logical_and.reduceat(known[self.responses], starts_of(sizes)[:-1])


@dataclass
class Responses:
    """The responses of several sets of groups, each content once.

    Legend: W responses that are wanted over all sets, U different ones.

    sets: the sets, laid end to end.
    set: [W] which set, group: [W] which group of it, response: [W] which of the responses of all its groups.
    keys: [U] KEY_DTYPE; place: [W] which of them each is.
    """

    sets: Sequence[PreparedGroups]
    set: np.ndarray
    group: np.ndarray
    response: np.ndarray
    keys: np.ndarray
    place: np.ndarray

    @classmethod
    def of(cls, sets: Sequence[GroupSet]) -> "Responses":
        """The responses of the groups that the sets use."""
        wanted = [each.responses for each in sets]
        groups = [np.repeat(each.index, each.groups.lengths.num_responses[each.index]) for each in sets]
        numbers = np.repeat(np.arange(len(sets)), [len(each) for each in wanted])
        keys, place = unique_keys(
            np.concatenate([each.groups.keys[some] for each, some in zip(sets, wanted, strict=True)])
        )
        return cls([each.groups for each in sets], numbers, np.concatenate(groups), np.concatenate(wanted), keys, place)

    def into(self, tables: Sequence[np.ndarray], values: np.ndarray) -> None:
        """Write values [U] into tables [R] of each set, for the responses that are wanted."""
        for number, table in enumerate(tables):
            mine = self.set == number
            table[self.response[mine]] = values[self.place[mine]]

    def out_of(self, tables: Sequence[np.ndarray]) -> np.ndarray:
        """The inverse of `into`: [U]."""
        values = np.empty(len(self.keys), dtype=np.float32)
        for number, table in enumerate(tables):
            mine = self.set == number
            values[self.place[mine]] = table[self.response[mine]]
        return values


@dataclass(frozen=True)
class Work:
    """What is to be computed: prompts with those of their responses that are missing.

    Legend: I items, M responses of all of them.

    wanted: [M] places in `responses`, those of an item beside one another. lengths: of the items.
    """

    responses: Responses
    wanted: np.ndarray
    lengths: GroupLengths

    @classmethod
    def missing(cls, responses: Responses, values: np.ndarray, layout: str, max_tokens: int) -> "Work":
        """Each response without a value, once, beside the others of the first group that has it, as far as these keep
        the token budget together."""
        _, first = np.unique(responses.place, return_index=True)
        wanted = np.sort(first[np.isnan(values)])
        owner = np.stack([responses.set[wanted], responses.group[wanted]], axis=1)
        starts = np.flatnonzero(np.any(owner[1:] != owner[:-1], axis=1)) + 1
        starts = np.concatenate([np.zeros(min(1, len(wanted)), dtype=np.int64), starts])
        prompt, response = np.empty(len(starts), dtype=np.int64), np.empty(len(wanted), dtype=np.int64)
        for number, groups in enumerate(responses.sets):
            of_items, of_responses = owner[starts, 0] == number, owner[:, 0] == number
            prompt[of_items] = groups.lengths.prompt[owner[starts[of_items], 1]]
            response[of_responses] = groups.lengths.response[responses.response[wanted[of_responses]]]
        lengths = GroupLengths(prompt, response, np.append(starts, len(wanted)))
        return cls(responses, wanted, Slices.of(lengths, layout, max_tokens).lengths(lengths))

    def __len__(self) -> int:
        return len(self.lengths)

    def items(self, layout: str) -> Items:
        return Items(self.item, self.lengths.num_responses, self.lengths.costs(layout))

    def item(self, position: int) -> PromptWithResponses:
        mine = self.wanted[self.lengths.first[position] : self.lengths.first[position + 1]]
        responses, number, row = self.responses, self.responses.set[mine[0]], self.responses.group[mine[0]]
        groups = responses.sets[number]
        prompt, every = groups[row].ids
        answers = responses.response[mine] - groups.lengths.first[row]
        return PromptWithResponses(prompt, tuple(every[answer] for answer in answers))

    def places(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """Places among the different responses, in the order in which the items' responses are laid out."""
        return self.responses.place[self.wanted[places_of(self.lengths.first, np.asarray(positions))]]

    def keys(self, positions: list[int]) -> np.ndarray:
        """Content keys of the items' responses, in the order of `places`."""
        return self.responses.keys[self.places(positions)]

    def num_tokens(self, positions: list[int]) -> list[int]:
        """Tokens of the items' responses, in the order of `places`."""
        return self.lengths.response[places_of(self.lengths.first, np.asarray(positions))].tolist()


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
    responses, first = work.responses, work.wanted[work.lengths.first[positions]]
    return [responses.sets[responses.set[place]][responses.group[place]].id for place in first]


@dataclass(frozen=True)
class StoredValues:
    """What the store holds of the responses of several sets, the same on all ranks.

    tables: of each set [R] fp32, NaN for responses that are not wanted and where nothing is stored.
    num_wanted, num_missing: different responses.
    """

    tables: list[np.ndarray]
    num_wanted: int
    num_missing: int

    @classmethod
    def look_up(cls, store: ReferenceStore | None, sets: Sequence[GroupSet], device: torch.device) -> "StoredValues":
        """Rank 0 looks up and tells the others, which need not know what is asked for; so all ranks see the same
        although another job may be writing. `store` is None on the others."""
        tables = [np.full(len(each.groups.keys), np.nan, dtype=np.float32) for each in sets]
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

    def missing(self, sets: Sequence[GroupSet], batch: BatchConfig) -> "Work":
        """The responses of the sets that are wanted and have no value, under a layout and a token budget."""
        incomplete = [
            GroupSet(each.groups, each.index[~each.are_whole(~np.isnan(table))])
            for each, table in zip(sets, self.tables, strict=True)
        ]
        responses = Responses.of(incomplete)
        return Work.missing(responses, responses.out_of(self.tables), batch.layout, batch.token_budget)
