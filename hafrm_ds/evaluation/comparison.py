"""Several methods, each trained with several seeds, on the same sets of pairs: accuracies and paired differences.

Legend: P pairs of a set, S seeds.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table

from hafrm_ds.data.report import number_table
from hafrm_ds.errors import DataError
from hafrm_ds.evaluation.bootstrap import estimate, exact_at_the_ends, mean_of_sets
from hafrm_ds.evaluation.calibration import correctness
from hafrm_ds.evaluation.pair_scores import PairScores
from hafrm_ds.evaluation.tables import JUDGES, interval

OTHERS = "mean of the others"


@dataclass(frozen=True)
class Method:
    """Trainings that differ in their seed alone.

    judge: what takes its sides: the reward head, or the implicit reward of a training without one.
    scores: for each seed, name of a set -> scores of its pairs.
    """

    name: str
    judge: str
    scores: Sequence[dict[str, PairScores]]

    def right(self, name: str, judge: str | None = None) -> np.ndarray:
        """1 where the judge prefers the chosen answer, 0.5 at a tie: [S, P]."""
        return np.stack([correctness(each[name].margins(judge or self.judge)) for each in self.scores])


def compare(methods: Sequence[Method], set_names: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """What comparison.json says.

    Args:
        set_names: the first is that of the training distribution.

    Returns:
        seeds; sets; methods: name -> judge and, for each set and for the mean of the others than the first, accuracy
        as value, low, high (bootstrap over prompts and seeds) and by_seed; other_judges: the same for the method's
        other heads; differences: "A - B" -> the same, paired.

    Raises:
        DataError: the methods were not evaluated on the same pairs.
    """
    check_same_pairs(methods, set_names)
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


def check_same_pairs(methods: Sequence[Method], set_names: Sequence[str]) -> None:
    for name in set_names:
        first = methods[0].scores[0].get(name)
        for method in methods:
            for scores in method.scores:
                if name not in scores or scores[name].ids != first.ids or scores[name].prompts != first.prompts:
                    raise DataError(f"{method.name} was not evaluated on the same pairs of {name} as {methods[0].name}")


# ---- the table -----------------------------------------------------------------------------------------------------


def render_comparison(results: dict[str, Any]) -> RenderableType:
    """Methods by sets, then their paired differences in points."""
    columns = [*results["sets"], *([OTHERS] if len(results["sets"]) > 2 else [])]
    seeds = "1 seed" if len(results["seeds"]) == 1 else f"{len(results['seeds'])} seeds"
    accuracy = number_table(f"Accuracy [95%], {seeds}", "judge", *columns)
    for name, method in results["methods"].items():
        add_row(accuracy, name, method["judge"], [interval(method["accuracy"][column]) for column in columns])
        for judge, values in method["other_judges"].items():
            add_row(accuracy, "", judge, [interval(values[column]) for column in columns], style="dim")
    differences = number_table(f"Difference in points [95%], paired, {seeds}", *columns)
    for name, values in results["differences"].items():
        differences.add_row(name, *(points(values[column]) for column in columns))
    return Group(accuracy, differences)


def add_row(table: Table, name: str, judge: str, cells: list[str], style: str | None = None) -> None:
    table.add_row(name, JUDGES[judge], *cells, style=style)


def points(value: dict[str, Any]) -> str:
    """A difference of shares in percentage points."""
    return f"{100 * value['value']:+.1f} [{100 * value['low']:+.1f}, {100 * value['high']:+.1f}]"
