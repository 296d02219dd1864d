"""Several methods, each trained with several seeds, on the same sets of pairs: accuracies and paired differences.

Legend: P pairs of a set, S seeds.
"""

import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from hafrm_ds.errors import DataError
from hafrm_ds.evaluation.bootstrap import estimates, means_of_sets
from hafrm_ds.evaluation.calibration import correctness
from hafrm_ds.evaluation.combined import CombinedJudge
from hafrm_ds.evaluation.pair_scores import PairScores

COMPARISON_FILE = "comparison.json"
"""The results of a comparison, in its folder."""
OTHERS = "mean of the others"
TWO_MODELS = "two_models"
"""A judge of DPO in a comparison: its implicit reward and the reward head of Baseline, combined."""
COLUMNS_AT_ONCE = 256
"""Accuracies that are resampled together, which bounds the memory."""


def run_folder(folder: Path, method: str, seed: int) -> Path:
    """Where a training lies in the folder of a comparison."""
    return folder / "runs" / f"{method}-seed{seed}"


@dataclass(frozen=True)
class Judged:
    """What a training got right of a set: all that a comparison keeps of its scores.

    ids, prompts: [P]. right: judge -> [P] fp32, 1 where it prefers the chosen answer, 0.5 at a tie.
    """

    ids: list[str]
    prompts: list[str]
    right: dict[str, np.ndarray]

    @classmethod
    def of(cls, scores: PairScores, like: "Judged | None" = None) -> "Judged":
        """Args: like: another training's, whose names of pairs are shared where they are the same."""
        right = {judge: correctness(scores.margins(judge)).astype(np.float32) for judge in scores.judges}
        if like is not None and (scores.ids, scores.prompts) == (like.ids, like.prompts):
            return cls(like.ids, like.prompts, right)
        return cls(scores.ids, scores.prompts, right)


def two_models(policy: Mapping[str, PairScores], reward: Mapping[str, PairScores], first: str) -> dict[str, np.ndarray]:
    """What the combined judge of two models gets right: the implicit reward of the one, the reward head of the other.

    The rival of one model with both heads, at twice its cost. Fitted on the set `first`, as `combined` is.

    Returns:
        Name of a set -> [P] as in `Judged`; empty where there is no fit.
    """
    joined = {name: replace(scores, reward=reward[name].reward, combined=None) for name, scores in policy.items()}
    judge = CombinedJudge.fitted_on(joined[first])
    if judge is None:
        return {}
    for scores in joined.values():
        judge.judge(scores)
    return {name: correctness(scores.margins("combined")).astype(np.float32) for name, scores in joined.items()}


@dataclass(frozen=True)
class Method:
    """Trainings that differ in their seed alone.

    judge: by which the method is judged: the reward head, or the implicit reward of a training without one.
    trainings: for each seed, name of a set -> what it got right there.
    cells: of a sweep, for each cell that the method stands in: name of its Baseline -> labels of its swept options, by
        their names.
    """

    name: str
    judge: str
    trainings: list[dict[str, Judged]]
    cells: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def judges(self) -> list[str]:
        """Those that every training has, its own first."""
        every = [judged.right.keys() for training in self.trainings for judged in training.values()]
        known = [judge for judge in every[0] if all(judge in each for each in every)]
        return [self.judge, *(judge for judge in known if judge != self.judge)]

    def right(self, name: str, judge: str | None = None) -> np.ndarray:
        """1 where the judge prefers the chosen answer, 0.5 at a tie: [S, P]."""
        return np.stack([each[name].right[judge or self.judge] for each in self.trainings])


