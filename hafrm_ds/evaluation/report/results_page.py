"""What stands on the page of one run or one evaluation."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from hafrm_ds.config import options_of
from hafrm_ds.data.report import DataReport, Example
from hafrm_ds.data.tables import (
    Cell,
    Table,
    count,
    facts_table,
    number,
    number_estimate,
    share,
    share_estimate,
)
from hafrm_ds.evaluation.bootstrap import EstimateJson
from hafrm_ds.evaluation.calibration import sigmoid
from hafrm_ds.evaluation.pair_scores import SIDES, PairScores
from hafrm_ds.evaluation.report.charts import (
    Chart,
    Interval,
    histogram_chart,
    intervals_chart,
    length_chart,
    reliability_chart,
    short,
)
from hafrm_ds.evaluation.report.curves import (
    EVALUATION_PANELS,
    JUDGE_SERIES,
    TRAINING_PANELS,
    how_rows_are_drawn,
    panel_charts,
)
from hafrm_ds.evaluation.report.reading import Results, SetResult
from hafrm_ds.evaluation.terminal import JUDGES, accuracy_table, agreement_of, length_table

ACCURACY_NOTE = (
    "Share of pairs in which the chosen answer gets the higher value; a tie counts half. Below it the 95% interval, "
    "bootstrapped over prompts. reward: the reward head; implicit: beta * (log pi - log pi_ref), from the policy; "
    "logprob: the summed log-prob; longer: whoever always takes the longer answer, a yardstick."
)
HISTOGRAMS = {"reward": "score of the reward head", "implicit": "beta * (log pi - log pi_ref)"}
MAX_LISTED_SOURCES = 40


@dataclass(frozen=True)
class Folded:
    """A table that is shown when it is asked for."""

    caption: str
    inside: Table


@dataclass(frozen=True)
class Tile:
    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Mistake:
    """A pair that a judge gets confidently wrong. scores: of each judge."""

    title: str
    example: Example
    scores: Table


@dataclass(frozen=True)
class SetSection:
    name: str
    facts: str
    problem: str
    charts: list[Chart]
    tables: list[Table]
    mistakes: list[Mistake]


@dataclass(frozen=True)
class DataSection:
    report: DataReport
    tables: list[Table]


@dataclass
class ResultsPage:
    """The parts of results.html, in their order; what is empty is left out."""

    title: str
    subtitle: str
    tiles: list[Tile]
    accuracies: Table | None
    sets: list[SetSection]
    benchmarks: list[Table]
    training: list[Chart]
    training_note: str
    data: dict[str, DataSection]
    appendix: list[Folded]
    appendix_title: str
    config: str
    accuracy_note: str = field(default=ACCURACY_NOTE)


def results_page(results: Results) -> ResultsPage:
    kind = "Run" if results.is_run else "Evaluation"
    subtitle = [results.state]
    if results.best and results.best.get("value") is not None:
        best = results.best
        subtitle.append(f"best {best['metric']} {short(best['value'])} at step {best['step']:,}")
    if started := results.environment.get("started"):
        subtitle.append(f"started {str(started)[:16].replace('T', ' ')} UTC")
    subtitle.append(str(results.folder.resolve()))
    return ResultsPage(
        title=f"{kind} {results.name}",
        subtitle=" · ".join(subtitle),
        tiles=list(tiles(results)),
        accuracies=sets_table(results.sets) if results.sets else None,
        sets=[set_section(name, result) for name, result in results.sets.items()],
        benchmarks=[benchmark_table(found) for found in results.benchmarks.values()],
        training=panel_charts(TRAINING_PANELS, results.training),
        training_note=how_rows_are_drawn(results.training),
        data={name: DataSection(report, report.tables()) for name, report in results.data.items()},
        appendix=list(appendix(results)),
        appendix_title="Configuration and versions" if results.config else "Versions",
        config=yaml.safe_dump(results.config, sort_keys=False, allow_unicode=True) if results.config else "",
    )


# ---- first sight ----------------------------------------------------------------------------------------------------


def tiles(results: Results) -> Iterator[Tile]:
    """The figures that a reader looks for first."""
    options: dict[str, Any] = dict(options_of(results.config))
    training = results.training
    for name, result in list(results.sets.items())[:1]:
        for judge, estimate in result.accuracy.items():
            if judge in HISTOGRAMS:
                cell = share_estimate(estimate)
                yield Tile(f"accuracy, {judge}", cell.text, f"{name}{f', {cell.detail}' if cell.detail else ''}")
    if {"objective.alpha", "objective.beta", "optimizer.learning_rate"} <= options.keys():
        rates = f"learning rate {options['optimizer.learning_rate']:g}, beta {options['objective.beta']:g}"
        yield Tile("objective", objective_in_words(results), rates)
    if len(training):
        seconds = training.known("seconds")
        each = f"{short(float(f'{np.median(seconds):.3g}'))} s each" if len(seconds) else ""
        pairs = options.get("batch.global_batch_size")
        yield Tile("steps", f"{training.steps[-1]:,}", ", ".join(filter(None, [pairs and f"{pairs:,} pairs", each])))
    if len(speeds := training.known("tokens_per_second")):
        utilisation = training.known("mfu")
        detail = f"median; MFU {np.median(utilisation):.0%}" if len(utilisation) else "median"
        yield Tile("tokens a second", short(float(f"{np.median(speeds):.3g}")), detail)
    if len(memory := training.known("memory_gib")):
        processes = results.environment.get("world_size")
        detail = f"fullest of {processes} process{'es' if processes != 1 else ''}" if processes else ""
        yield Tile("peak memory", f"{memory.max():.2f} GiB", detail)
    if model := options.get("model.name_or_path"):
        rank = options.get("model.lora.rank")
        yield Tile("model", Path(model).name, f"{options.get('model.dtype')}{f', LoRA rank {rank}' if rank else ''}")


def objective_in_words(results: Results) -> str:
    """For example: reward + 0.2 dpo."""
    objective = results.config.get("objective", {})
    parts = {"reward": objective.get("rm_weight"), objective.get("policy_loss"): objective.get("alpha")}
    return " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in parts.items() if weight)


def sets_table(sets: dict[str, SetResult]) -> Table:
    """A row for each set, a column for each judge and the yardstick."""
    judges = {judge: judge for judge in JUDGES if any(judge in result.accuracy for result in sets.values())}
    parts = [
        (
            name,
            {
                "pairs": result.pairs,
                "accuracy": result.accuracy,
                "yardsticks": (result.analysis or {}).get("yardsticks"),
            },
        )
        for name, result in sets.items()
    ]

    def longer(part: dict[str, Any]) -> Cell:
        return share_estimate(part["yardsticks"] and part["yardsticks"]["longer"])

    return accuracy_table("accuracy", parts, judges, {"longer": longer})


# ---- one evaluation set ---------------------------------------------------------------------------------------------


def set_section(name: str, result: SetResult) -> SetSection:
    scores, analysis = result.scores, result.analysis
    charts = panel_charts(EVALUATION_PANELS, result.over_steps, is_dotted=True) if len(result.over_steps) > 1 else []
    facts = []
    if scores is not None and scores.step is not None:
        facts.append(f"after step {scores.step:,}")
    if analysis is not None:
        facts = [f"{analysis['pairs']:,} pairs of {analysis['prompts']:,} prompts", *facts]
        ties = {judge: number for judge, number in analysis["ties"].items() if number}
        facts += [f"{number:,} ties of {judge}" for judge, number in ties.items()]
        charts += analysis_charts(scores, analysis)
    return SetSection(
        name=name,
        facts=" · ".join(facts),
        problem=result.problem,
        charts=charts,
        tables=analysis_tables(analysis) if analysis is not None else [],
        mistakes=mistakes(scores) if scores is not None and scores.texts else [],
    )


def analysis_charts(scores: PairScores | None, analysis: dict[str, Any]) -> Iterator[Chart]:
    series = {judge: JUDGE_SERIES[judge] for judge in JUDGES if judge in analysis["accuracy"]}
    for judge, unit in HISTOGRAMS.items():
        if scores is not None and judge in scores.judges:
            values = scores.judges[judge]
            yield histogram_chart(
                f"Distribution of the {JUDGES[judge]}", unit, {side: values[:, k] for k, side in enumerate(SIDES)}
            )
    if analysis["calibration"]:
        yield reliability_chart("Reliability", analysis["calibration"], series)
    if analysis["by_length_difference"]:
        yield length_chart("Accuracy by length difference", analysis["by_length_difference"], series)
    sources = by_size(analysis["by_source"])
    if len(sources) > 1:
        groups = {
            f"{source} ({part['pairs']:,})": intervals(part["accuracy"])
            for source, part in list(sources.items())[:MAX_LISTED_SOURCES]
        }
        title = "Accuracy by source"
        if len(sources) > MAX_LISTED_SOURCES:
            title += f": the largest {MAX_LISTED_SOURCES} of {len(sources)}"
        yield intervals_chart(title, groups, series)


def by_size(sources: dict[str, dict]) -> dict[str, dict]:
    return dict(sorted(sources.items(), key=lambda item: -item[1]["pairs"]))


def intervals(accuracy: dict[str, EstimateJson]) -> dict[str, Interval]:
    return {judge: Interval(**estimate) for judge, estimate in accuracy.items()}


def analysis_tables(analysis: dict[str, Any]) -> list[Table]:
    """Everything that the charts of a set show, in figures."""
    judges = [judge for judge in JUDGES if judge in analysis["accuracy"]]
    calibration = analysis["calibration"]
    rows = [
        ("accuracy", [share_estimate(analysis["accuracy"][judge]) for judge in judges]),
        ("ties", [count(analysis["ties"][judge]) for judge in judges]),
        ("mean margin", [number_estimate(analysis["margin"][judge]) for judge in judges]),
    ]
    for label, key, form in (
        ("expected calibration error (ECE)", "ece", share),
        ("Brier score", "brier", number),
        ("log loss", "log_loss", number),
        ("fitted temperature", "temperature", number),
        ("ECE at this temperature", "ece_at_temperature", share),
        ("Brier score at this temperature", "brier_at_temperature", number),
    ):
        rows.append((label, [form(calibration[judge][key]) if judge in calibration else Cell("") for judge in judges]))
    rows += [
        (f"agreement with {other}", [share(agreement_of(analysis["agreement"], judge, other)) for judge in judges])
        for other in judges[1:]
    ]
    yardsticks = [
        (f"the {kind} answer", [share_estimate(analysis["yardsticks"][kind])]) for kind in ("longer", "shorter")
    ]
    return [
        Table(rows, ("", *judges)),
        length_table("accuracy, chosen longer by", analysis, {judge: judge for judge in judges}),
        accuracy_table(
            "accuracy by source", by_size(analysis["by_source"]).items(), {judge: judge for judge in judges}
        ),
        Table(yardsticks, ("whoever always takes", "accuracy")),
    ]


def mistakes(scores: PairScores) -> list[Mistake]:
    """The kept pairs, the most confident first."""
    judges = scores.judges
    first = next(iter(judges))
    margins = {judge: scores.margins(judge) for judge in judges}
    found = []
    for place in sorted(scores.texts, key=lambda place: margins[first][place]):
        margin = margins[first][place]
        sure = f", {sigmoid(-margin):.0%} sure of the rejected answer" if first in HISTOGRAMS else ""
        rows = [
            (judge, [*(number(float(value)) for value in values[place]), number(float(margins[judge][place]))])
            for judge, values in judges.items()
        ]
        rows.append(("tokens", [*map(count, scores.num_tokens[place]), Cell("")]))
        title = f"margin {short(float(f'{margin:.3g}'))} of {JUDGES[first]}{sure}"
        found.append(Mistake(title, scores.texts[place], Table(rows, ("", *SIDES, "margin"))))
    return found


# ---- the rest -------------------------------------------------------------------------------------------------------


def benchmark_table(found: dict[str, Any]) -> Table:
    """Scores of each judge on a benchmark: categories with their subsets and details, then the whole.

    Args:
        found: cut (questions whose prompt was cut), and judges: judge -> as `Benchmark.summarize` gives it.
    """
    results = {judge: found["judges"][judge] for judge in JUDGES if judge in found["judges"]}
    first = next(iter(results.values()))
    rows = []

    def add(name: str, parts: list[dict[str, Any]], with_details: bool = True) -> None:
        """parts: the same part of each judge's result."""
        scores = [Cell(share(part["score"]).text, f"{part['ties']:,} ties" if part["ties"] else "") for part in parts]
        rows.append((name, [count(parts[0]["questions"]), *scores]))
        for detail in parts[0]["details"] if with_details else ():
            rows.append((f"{name}, {detail}", [Cell(""), *(share(part["details"].get(detail)) for part in parts)]))

    for name, category in first["categories"].items():
        categories = [result["categories"][name] for result in results.values()]
        add(name, categories)
        for subset in category["subsets"] if len(category["subsets"]) > 1 else ():
            add(f"{name} / {subset}", [each["subsets"][subset] for each in categories], with_details=False)
    add("overall", list(results.values()))
    cut = f" ({found['cut']:,} questions with a cut prompt)" if found["cut"] else ""
    left_out = f" ({found['left_out']:,} questions left out)" if found.get("left_out") else ""
    return Table(rows, ("", "questions", *results), caption=f"{first['title']}{cut}{left_out}")


def appendix(results: Results) -> Iterator[Folded]:
    environment = dict(results.environment)
    if isinstance(environment.get("command"), list):
        environment["command"] = shlex.join(map(str, environment["command"]))
    if environment:
        yield Folded("Versions, hardware and command", facts_table(options_of(environment)))
    if len(results.checks):
        rows = [(name, [number(float(values[-1]))]) for name, values in results.checks.columns.items()]
        yield Folded("Checks at the start", Table(rows, ("check", "value")))
    if len(results.checkpoints):
        columns = results.checkpoints.columns
        rows = [
            (f"step {step:,}", [number(columns["seconds"][place]), Cell(f"{columns['bytes'][place] / 2**30:.2f}")])
            for place, step in enumerate(results.checkpoints.steps)
        ]
        yield Folded("Checkpoints", Table(rows, ("saved after", "seconds", "GiB")))
