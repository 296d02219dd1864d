"""Groups that are too long for a micro-batch: in parts, so that each comparison stands in one of them.

An answer that is compared with answers of several parts is computed in each of these. Nothing is lost: the parts of a
group stand in the same step, and each counts in it by its share of the group's comparisons.

Legend: G groups, I items of micro-batches: the groups themselves, and behind them the parts of those that are split.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from hafrm_ds.data.lengths import GroupLengths, starts_of
from hafrm_ds.data.pairs import Comparison
from hafrm_ds.data.planning import DUMMY
from hafrm_ds.data.prepared import PreparedGroups
from hafrm_ds.data.tokenization import TokenizedGroup


class Part(NamedTuple):
    """Some answers of a group, by their positions in it, and the comparisons that this part trains."""

    group: int
    answers: tuple[int, ...]
    comparisons: tuple[Comparison, ...]


@dataclass(frozen=True)
class TrainingItems:
    """What the steps of a training lay out: groups, or their parts. Build it with `of`.

    lengths: of the I items. parts: those behind the G groups. items_of_group: group that is split -> its items.
    """

    groups: PreparedGroups
    lengths: GroupLengths
    parts: list[Part]
    items_of_group: dict[int, list[int]]

    @classmethod
    def of(cls, groups: PreparedGroups, layout: str, max_tokens: int) -> "TrainingItems":
        """The groups under a token budget, which each two answers of a comparison keep."""
        parts: list[Part] = []
        items: dict[int, list[int]] = {}
        for group in np.flatnonzero(groups.lengths.costs(layout) > max_tokens).tolist():
            found = [Part(group, *part) for part in split(groups[group], layout, max_tokens)]
            first = len(groups) + len(parts)
            items[group] = list(range(first, first + len(found)))
            parts += found
        lengths = groups.lengths  # mapped: all processes of a host share them as long as nothing is split
        if parts:
            lengths = GroupLengths.joined([lengths, lengths_of_parts(groups, parts)])
        return cls(groups, lengths, parts, items)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, item: int) -> TokenizedGroup:
        if item < len(self.groups):
            return self.groups[item]
        group, answers, comparisons = self.parts[item - len(self.groups)]
        whole, places = self.groups[group], {answer: place for place, answer in enumerate(answers)}
        weight, total = (sum(each.weight for each in some) for some in (comparisons, whole.comparisons))
        return replace(
            whole,
            responses=tuple(whole.responses[answer] for answer in answers),
            comparisons=tuple(each.among(places) for each in comparisons),
            share=weight / total,
        )

    def of_groups(self, index: np.ndarray) -> np.ndarray:
        """The items of groups, in their order."""
        if not self.items_of_group:
            return index
        return np.array([item for group in index.tolist() for item in self.items_of_group.get(group, [group])])

    def responses(self, items: Sequence[int] | np.ndarray) -> np.ndarray:
        """Positions of the items' responses among those of all groups; of [DUMMY] -1 for each of its two."""
        first, found = self.groups.lengths.first, []
        for item in items:
            if item == DUMMY:
                found.append(np.full(2, DUMMY))
            elif item < len(self.groups):
                found.append(np.arange(first[item], first[item + 1]))
            else:
                part = self.parts[item - len(self.groups)]
                found.append(first[part.group] + np.array(part.answers))
        return np.concatenate(found)


def split(group: TokenizedGroup, layout: str, max_tokens: int) -> list[tuple[tuple[int, ...], tuple[Comparison, ...]]]:
    """(answers, comparisons) of parts of a group that keep a token budget, by first fit: each comparison goes into the
    first part that has room for those of its answers which are not there yet."""
    prompt, lengths = len(group.prompt_ids), [len(response) for response in group.responses]
    parts: list[tuple[set[int], list[Comparison]]] = []

    def fits(answers: set[int]) -> bool:
        some = np.array([lengths[answer] for answer in answers])
        return GroupLengths(np.array([prompt]), some, starts_of(np.array([len(some)]))).costs(layout)[0] <= max_tokens

    for each in group.comparisons:
        both = {each.better, each.worse}
        for answers, comparisons in parts:
            if fits(answers | both):
                answers |= both
                comparisons.append(each)
                break
        else:
            parts.append((both, [each]))
    return [(tuple(sorted(answers)), tuple(comparisons)) for answers, comparisons in parts]


def lengths_of_parts(groups: PreparedGroups, parts: Sequence[Part]) -> GroupLengths:
    lengths = groups.lengths
    response = [lengths.response[lengths.first[part.group] + np.array(part.answers)] for part in parts]
    return GroupLengths(
        lengths.prompt[[part.group for part in parts]] if parts else np.zeros(0, dtype=np.int64),
        np.concatenate([np.zeros(0, dtype=np.int64), *response]),
        starts_of(np.array([len(part.answers) for part in parts], dtype=np.int64)),
    )


class Slices(NamedTuple):
    """Groups cut into runs of their responses that each keep a token budget, for scoring, where nothing is compared.

    group: [I]. first, end: [I] which of the responses of all groups are laid out, one after another.
    """

    group: np.ndarray
    first: np.ndarray
    end: np.ndarray

    @classmethod
    def of(cls, lengths: GroupLengths, layout: str, max_tokens: int) -> "Slices":
        """All responses in their order; groups that keep the budget stay whole."""
        whole = lengths.costs(layout) <= max_tokens
        group, first, end = np.arange(len(lengths)), lengths.first[:-1], lengths.first[1:]
        if whole.all():
            return cls(group, first, end)
        rows = []
        for place in range(len(lengths)):
            start, stop = int(first[place]), int(end[place])
            while start < stop:
                last = stop
                while last > start + 1 and cost_of(lengths, place, start, last, layout) > max_tokens:
                    last -= 1
                rows.append((place, start, last))
                start = last
        return cls(*np.array(rows, dtype=np.int64).T)

    def lengths(self, of_groups: GroupLengths) -> GroupLengths:
        """Of the slices: [I]."""
        return GroupLengths(of_groups.prompt[self.group], of_groups.response, np.append(self.first, self.end[-1:]))


def cost_of(lengths: GroupLengths, group: int, first: int, end: int, layout: str) -> int:
    """Tokens of a group with some of its responses, by their positions among all."""
    some = GroupLengths(lengths.prompt[[group]], lengths.response[first:end], np.array([0, end - first]))
    return int(some.costs(layout)[0])
