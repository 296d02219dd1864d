"""What stands on the page that lays several runs, or evaluations, side by side."""

from typing import Any

import numpy as np

from hafrm_ds.data.tables import Cell, Estimate, Table, count, number, rounded, share_estimate, value_of_option
from hafrm_ds.evaluation.figures import JUDGES
from hafrm_ds.evaluation.report.charts import intervals_chart
from hafrm_ds.evaluation.report.curves import comparison_charts
from hafrm_ds.evaluation.report.drawing import Chart, Key
from hafrm_ds.evaluation.report.reading import Results, differences, known
from hafrm_ds.evaluation.report.results_page import objective_in_words

OF_THE_PLACE = ("output_dir", "resume")
"""Options that differ between any two runs."""


def comparison_page(results: list[Results]) -> dict[str, Any]:
    """The parts of comparison.html, in their order; what is empty is left out. The page of methods shows all but the
    title below the methods.

    Args:
        results: with names that tell them apart.
    """
    names = [each.name for each in results]
    return {
        "title": f"{len(results)} {'runs' if all(each.is_run for each in results) else 'models'} side by side",
        "subtitle": " · ".join(names),
        "overview": overview(results),
        "accuracies": accuracy_tables(results),
        "accuracy_charts": [chart for judge in JUDGES if (chart := judge_chart(judge, results)) is not None],
        "differences": differences_table({each.name: each.config for each in results}, left_out=OF_THE_PLACE),
        "environments": differences_table({each.name: each.environment for each in results}),
        "curves": comparison_charts(results),
        "legend": [Key(name, place) for place, name in enumerate(names)],
    }


def overview(results: list[Results]) -> Table:
    rows = []
    for each in results:
        seconds, speed = known(each.training, "seconds"), known(each.training, "tokens_per_second")
        memory = known(each.training, "memory_gib")
        rows.append(
            (
                each.name,
                [
                    Cell(objective_in_words(each)),
                    count(int(each.training.index[-1]) if len(each.training) else None),
                    number(rounded(np.median(seconds)) if len(seconds) else None),
                    count(float(np.median(speed)) if len(speed) else None),
                    number(rounded(memory.max()) if len(memory) else None),
                    Cell(each.state, words=True),
                ],
            )
        )
    return Table(rows, ("", "objective", "steps", "seconds a step", "tokens/s", "peak GiB", "state"))


def accuracy_tables(results: list[Results]) -> list[Table]:
    """Accuracies of every run by every judge on every set: a table for each judge, or for each set if these are
    fewer."""
    sets = {name: judges_of(results, name) for name in all_sets(results)}
    judges = [judge for judge in JUDGES if any(judge in known for known in sets.values())]
    if len(sets) < len(judges):
        columns = {f"Accuracy on {name}": {judge: (name, judge) for judge in known} for name, known in sets.items()}
    else:
        columns = {
            f"Accuracy, {JUDGES[judge]}": {name: (name, judge) for name, known in sets.items() if judge in known}
            for judge in judges
        }
    return [accuracy_table(caption, results, each) for caption, each in columns.items()]


def judges_of(results: list[Results], name: str) -> list[str]:
    """The judges that any of the runs has on a set."""
    return [judge for judge in JUDGES if any(judge in accuracy_of(each, name) for each in results)]


def accuracy_table(caption: str, results: list[Results], columns: dict[str, tuple[str, str]]) -> Table:
    """A row for each run that has any of it, and the yardstick. columns: title -> (set, judge)."""
    rows = [
        (each.name, [share_estimate(accuracy_of(each, name).get(judge)) for name, judge in columns.values()])
        for each in results
        if any(judge in accuracy_of(each, name) for name, judge in columns.values())
    ]
    rows.append(("the longer answer", [share_estimate(longer_answer(results, name)) for name, _ in columns.values()]))
    return Table(rows, ("", *columns), caption=caption)


def longer_answer(results: list[Results], name: str) -> Estimate | None:
    """Accuracy of always taking the longer answer; the first run that knows it."""
    analyses = [each.sets[name].analysis for each in results if name in each.sets]
    return next((analysis["yardsticks"]["longer"] for analysis in analyses if analysis), None)


def judge_chart(judge: str, results: list[Results]) -> Chart | None:
    groups = {
        name: {each.name: accuracy_of(each, name)[judge] for each in results if judge in accuracy_of(each, name)}
        for name in all_sets(results)
    }
    groups = {name: found for name, found in groups.items() if found}
    if not groups:
        return None
    series = {each.name: place for place, each in enumerate(results)}
    return intervals_chart(f"Accuracy, {JUDGES[judge]}", groups, series, legend=False)


def all_sets(results: list[Results]) -> list[str]:
    return list(dict.fromkeys(name for each in results for name in each.sets))


def accuracy_of(results: Results, name: str) -> dict[str, Estimate]:
    return results.sets[name].accuracy if name in results.sets else {}


def differences_table(trees: dict[str, dict], left_out: tuple[str, ...] = ()) -> Table | None:
    """What differs between nested mappings, by the names of their runs; those that know nothing are left out."""
    known = {name: tree for name, tree in trees.items() if tree}
    found = differences(list(known.values()))
    rows = [(name, list(map(value_of_option, values))) for name, values in found.items() if name not in left_out]
    return Table(rows, ("", *known), words=True) if rows else None
