"""What stands on the page that lays several runs, or evaluations, side by side."""

from dataclasses import dataclass, field

import numpy as np

from hafrm_ds.evaluation.report.charts import Chart, Key, intervals_chart
from hafrm_ds.evaluation.report.curves import comparison_charts
from hafrm_ds.evaluation.report.reading import JUDGES, Results, differences
from hafrm_ds.evaluation.report.results_page import ACCURACY_NOTE, JUDGE_NAMES, intervals, objective_in_words
from hafrm_ds.evaluation.report.tables import Cell, Folded, Table, count, number, share_estimate, value_of_option

OF_THE_PLACE = ("output_dir", "resume")
"""Options that differ between any two runs."""


@dataclass
class ComparisonPage:
    """The parts of comparison.html, in their order; what is empty is left out."""

    title: str
    subtitle: str
    overview: Table
    accuracies: list[Table]
    accuracy_charts: list[Chart]
    differences: Table | None
    environments: Folded | None
    curves: list[Chart]
    legend: tuple[Key, ...]
    accuracy_note: str = field(default=ACCURACY_NOTE)
    curves_note: str = "Curves that change from batch to batch are running means over a fifteenth of each run."


def comparison_page(results: list[Results]) -> ComparisonPage:
    """Args: results: with names that tell them apart."""
    names = [each.name for each in results]
    options = differences([each.config for each in results])
    environments = differences([each.environment for each in results])
    return ComparisonPage(
        title=f"{len(results)} {'runs' if all(each.is_run for each in results) else 'models'} side by side",
        subtitle=" · ".join(names),
        overview=overview(results),
        accuracies=list(filter(None, (judge_table(judge, results) for judge in JUDGES))),
        accuracy_charts=list(filter(None, (judge_chart(judge, results) for judge in JUDGES))),
        differences=side_by_side({name: row for name, row in options.items() if name not in OF_THE_PLACE}, names),
        environments=Folded("Versions, hardware and commands that differ", side_by_side(environments, names))
        if environments
        else None,
        curves=comparison_charts(results),
        legend=tuple(Key(name, place) for place, name in enumerate(names)),
    )


def overview(results: list[Results]) -> Table:
    rows = []
    for each in results:
        seconds, speed = each.training.known("seconds"), each.training.known("tokens_per_second")
        memory = each.training.known("memory_gib")
        rows.append(
            (
                each.name,
                [
                    Cell(objective_in_words(each)),
                    count(int(each.training.steps[-1]) if len(each.training) else None),
                    number(float(f"{np.median(seconds):.3g}") if len(seconds) else None),
                    count(float(np.median(speed)) if len(speed) else None),
                    number(float(f"{memory.max():.3g}") if len(memory) else None),
                    Cell(each.state),
                ],
            )
        )
    return Table(rows, ("", "objective", "steps", "seconds a step", "tokens/s", "peak GiB", "state"))


def judge_table(judge: str, results: list[Results]) -> Table | None:
    """Runs x sets; None if no run has this judge."""
    sets = [name for name in all_sets(results) if any(judge in accuracy_of(each, name) for each in results)]
    if not sets:
        return None
    rows = [(each.name, [share_estimate(accuracy_of(each, name).get(judge)) for name in sets]) for each in results]
    longer = {name: each.sets[name].analysis for name in sets for each in results if name in each.sets}
    cells = [share_estimate(longer[name]["yardsticks"]["longer"] if longer[name] else None) for name in sets]
    return Table([*rows, ("the longer answer", cells)], ("", *sets), caption=f"Accuracy, {JUDGE_NAMES[judge]}")


def judge_chart(judge: str, results: list[Results]) -> Chart | None:
    groups = {
        name: {
            each.name: intervals(accuracy_of(each, name))[judge] for each in results if judge in accuracy_of(each, name)
        }
        for name in all_sets(results)
    }
    groups = {name: found for name, found in groups.items() if found}
    if not groups:
        return None
    series = {each.name: place for place, each in enumerate(results)}
    return intervals_chart(f"Accuracy, {JUDGE_NAMES[judge]}", groups, series, legend=False)


def all_sets(results: list[Results]) -> list[str]:
    return list(dict.fromkeys(name for each in results for name in each.sets))


def accuracy_of(results: Results, name: str) -> dict[str, dict[str, float]]:
    return results.sets[name].accuracy if name in results.sets else {}


def side_by_side(values: dict[str, list], names: list[str]) -> Table | None:
    if not values:
        return None
    return Table([(name, list(map(value_of_option, row))) for name, row in values.items()], ("", *names), words=True)
