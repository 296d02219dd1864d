"""Faults of preference data that no single row shows: repeats, contradictions, leaks into the test sets, length bias,
and what a limit on the length would cost.

Legend: G groups of a set, C comparisons in them: of pairs as many.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from hafrm_ds.data.content_keys import unique_keys
from hafrm_ds.data.prepared import PreparedGroups
from hafrm_ds.data.tables import Cell, Table, count, share

MAX_LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
CLEAR_SHARE_ERRORS = 3
"""Standard errors from one half at which a length bias is called one."""


@dataclass(frozen=True)
class LengthBias:
    """Does the longer answer win?

    longer, shorter, equal: comparisons whose better answer is that. mean_difference: tokens of the better answer less
    those of the worse one.
    """

    longer: int
    shorter: int
    equal: int
    mean_difference: float

    @classmethod
    def of(cls, groups: PreparedGroups) -> "LengthBias":
        better, worse = groups.lengths.response[groups.compared].T
        difference = better - worse
        counts = (int((difference > 0).sum()), int((difference < 0).sum()), int((difference == 0).sum()))
        return cls(*counts, float(difference.mean()))

    @property
    def share(self) -> float:
        """Accuracy of choosing the longer answer; equal lengths count half."""
        return (self.longer + self.equal / 2) / (self.longer + self.shorter + self.equal)

    @property
    def standard_error(self) -> float:
        return 0.5 / (self.longer + self.shorter + self.equal) ** 0.5

    @property
    def in_words(self) -> str:
        if abs(self.share - 0.5) < CLEAR_SHARE_ERRORS * self.standard_error:
            return "none that is clear"
        return f"{'longer' if self.share > 0.5 else 'shorter'} answers win: a model may learn length instead"


@dataclass(frozen=True)
class Overlap:
    """What a test set shares with the training set.

    prompts: groups of the test set whose prompt is also one of training. answers: those of which a whole conversation
    is. pairs: comparisons that are there themselves, in either order. first: id of the first such group, or "".
    """

    prompts: int
    answers: int
    pairs: int
    first: str


def are_among(keys: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Which of `keys` [K] occur in `known`: [K] bool."""
    _, place = unique_keys(np.concatenate([known, keys]))
    return np.isin(place[len(known) :], place[: len(known)])


def overlap(train: PreparedGroups, test: PreparedGroups) -> Overlap:
    prompts = are_among(test.prompt_keys, train.prompt_keys)
    answers = np.logical_or.reduceat(are_among(test.keys, train.keys), test.lengths.first[:-1])
    both = shared_pairs(train.keys[train.compared], test.keys[test.compared])
    any_of_it = np.flatnonzero(prompts | answers)
    first = test.rows[int(any_of_it[0])]["id"] if len(any_of_it) else ""
    return Overlap(int(prompts.sum()), int(answers.sum()), int(both.sum()), first)


def shared_pairs(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Which pairs of `test` [C, 2] KEY_DTYPE occur in `train`, with better and worse in either order: [C] bool."""
    _, place = unique_keys(np.concatenate([train, test]).reshape(-1))
    pairs = np.sort(place.reshape(-1, 2), axis=1)
    known = np.unique(pairs[: len(train)], axis=0)
    names = np.concatenate([known, pairs[len(train) :]])
    _, name = np.unique(names, axis=0, return_inverse=True)
    name = name.reshape(-1)
    return np.isin(name[len(known) :], name[: len(known)])


def cut_shares(pairs: PreparedGroups) -> Iterator[tuple[int, float]]:
    """(a max_length, share of the pairs whose longer conversation exceeds it), up to the first that cuts none."""
    for length in MAX_LENGTHS:
        longer = float((pairs.uncut_lengths > length).mean())
        yield length, longer
        if not longer:
            return


def render_health(sets: dict[str, PreparedGroups]) -> RenderableType:
    """The health of all sets of a run as tables. The set "train" is what the others are compared with."""
    return Group(repeats_table(sets), bias_table(sets), cuts_table(sets), *overlap_tables(sets))


def repeats_table(sets: dict[str, PreparedGroups]) -> Table:
    rows = []
    for name, pairs in sets.items():
        prompts = len(unique_keys(pairs.prompt_keys)[0])
        numbers = (len(pairs), prompts, pairs.report.duplicates, pairs.report.both_orders)
        rows.append((name, [*map(count, numbers)]))
    return Table(rows, ("Repeats", "pairs", "different prompts", "exact duplicates", "in both orders"))


def bias_table(sets: dict[str, PreparedGroups]) -> Table:
    rows = []
    for name, pairs in sets.items():
        bias = LengthBias.of(pairs)
        mean = Cell(f"{bias.mean_difference:+.1f}")
        rows.append((name, [share(bias.share), share(bias.standard_error), mean, Cell(bias.in_words)]))
    header = ("Length bias", "longer wins", "± s.e.", "mean difference, tokens", "finding")
    return Table(rows, header, texts=1)


def cuts_table(sets: dict[str, PreparedGroups]) -> Table:
    shares = {name: dict(cut_shares(pairs)) for name, pairs in sets.items()}
    lengths = sorted({length for each in shares.values() for length in each})
    rows = [(name, [share(each.get(length, 0.0)) for length in lengths]) for name, each in shares.items()]
    return Table(rows, ("Pairs longer than max_length", *(f"{length:,}" for length in lengths)))


def overlap_tables(sets: dict[str, PreparedGroups]) -> Iterator[RenderableType]:
    tests = {name: pairs for name, pairs in sets.items() if name != "train"}
    if not tests:
        return
    rows, leaks = [], False
    for name, pairs in tests.items():
        found = overlap(sets["train"], pairs)
        leaks = leaks or bool(found.prompts or found.answers)
        numbers = (len(pairs), found.prompts, found.answers, found.pairs)
        rows.append((name, [*map(count, numbers), Cell(found.first)]))
    header = ("Shared with train", "pairs", "prompts", "conversations", "whole pairs", "first")
    yield Table(rows, header, texts=1)
    if leaks:
        yield Text("Pairs that training has seen in part flatter a model: leave them out, or read their results apart.")