def compare(
    methods: Sequence[Method],
    set_names: Sequence[str],
    seeds: Sequence[int],
    planned_seeds: Sequence[int],
    sweep: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What comparison.json says.

    Args:
        set_names: the first is that of the training distribution.
        seeds: of the trainings that there are, in the order of each method's trainings.
        planned_seeds: of all trainings that there will be.
        sweep: name of a swept option -> what is said of it; None where nothing is swept.

    Returns:
        seeds; planned_seeds; sets; pairs: the number in each set; methods: name -> judge and, for each set and for the
        mean of the others than the first, accuracy as value, low, high (bootstrap over prompts and seeds) and by_seed;
        other_judges: the same for the method's other heads; differences: "A - B" -> the same, paired. In a sweep, where
        B is the Baseline of a cell: sweep; cells: labels, baseline and methods of each; and gains of a method: Baseline
        -> judge of the method -> the same.

    Raises:
        DataError: the methods were not evaluated on the same pairs.
    """
    check_same_pairs(methods, set_names, seeds)
    prompts = {name: methods[0].trainings[0][name].prompts for name in set_names}
    named = {method.name: method for method in methods}
    accuracy = over_sets(
        {(method.name, judge): [(1, method, judge)] for method in methods for judge in method.judges}, prompts
    )
    baselines = list(dict.fromkeys(name for method in methods for name in method.cells))
    pairs = (
        [(method, named[name], method.judges) for method in methods for name in method.cells if name != method.name]
        if sweep is not None
        else [(later, earlier, [later.judge]) for earlier, later in itertools.combinations(methods, 2)]
    )
    gained = over_sets(
        {
            (later.name, earlier.name, judge): [(1, later, judge), (-1, earlier, earlier.judge)]
            for later, earlier, judges in pairs
            for judge in judges
        },
        prompts,
        are_shares=False,
    )
    results: dict[str, Any] = {
        "seeds": list(seeds),
        "planned_seeds": list(planned_seeds),
        "sets": list(set_names),
        "pairs": {name: len(prompts[name]) for name in set_names},
        "methods": {
            method.name: {
                "judge": method.judge,
                "accuracy": accuracy[method.name, method.judge],
                "other_judges": {judge: accuracy[method.name, judge] for judge in method.judges[1:]},
            }
            for method in methods
        },
        "differences": {
            f"{later.name} - {earlier.name}": gained[later.name, earlier.name, later.judge]
            for later, earlier, _ in pairs
        },
    }
    if sweep is None:
        return results
    for later, earlier, judges in pairs:
        gains = {judge: gained[later.name, earlier.name, judge] for judge in judges}
        results["methods"][later.name].setdefault("gains", {})[earlier.name] = gains
    cells = [
        {
            "baseline": baseline,
            "labels": dict(named[baseline].cells[baseline]),
            "methods": {method.name: dict(method.cells[baseline]) for method in methods if baseline in method.cells},
        }
        for baseline in baselines
    ]
    return results | {"sweep": dict(sweep), "cells": cells}


Terms = Sequence[tuple[int, Method, str]]
"""A sum, over its terms, of a sign times what a judge of a method got right."""


def over_sets(
    columns: Mapping[Hashable, Terms], prompts: Mapping[str, Sequence[str]], are_shares: bool = True
) -> dict[Hashable, dict[str, Any]]:
    """For each column, name of a set -> value, low, high and by_seed; and for the mean of the others than the first.

    Args:
        prompts: name of a set -> [P].
    """
    found: dict[Hashable, dict[str, Any]] = {}
    others, keys = list(prompts)[1:], list(columns)
    for first in range(0, len(keys), COLUMNS_AT_ONCE):
        some = keys[first : first + COLUMNS_AT_ONCE]
        values = {name: {key: summed(columns[key], name) for key in some} for name in prompts}
        of_set = {name: estimates(values[name], prompts[name], are_shares) for name in prompts}
        by_seed = {name: {key: values[name][key].mean(axis=1) for key in some} for name in prompts}
        if others:
            columns_of_others = {key: [values[name][key] for name in others] for key in some}
            of_set[OTHERS] = means_of_sets(columns_of_others, [prompts[name] for name in others])
            by_seed[OTHERS] = {key: np.mean([by_seed[name][key] for name in others], axis=0) for key in some}
        for key in some:
            found[key] = {name: each[key] | {"by_seed": by_seed[name][key].tolist()} for name, each in of_set.items()}
    return found


def summed(terms: Terms, name: str) -> np.ndarray:
    """The terms on one set: [S, P] float64."""
    return np.sum([sign * method.right(name, judge).astype(np.float64) for sign, method, judge in terms], axis=0)


def check_same_pairs(methods: Sequence[Method], set_names: Sequence[str], seeds: Sequence[int]) -> None:
    """Raises DataError that names the first training with other pairs than the first training of all."""
    trainings = [
        (f"{method.name} with seed {seed}", judged)
        for method in methods
        for seed, judged in zip(seeds, method.trainings, strict=True)
    ]
    first, expected = trainings[0]
    for name in set_names:
        for training, judged in trainings:
            if name not in judged:
                raise DataError(f"{training} was not evaluated on {name}")
            if (judged[name].ids, judged[name].prompts) != (expected[name].ids, expected[name].prompts):
                raise DataError(
                    f"{training} was not evaluated on the same pairs of {name} as {first}: the data or options of "
                    "data.eval have changed between the two; remove the run that is out of date to train it anew"
                )
