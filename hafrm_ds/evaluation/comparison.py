"""Several methods, each trained with several seeds, on the same sets of pairs: accuracies and paired differences.

Legend: P pairs of a set, S seeds.
"""

import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from hafrm_ds.errors import DataError
from hafrm_ds.evaluation.bootstrap import estimates, means_of_sets
from hafrm_ds.evaluation.calibration import correctness
from hafrm_ds.evaluation.combined import CombinedJudge
from hafrm_ds.evaluation.figures import JUDGES
from hafrm_ds.evaluation.pair_scores import PairScores

K = TypeVar("K", bound=Hashable)

COMPARISON_FILE = "comparison.json"
"""The results of a comparison, in its folder."""
OTHERS = "mean of the others"
TWO_MODELS = "two_models"
"""A judge of DPO in a comparison: its implicit reward and the reward head of Baseline, combined."""
JUDGE_NAMES = JUDGES | {TWO_MODELS: "implicit reward with Baseline's head"}
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
        right = {}
        for judge in scores.judges:
            margins = scores.margins(judge)
            if not np.isfinite(margins).all():
                place = int(np.flatnonzero(~np.isfinite(margins))[0])
                raise DataError(
                    f"{scores.set}: the {JUDGE_NAMES[judge]} gives {scores.ids[place]} a score that is no number"
                )
            right[judge] = correctness(margins).astype(np.float32)
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
        other_judges: the same for the method's other heads; differences: "A - B" -> the same, paired (`contests`).
        In a sweep also: sweep; cells: labels, baseline and methods of each; and gains of a method: Baseline of a
        cell -> judge of the method -> the same.

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
    gains = {} if sweep is None else gains_over_baselines(methods)
    differences = contests(methods, is_sweep=sweep is not None)
    gained, differing = (over_sets(terms, prompts, are_shares=False) for terms in (gains, differences))
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
        "differences": differing,
    }
    if sweep is None:
        return results
    for name, baseline, judge in gains:
        found = results["methods"][name].setdefault("gains", {}).setdefault(baseline, {})
        found[judge] = gained[name, baseline, judge]
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


def gains_over_baselines(methods: Sequence[Method]) -> dict[tuple[str, str, str], Terms]:
    """Of a sweep, (method, Baseline of a cell that it stands in, its judge) -> the terms of its gain. Two models have
    one in the cell of their Baseline alone."""
    named = {method.name: method for method in methods}
    return {
        (method.name, name, judge): [(1, method, judge), (-1, named[name], named[name].judge)]
        for method in methods
        for name in method.cells
        if name != method.name
        for judge in method.judges
        if judge != TWO_MODELS or name == next(iter(method.cells))
    }


def contests(methods: Sequence[Method], is_sweep: bool) -> dict[str, Terms]:
    """What is compared, "A - B" -> its terms: each method with those before it, by the judge of either. Both heads of
    a method meet the other's judge too, and its rival of two models.

    In a sweep a method meets the Baseline of each cell that it stands in, and its both heads the two models whose
    Baseline that is.
    """
    found: dict[str, Terms] = {}
    for earlier, later in itertools.permutations(methods, 2) if is_sweep else itertools.combinations(methods, 2):
        two, is_baseline = TWO_MODELS in earlier.judges, earlier.name in later.cells
        meets_two = two and (not is_sweep or next(iter(earlier.cells)) in later.cells)
        if not is_sweep or is_baseline:
            found[f"{later.name} - {earlier.name}"] = [(1, later, later.judge), (-1, earlier, earlier.judge)]
        if "combined" not in later.judges:
            continue
        both = f"{later.name}, {JUDGE_NAMES['combined']}"
        if not is_sweep:
            found[f"{both} - {earlier.name}"] = [(1, later, "combined"), (-1, earlier, earlier.judge)]
        if meets_two:
            rival = f"{earlier.name}, {JUDGE_NAMES[TWO_MODELS]}"
            found[f"{both} - {rival}"] = [(1, later, "combined"), (-1, earlier, TWO_MODELS)]
    return found


def over_sets(
    columns: Mapping[K, Terms], prompts: Mapping[str, Sequence[str]], are_shares: bool = True
) -> dict[K, dict[str, Any]]:
    """For each column, name of a set -> value, low, high and by_seed; and for the mean of the others than the first.

    Args:
        prompts: name of a set -> [P].
    """
    found: dict[K, dict[str, Any]] = {}
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
            own, other = judged[name], expected[name]
            # Prompts are named by their tokens, which differ between models: which pairs share one must be the same.
            if own.ids != other.ids or (own.prompts != other.prompts and places(own.prompts) != places(other.prompts)):
                raise DataError(
                    f"{training} was not evaluated on the same pairs of {name} as {first}: the data or options of "
                    "data.eval have changed between the two, and the run that is out of date must be removed to be "
                    "trained anew; or an option that was varied decides which pairs are kept (a length, a template)"
                )


def places(names: Sequence[str]) -> list[int]:
    """Each name as its place among the different ones: [P]."""
    found: dict[str, int] = {}
    return [found.setdefault(name, len(found)) for name in names]
