"""Several methods, each trained with several seeds, on the same sets of pairs: accuracies and paired differences.

Legend: P pairs of a set, S seeds.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType

from hafrm_ds.data.tables import Cell, Table, share_estimate
from hafrm_ds.errors import DataError
from hafrm_ds.evaluation.bootstrap import estimate, exact_at_the_ends, mean_of_sets
from hafrm_ds.evaluation.calibration import correctness
from hafrm_ds.evaluation.figures import JUDGES
from hafrm_ds.evaluation.pair_scores import PairScores

COMPARISON_FILE = "comparison.json"
"""The results of a comparison, in its folder."""
OTHERS = "mean of the others"


def run_folder(folder: Path, method: str, seed: int) -> Path:
    """Where a training lies in the folder of a comparison."""
    return folder / "runs" / f"{method}-seed{seed}"


@dataclass(frozen=True)
class Method:
    """Trainings that differ in their seed alone.

    judge: by which the method is judged: the reward head, or the implicit reward of a training without one.
    scores: for each seed, name of a set -> scores of its pairs.
    """

    name: str
    judge: str
    scores: Sequence[dict[str, PairScores]]

    def right(self, name: str, judge: str | None = None) -> np.ndarray:
        """1 where the judge prefers the chosen answer, 0.5 at a tie: [S, P]."""
        return np.stack([correctness(each[name].margins(judge or self.judge)) for each in self.scores])


def compare(
    methods: Sequence[Method], set_names: Sequence[str], seeds: Sequence[int], planned_seeds: Sequence[int]
) -> dict[str, Any]:
    """What comparison.json says.

    Args:
        set_names: the first is that of the training distribution.
        seeds: of the trainings that there are, in the order of each method's scores.
        planned_seeds: of all trainings that there will be.

    Returns:
        seeds; planned_seeds; sets; pairs: the number in each set; methods: name -> judge and, for each set and for the
        mean of the others than the first, accuracy as value, low, high (bootstrap over prompts and seeds) and by_seed;
        other_judges: the same for the method's other heads; differences: "A - B" -> the same, paired.

    Raises:
        DataError: the methods were not evaluated on the same pairs.
    """
    check_same_pairs(methods, set_names, seeds)
    prompts = {name: methods[0].scores[0][name].prompts for name in set_names}

    def over_sets(values: dict[str, np.ndarray], are_shares: bool = True) -> dict[str, Any]:
        found = {name: estimate(values[name], prompts[name]) for name in set_names}
        if are_shares:
            found = {name: exact_at_the_ends(each) for name, each in found.items()}
        by_seed = {name: values[name].mean(axis=1) for name in set_names}
        if others := set_names[1:]:
            found[OTHERS] = mean_of_sets([values[name] for name in others], [prompts[name] for name in others])
            by_seed[OTHERS] = np.mean([by_seed[name] for name in others], axis=0)
        return {name: each.to_json() | {"by_seed": by_seed[name].tolist()} for name, each in found.items()}

    right = {method.name: {name: method.right(name) for name in set_names} for method in methods}
    return {
        "seeds": list(seeds),
        "planned_seeds": list(planned_seeds),
        "sets": list(set_names),
        "pairs": {name: len(prompts[name]) for name in set_names},
        "methods": {
            method.name: {
                "judge": method.judge,
                "accuracy": over_sets(right[method.name]),
                "other_judges": {
                    judge: over_sets({name: method.right(name, judge) for name in set_names})
                    for judge in method.scores[0][set_names[0]].judges
                    if judge != method.judge
                },
            }
            for method in methods
        },
        "differences": {
            f"{later.name} - {earlier.name}": over_sets(
                {name: right[later.name][name] - right[earlier.name][name] for name in set_names}, are_shares=False
            )
            for earlier, later in itertools.combinations(methods, 2)
        },
    }


def check_same_pairs(methods: Sequence[Method], set_names: Sequence[str], seeds: Sequence[int]) -> None:
    """Raises DataError that names the first training with other pairs than the first training of all."""
    trainings = [
        (f"{method.name} with seed {seed}", scores)
        for method in methods
        for seed, scores in zip(seeds, method.scores, strict=True)
    ]
    first, expected = trainings[0]
    for name in set_names:
        for training, scores in trainings:
            if name not in scores:
                raise DataError(f"{training} was not evaluated on {name}")
            if scores[name].ids != expected[name].ids or scores[name].prompts != expected[name].prompts:
                raise DataError(
                    f"{training} was not evaluated on the same pairs of {name} as {first}: the data or options of "
                    "data.eval have changed between the two; remove the run that is out of date to train it anew"
                )


# ---- in words and as a table ---------------------------------------------------------------------------------------


def shown_columns(results: dict[str, Any]) -> list[str]:
    """The sets, and the mean of the others than the first where these are several."""
    sets = results["sets"]
    return [*sets, OTHERS] if len(sets) > 2 else list(sets)


def seeds_in_words(results: dict[str, Any]) -> str:
    """How many seeds of how many are in the results."""
    number, planned = len(results["seeds"]), len(results["planned_seeds"])
    if number < planned:
        return f"{number} of {planned} seeds"
    return "1 seed" if number == 1 else f"{number} seeds"


def render_comparison(results: dict[str, Any]) -> RenderableType:
    """Methods by sets, then their paired differences in points."""
    columns, seeds = shown_columns(results), seeds_in_words(results)
    accuracy = accuracy_table(results["methods"], columns, f"Accuracy [95%], {seeds}")
    differences = differences_table(results["differences"], columns, f"Difference in points [95%], paired, {seeds}")
    return Group(accuracy.to_rich(), differences.to_rich())


def accuracy_table(methods: dict[str, Any], columns: list[str], title: str = "", caption: str = "") -> Table:
    """A row for each method and judge, its own judge first."""
    rows = []
    for name, method in methods.items():
        judged = {method["judge"]: method["accuracy"], **method["other_judges"]}
        rows += [
            (f"{name}, {JUDGES[judge]}", [share_estimate(values[column]) for column in columns])
            for judge, values in judged.items()
        ]
    return Table(rows, (title, *columns), caption=caption)


def differences_table(differences: dict[str, Any], columns: list[str], title: str = "", caption: str = "") -> Table:
    """Paired differences in points; on a page, those of each seed below them."""
    rows = []
    for name, values in differences.items():
        seeds = [" · ".join(f"{100 * each:+.1f}" for each in values[column]["by_seed"]) for column in columns]
        rows.append((name, [Cell(points(values[column]), each) for column, each in zip(columns, seeds, strict=True)]))
    return Table(rows, (title, *columns), caption=caption)


def points(value: dict[str, Any]) -> str:
    """A difference of shares in percentage points."""
    ends = "" if value["low"] is None else f" [{100 * value['low']:+.1f}, {100 * value['high']:+.1f}]"
    return f"{100 * value['value']:+.1f}{ends}"
