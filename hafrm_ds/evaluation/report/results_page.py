"""What stands on the page of one run or one evaluation."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from hafrm_ds.config import options_of
from hafrm_ds.data.report import Example
from hafrm_ds.data.tables import Cell, Table, count, facts_table, number, rounded, share_estimate, short
from hafrm_ds.evaluation.calibration import sigmoid
from hafrm_ds.evaluation.figures import (
    JUDGES,
    benchmark_table,
    fit_in_words,
    largest_sources,
    set_tables,
    sets_table,
    unit_of,
)
from hafrm_ds.evaluation.order import GoldOrder
from hafrm_ds.evaluation.pair_scores import SIDES, PairScores
from hafrm_ds.evaluation.report.charts import (
    coverage_chart,
    histogram_chart,
    intervals_chart,
    length_chart,
    reliability_chart,
)
from hafrm_ds.evaluation.report.curves import (
    EVALUATION_PANELS,
    GRADIENT_PANELS,
    JUDGE_SERIES,
    TRAINING_PANELS,
    how_rows_are_drawn,
    panel_charts,
)
from hafrm_ds.evaluation.report.drawing import Chart
from hafrm_ds.evaluation.report.findings import findings
from hafrm_ds.evaluation.report.reading import Results, SetResult, known

HISTOGRAMS = {
    "reward": "score of the reward head",
    "implicit": "beta * (log pi - log pi_ref)",
    "combined": "weighted sum of reward and implicit reward",
}
RANKS = ("1st", "2nd", "3rd", "4th", "5th", "6th", "7th", "8th")
"""Gold ranks whose distributions are drawn, the last one with all below it."""


def results_page(results: Results) -> dict[str, Any]:
    """The parts of results.html, in their order; what is empty is left out."""
    kind = "Run" if results.is_run else "Evaluation"
    subtitle = [results.state]
    if results.best and results.best.get("value") is not None:
        best = results.best
        subtitle.append(f"best {best['metric']} {short(best['value'])} at step {best['step']:,}")
    if started := results.environment.get("started"):
        subtitle.append(f"started {str(started)[:16].replace('T', ' ')} UTC")
    subtitle.append(str(results.folder.resolve()))
    return {
        "title": f"{kind} {results.name}",
        "subtitle": " · ".join(subtitle),
        "tiles": list(tiles(results)),
        "findings": findings(results),
        "accuracies": sets_table({name: each.overview for name, each in results.sets.items()})
        if results.sets
        else None,
        "unit": unit_of(*(each.overview for each in results.sets.values())),
        "sets": [set_section(name, result) for name, result in results.sets.items()],
        "benchmarks": [benchmark_table(found) for found in results.benchmarks.values()],
        "training": panel_charts(TRAINING_PANELS, results.training)
        + panel_charts(GRADIENT_PANELS, results.gradients, is_dotted=True),
        "training_note": how_rows_are_drawn(results.training),
        "data": results.data,
        "appendix": dict(appendix(results)),
        "appendix_title": "Configuration and versions" if results.config else "Versions",
        "config": yaml.safe_dump(results.config, sort_keys=False, allow_unicode=True) if results.config else "",
    }


# ---- first sight ----------------------------------------------------------------------------------------------------


def tiles(results: Results) -> Iterator[tuple[str, str, str]]:
    """The figures that a reader looks for first: (label, value, detail)."""
    options: dict[str, Any] = dict(options_of(results.config))
    training = results.training
    for name, result in list(results.sets.items())[:1]:
        for judge, estimate in result.accuracy.items():
            if judge in HISTOGRAMS:
                cell = share_estimate(estimate)
                yield (f"accuracy, {judge}", cell.text, f"{name}{f', {cell.detail}' if cell.detail else ''}")
    if {"objective.alpha", "objective.beta", "optimizer.learning_rate"} <= options.keys():
        rates = f"learning rate {options['optimizer.learning_rate']:g}, beta {options['objective.beta']:g}"
        yield ("objective", objective_in_words(results), rates)
    if len(training):
        seconds = known(training, "seconds")
        each = f"{short(rounded(np.median(seconds)))} s each" if len(seconds) else ""
        size, report = options.get("batch.global_batch_size"), results.data.get("train")
        batch = f"{size:,} {report.unit if report else 'pairs'}" if size else ""
        yield ("steps", f"{training.index[-1]:,}", ", ".join(filter(None, [batch, each])))
    if len(speeds := known(training, "tokens_per_second")):
        shares = [known(training, name) for name in ("mfu", "mfu_measured")]
        mfu, measured = (f"{np.median(share):.0%}" if len(share) else "" for share in shares)
        detail = "median" + (f"; MFU {mfu}" if mfu else "")
        if measured not in ("", mfu):
            detail += f", {measured} of the measured peak"
        yield ("tokens a second", short(rounded(np.median(speeds))), detail)
    if len(memory := known(training, "memory_gib")):
        processes = results.environment.get("world_size")
        detail = f"fullest of {processes} process{'es' if processes != 1 else ''}" if processes else ""
        yield ("peak memory", f"{memory.max():.2f} GiB", detail)
    if model := options.get("model.name_or_path"):
        rank = options.get("model.lora.rank")
        yield ("model", Path(model).name, f"{options.get('model.dtype')}{f', LoRA rank {rank}' if rank else ''}")


def objective_in_words(results: Results) -> str:
    """For example: reward + 0.2 dpo."""
    objective = results.config.get("objective", {})
    parts = {"reward": objective.get("rm_weight"), objective.get("policy_loss"): objective.get("alpha")}
    words = [name if weight == 1 else f"{weight:g} {name}" for name, weight in parts.items() if weight]
    if share := objective.get("policy_share"):
        words.append(f"{objective.get('policy_loss')} at {share:.0%} of the pull")
    return " + ".join(words)


# ---- one evaluation set ---------------------------------------------------------------------------------------------


def set_section(name: str, result: SetResult) -> dict[str, Any]:
    """What is shown of one evaluation set."""
    scores, analysis = result.scores, result.analysis
    charts = panel_charts(EVALUATION_PANELS, result.over_steps, is_dotted=True) if len(result.over_steps) > 1 else []
    facts = []
    if scores is not None and scores.step is not None:
        facts.append(f"after step {scores.step:,}")
    if analysis is not None:
        facts = [f"{analysis['pairs']:,} {unit_of(analysis)}s of {analysis['prompts']:,} prompts", *facts]
        if "ranking" in analysis:
            facts.insert(1, f"{analysis['answers']:,} answers in {analysis['groups']:,} groups")
        ties = {judge: number for judge, number in analysis["ties"].items() if number}
        facts += [f"{number:,} ties of {judge}" for judge, number in ties.items()]
        charts += analysis_charts(scores, analysis)
    if scores is not None and scores.fit is not None:
        facts.append(fit_in_words(scores.fit))
    return {
        "name": name,
        "facts": " · ".join(facts),
        "problem": result.problem,
        "charts": charts,
        "tables": set_tables(analysis) if analysis is not None else [],
        "mistakes": list(mistakes(scores)) if scores is not None and scores.texts else [],
    }


def analysis_charts(scores: PairScores | None, analysis: dict[str, Any]) -> Iterator[Chart]:
    series, unit = {judge: JUDGE_SERIES[judge] for judge in JUDGES if judge in analysis["accuracy"]}, unit_of(analysis)
    order = None if scores is None else GoldOrder.of(scores)
    for judge, axis in HISTOGRAMS.items():
        if scores is not None and judge in scores.judges:
            values = scores.judges[judge]
            if order is None:
                title, parts = (
                    f"Distribution of the {JUDGES[judge]}",
                    {side: values[:, k] for k, side in enumerate(SIDES)},
                )
            else:
                title, parts = (
                    f"{JUDGES[judge]} by gold rank".capitalize(),
                    by_rank(order, scores.answers.values(values)),
                )
            yield histogram_chart(title, axis, parts)
    if analysis["calibration"]:
        yield reliability_chart("Reliability", analysis["calibration"], series, unit)
    if analysis.get("coverage"):  # older results do not say
        yield coverage_chart(f"Accuracy of the surest {unit}s", analysis["coverage"], series, unit)
    if analysis["by_length_difference"]:
        yield length_chart("Accuracy by length difference", analysis["by_length_difference"], series, unit)
    if len(analysis["by_source"]) > 1:
        sources = largest_sources(analysis)
        groups = {f"{source} ({part['pairs']:,})": part["accuracy"] for source, part in sources.items()}
        yield intervals_chart("Accuracy by source", groups, series)


def by_rank(order: GoldOrder, values: np.ndarray) -> dict[str, np.ndarray]:
    """The values of answers, [N], by their gold rank: its name -> values. Groups without an order are left out."""
    answers = np.concatenate([index.reshape(-1) for index in order.batches])
    ranks, last = order.rank[answers], len(RANKS) - 1
    found = {RANKS[rank]: values[answers[ranks == rank]] for rank in np.unique(ranks[ranks < last])}
    if (lowest := ranks >= last).any():
        found[f"{RANKS[last]} and below"] = values[answers[lowest]]
    return found


def mistakes(scores: PairScores) -> Iterator[tuple[str, Example, Table]]:
    """The pairs that a judge gets confidently wrong, the most confident first: (title, texts, scores of each judge)."""
    judges = scores.judges
    first = next(iter(judges))
    margins = {judge: scores.margins(judge) for judge in judges}
    for place in sorted(scores.texts, key=lambda place: margins[first][place]):
        margin = margins[first][place]
        sure = f", {sigmoid(-margin):.0%} sure of the rejected answer" if first in HISTOGRAMS else ""
        rows = [
            (judge, [*(number(float(value)) for value in values[place]), number(float(margins[judge][place]))])
            for judge, values in judges.items()
        ]
        rows.append(("tokens", [*map(count, scores.num_tokens[place]), Cell("")]))
        title = f"margin {short(rounded(margin))} of {JUDGES[first]}{sure}"
        yield title, scores.texts[place], Table(rows, ("", *SIDES, "margin"))


# ---- the rest -------------------------------------------------------------------------------------------------------


def appendix(results: Results) -> Iterator[tuple[str, Table]]:
    """Tables that are shown when they are asked for, by their titles."""
    environment = dict(results.environment)
    if isinstance(environment.get("command"), list):
        environment["command"] = shlex.join(map(str, environment["command"]))
    if environment:
        yield ("Versions, hardware and command", facts_table(options_of(environment)))
    if len(results.checks):
        rows = [(str(name), [number(value)]) for name, value in results.checks.iloc[-1].items()]
        yield ("Checks at the start", Table(rows, ("check", "value")))
    if len(results.checkpoints):
        rows = [
            (f"step {step:,}", [number(seconds), Cell(f"{size / 2**30:.2f}")])
            for step, seconds, size in results.checkpoints[["seconds", "bytes"]].itertuples()
        ]
        yield ("Checkpoints", Table(rows, ("saved after", "seconds", "GiB")))
