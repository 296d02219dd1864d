"""The kinds of charts that pages show."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter, NullLocator

from hafrm_ds.data.tables import MINUS, Estimate, printable, rounded, short
from hafrm_ds.evaluation.report.drawing import (
    CARD,
    NEUTRAL,
    NUM_COLOURS,
    STYLE,
    TICK_STEPS,
    Chart,
    Key,
    finish,
    in_one_line,
    line_of,
    new_figure,
    series_colour,
    share_text,
    write_axis,
)

MAX_POINTS = 300
"""Most points of a curve. One of more rows is drawn as the means of groups of consecutive rows."""
SMOOTHING_SHARE = 1 / 15
"""Width of the running mean, as a share of the curve."""
MIN_BINS, MAX_BINS = 9, 40
"""Bins of a histogram. The smallest number is odd, so that values that are all alike stand in the middle of a bin."""
ALIKE = 1e-6
"""Values whose range is below this share of the largest of them, or of 1, are drawn as one."""
LOG_SCALE_RATIO = 50
"""A curve whose largest value is this many times its median is drawn on a logarithmic axis, where that is allowed."""
LOG_AXIS_RATIO = 16
"""A varied number whose largest value is so many times its smallest stands on a logarithmic axis."""
LABEL_SHARE = 0.09
"""Of the width of an axis, what the label of a number takes."""
LABEL_LENGTH = 46


@dataclass(frozen=True)
class Curve:
    """Values by their steps, the index; those that are not finite are left out. `series` is its colour."""

    label: str
    series: int
    values: pd.Series


def smoothing(num_rows: int) -> tuple[int, int]:
    """(rows of a curve that become one point, points that a running mean is taken over)."""
    group = max(1, math.ceil(num_rows / MAX_POINTS))
    return group, 2 * round(math.ceil(num_rows / group) * SMOOTHING_SHARE / 2) + 1


def condensed(values: pd.Series) -> pd.DataFrame:
    """At most MAX_POINTS points of a curve by their mean steps: mean, min and max over groups of consecutive rows, and
    smooth, the running mean of the means, over fewer points at the ends."""
    group, window = smoothing(len(values))
    places = np.arange(len(values)) // group
    points = values.groupby(places).agg(["mean", "min", "max"])
    points["smooth"] = points["mean"].rolling(window, center=True, min_periods=1).mean()
    return points.set_index(values.index.to_series().groupby(places).mean())


# ---- kinds of charts ------------------------------------------------------------------------------------------------


@matplotlib.rc_context(STYLE)
def curves_chart(
    title: str,
    unit: str,
    curves: list[Curve],
    *,
    is_share: bool = False,
    noisy: bool = False,
    may_be_logarithmic: bool = False,
    marks: bool = False,
    overlaid: bool = False,
) -> Chart | None:
    """Curves over steps; None if none has a value.

    Args:
        unit: what stands above the axis.
        noisy: draw the running mean, and behind it what it is the mean of.
        may_be_logarithmic: see LOG_SCALE_RATIO.
        marks: a dot at each point, for curves of few points.
        overlaid: the curves are of several runs, which the page names once for all charts, and nothing is drawn
            behind them.
    """
    finite = [replace(curve, values=curve.values[np.isfinite(curve.values)]) for curve in curves]
    curves = [curve for curve in finite if len(curve.values)]
    if not curves:
        return None
    figure, axes = new_figure()
    show_rows = noisy and not overlaid
    for curve in curves:
        points, (group, window) = condensed(curve.values), smoothing(len(curve.values))
        colour = series_colour(curve.series)
        if show_rows and group > 1:
            axes.fill_between(points.index, points["min"], points["max"], color=colour, alpha=0.18, linewidth=0.7)
        elif show_rows and window > 1:
            axes.plot(points.index, points["mean"], color=colour, alpha=0.3, linewidth=1)
        values, marker = points["smooth" if noisy else "mean"], "o" if marks or len(points) == 1 else ""
        axes.plot(points.index, values, marker=marker, markersize=4.5, **line_of(curve.series))
    everything = np.concatenate([curve.values for curve in curves])
    form = share_text if is_share else short
    write_axis(axes.yaxis, form, ticks=5)
    axes.set_title(unit)
    if is_share and everything.min() >= 0:
        low, high = axes.get_ylim()
        axes.set_ylim(max(0, low), high if everything.any() else 0.05)
    if may_be_logarithmic and everything.min() > 0 and everything.max() > LOG_SCALE_RATIO * np.median(everything):
        axes.set_yscale("log")
        write_axis(axes.yaxis, short)
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_title(f"{unit} (logarithmic)")
    write_axis(axes.xaxis, short, ticks=6, are_whole=True)
    axes.set_xlabel("step")
    described = [
        f"{curve.label} from {form(curve.values.iloc[0])} at step {curve.values.index[0]:,} "
        f"to {form(curve.values.iloc[-1])} at step {curve.values.index[-1]:,}".strip()
        for curve in curves
    ]
    keys = [Key(curve.label, curve.series) for curve in curves if curve.label and not overlaid]
    return finish(figure, title, described, keys)


@matplotlib.rc_context(STYLE)
def histogram_chart(title: str, unit: str, values: dict[str, np.ndarray]) -> Chart:
    """Name -> values: how often each of them occurs, in the same bins. More than two are drawn as outlines alone."""
    values = {name: each.astype(np.float64) for name, each in values.items()}
    edges = histogram_edges(np.concatenate(list(values.values())))
    figure, axes = new_figure()
    for series, each in enumerate(values.values()):
        counts, _ = np.histogram(each, edges)
        colour = series_colour(series)
        if len(values) <= 2:
            axes.stairs(counts, edges, fill=True, color=colour, alpha=0.22, linewidth=0)
        axes.stairs(counts, edges, color=colour, linewidth=1.6)
        axes.axvline(each.mean(), color=colour, linewidth=1.2, linestyle=(0, (3, 2)))
    axes.set_title("responses")
    axes.set_xlabel(unit)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True, steps=TICK_STEPS))
    keys = [
        Key(f"{name}, mean {short(rounded(each.mean()))}", n, "band") for n, (name, each) in enumerate(values.items())
    ]
    described = [f"{name}: mean {each.mean():.3g}, deviation {each.std():.3g}" for name, each in values.items()]
    return finish(figure, title, described, keys, "Dashed: the means.")


def histogram_edges(values: np.ndarray) -> np.ndarray:
    """Ends of equal bins over all values [N] float64: [bins + 1].

    There are as many as Freedman & Diaconis (1981) say, between MIN_BINS and MAX_BINS. numpy's own count has no limit:
    one outlier asks for more memory than there is, and a range of a few roundings cannot be divided.
    """
    low, high = float(values.min()), float(values.max())
    size = max(1.0, abs(low), abs(high))
    if high - low < ALIKE * size:
        middle = (low + high) / 2
        return np.linspace(middle - size / 2, middle + size / 2, MIN_BINS + 1)
    quartiles = np.quantile(values, [0.25, 0.75])
    width = 2 * float(quartiles[1] - quartiles[0]) / len(values) ** (1 / 3)
    num_bins = math.ceil(min(MAX_BINS, (high - low) / width)) if width else MIN_BINS
    return np.linspace(low, high, max(MIN_BINS, num_bins) + 1)


@matplotlib.rc_context(STYLE)
def reliability_chart(title: str, calibration: dict[str, dict], series: dict[str, int], unit: str = "pair") -> Chart:
    """Confidence against accuracy of each judge, as `calibrate` gives them. unit: as `unit_of` gives it."""
    figure, axes = new_figure()
    axes.plot([0.5, 1], [0.5, 1], **NEUTRAL)
    described, lowest = [], 0.5
    for judge, facts in calibration.items():
        bins = [each for each in facts["bins"] if each["pairs"]]
        confidence, accuracy = ([each[name] for each in bins] for name in ("confidence", "accuracy"))
        sizes = np.array([each["pairs"] for each in bins], dtype=float)
        colour = series_colour(series[judge])
        axes.plot(confidence, accuracy, color=colour, linewidth=1.4)
        axes.scatter(confidence, accuracy, s=8 + 90 * sizes / sizes.max(), color=colour, linewidth=0)
        lowest = min(lowest, *accuracy)
        described.append(f"{judge}: expected calibration error {facts['ece']:.1%} in {len(bins)} bins")
    axes.set_xlim(0.49, 1.01)
    axes.set_ylim(lowest - 0.04, 1.04)
    write_axis(axes.xaxis, share_text)
    write_axis(axes.yaxis, share_text, ticks=5)
    axes.set_title("accuracy")
    axes.set_xlabel("confidence")
    keys = [Key(f"{judge}, ECE {facts['ece']:.1%}", series[judge]) for judge, facts in calibration.items()]
    note = f"Dashed: perfectly calibrated. Larger dots stand for more {unit}s."
    return finish(figure, title, described, keys, note)


@matplotlib.rc_context(STYLE)
def coverage_chart(title: str, rows: list[dict], series: dict[str, int], unit: str = "pair") -> Chart:
    """Accuracy of each judge on the share of the pairs that it is surest of, as `analyse` gives it. unit: as `unit_of`
    gives it."""
    figure, axes = new_figure()
    shares, judges = [each["share"] for each in rows], list(rows[0]["accuracy"])
    for judge in judges:
        values = [each["accuracy"][judge] for each in rows]
        axes.plot(shares, values, color=series_colour(series[judge]), marker="o", markersize=4.5)
    write_axis(axes.xaxis, share_text)
    write_axis(axes.yaxis, share_text, ticks=5)
    axes.set_title("accuracy")
    axes.set_xlabel(f"share of the {unit}s, the surest first")
    described = [
        f"{each['share']:.0%} of the {unit}s: "
        + ", ".join(f"{judge} {each['accuracy'][judge]:.1%}" for judge in judges)
        for each in rows
    ]
    keys = [Key(judge, series[judge]) for judge in judges]
    return finish(figure, title, described, keys, f"Each judge leaves out the {unit}s with its smallest margins.")


@matplotlib.rc_context(STYLE)
def intervals_chart(
    title: str,
    groups: Mapping[str, Mapping[str, Estimate]],
    series: dict[str, int],
    *,
    legend: bool = True,
    are_differences: bool = False,
    unit: str = "accuracy",
) -> Chart:
    """Accuracies, or differences of them, with intervals: group (a set or source) -> name -> interval. Groups stand
    below one another; the dashed line is the accuracy of a coin, or no difference."""
    neutral = 0.0 if are_differences else 0.5
    rows = sum(1.3 + len(intervals) for intervals in groups.values())
    figure, axes = new_figure(height=int(44 + 15 * rows), left=8, top=4)
    y, described = 0.0, []
    ends = [neutral]
    for group, intervals in groups.items():
        label = write_label(axes, group, y)
        y += 1
        for name, each in intervals.items():
            line = line_of(series[name])
            low, high = ends_of(each)
            axes.plot([low, high], [y, y], linewidth=2.2, **line)
            axes.plot([each["value"]], [y], color=line["color"], marker="o", markersize=6, clip_on=False)
            ends += [low, high]
            y += 1
        values = ", ".join(f"{name} {each['value']:.1%}" for name, each in intervals.items())
        described.append(f"{label}: {values}")
        y += 0.3
    axes.axvline(neutral, **NEUTRAL)
    axes.set_ylim(y - 0.5, -0.6)
    if are_differences:
        axes.set_xlim(min(ends) - 0.03, max(ends) + 0.03)
    else:
        axes.set_xlim(max(0, min(ends) - 0.03), 1.0)
    write_axis(axes.xaxis, share_text, ticks=6)
    axes.yaxis.set_visible(False)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("difference in accuracy" if are_differences else unit)
    shape = "dot" if len(series) <= NUM_COLOURS else "line"  # whose dashes tell those of one colour apart
    keys = [Key(name, number, shape) for name, number in series.items()] if legend else []
    return finish(figure, title, described, keys, "Bars: 95% intervals.")


def write_label(axes: Axes, name: str, y: float) -> str:
    """Write the name of a group at the left of a chart of rows; returns it as it stands there."""
    label = in_one_line(printable(name))
    label = label if len(label) <= LABEL_LENGTH else f"{label[: LABEL_LENGTH - 1]}…"
    box = {"facecolor": CARD, "edgecolor": "none", "pad": 1.5}  # over the lines of the grid
    axes.text(0, y, label, transform=axes.get_yaxis_transform(), va="center", bbox=box)
    return label


def ends_of(estimate: Estimate) -> tuple[float, float]:
    """The ends of its interval; without one the value itself."""
    low, high = (estimate["value"] if end is None else end for end in (estimate["low"], estimate["high"]))
    return low, high


@matplotlib.rc_context(STYLE)
def distributions_chart(title: str, rows: Mapping[str, Mapping[str, list[float]]], names: tuple[str, ...]) -> Chart:
    """Distributions below one another: row -> name -> quantiles at 5, 25, 50, 75 and 95%."""
    figure, axes = new_figure(height=int(44 + 15 * sum(1.3 + len(each) for each in rows.values())), left=8, top=4)
    axes.axvline(0, **NEUTRAL)
    y, described = 0.0, []
    for row, of_names in rows.items():
        label = write_label(axes, row, y)
        y += 1
        for name, (lowest, low, middle, high, highest) in of_names.items():
            colour = series_colour(names.index(name))
            axes.plot([lowest, highest], [y, y], color=colour, linewidth=1.4)
            axes.plot([low, high], [y, y], color=colour, linewidth=6, alpha=0.45, solid_capstyle="butt")
            axes.plot([middle], [y], color=colour, marker="o", markersize=6)
            y += 1
        medians = ", ".join(f"{name} {short(each[2])}" for name, each in of_names.items())
        described.append(f"{label}: medians {medians}")
        y += 0.3
    axes.set_ylim(y - 0.5, -0.6)
    write_axis(axes.xaxis, short, ticks=6)
    axes.yaxis.set_visible(False)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("logit; at 0 refusing is as probable as complying")
    keys = [Key(name, number, "dot") for number, name in enumerate(names)]
    return finish(figure, title, described, keys, "Dots: medians. Bars: the middle half. Lines: 90%.")


@matplotlib.rc_context(STYLE)
def moves_chart(title: str, moves: Mapping[str, Mapping[str, Estimate]]) -> Chart:
    """Arrows from no change to (shift, discrimination), each with its intervals."""
    figure, axes = new_figure(height=300)
    axes.axhline(0, **NEUTRAL)
    axes.axvline(0, **NEUTRAL)
    described = []
    for number, (name, each) in enumerate(moves.items()):
        line, shift, discrimination = line_of(number), each["shift"], each["discrimination"]
        tip = (shift["value"], discrimination["value"])
        axes.annotate("", xy=tip, xytext=(0, 0), arrowprops={"arrowstyle": "-|>", "linewidth": 1.6, **line})
        axes.plot(ends_of(shift), [tip[1]] * 2, linewidth=1, **line)
        axes.plot([tip[0]] * 2, ends_of(discrimination), linewidth=1, **line)
        described.append(f"{name}: shift {short(tip[0])}, discrimination {short(tip[1])}")
    axes.margins(0.12)
    write_axis(axes.xaxis, short, ticks=6)
    write_axis(axes.yaxis, short, ticks=6)
    axes.set_title("discrimination: harmful less benign, logits")
    axes.set_xlabel("shift: all prompts alike, logits")
    keys = [Key(name, number) for number, name in enumerate(moves)]
    return finish(figure, title, described, keys, "Thin lines: 95% intervals.")


@matplotlib.rc_context(STYLE)
def length_chart(title: str, bins: list[dict], series: dict[str, int], unit: str = "pair") -> Chart:
    """Accuracy by the length difference of chosen and rejected, as `analyse` gives it. unit: as `unit_of` gives it."""
    figure, axes = new_figure(bottom=64)
    places = np.arange(len(bins), dtype=float)
    judges = [judge for judge in series if all(judge in each["accuracy"] for each in bins)]
    for number, judge in enumerate(judges):
        estimates = [each["accuracy"][judge] for each in bins]
        shift = (number - (len(judges) - 1) / 2) * 0.17
        value = np.array([each["value"] for each in estimates])
        low, high = (np.array([each[end] for each in estimates], dtype=float) for end in ("low", "high"))
        colour = series_colour(series[judge])
        axes.vlines(places + shift, low, high, color=colour, linewidth=2.2)
        axes.plot(places + shift, value, color=colour, marker="o", markersize=5.5, linestyle="none")
    axes.axhline(0.5, **NEUTRAL)
    axes.set_xticks(places, [f"{bin_label(each)}\n{each['pairs']}" for each in bins], fontsize=10)
    axes.set_xlim(-0.6, len(bins) - 0.4)
    axes.grid(axis="x", visible=False)
    axes.set_ylim(-0.03, 1.03)
    write_axis(axes.yaxis, share_text)
    axes.set_title("accuracy")
    axes.set_xlabel(f"tokens of chosen less rejected; number of {unit}s")
    described = [
        f"{in_one_line(bin_label(each))} tokens: "
        + ", ".join(f"{judge} {each['accuracy'][judge]['value']:.1%}" for judge in judges)
        for each in bins
    ]
    keys = [Key(judge, series[judge], "dot") for judge in judges]
    note = "Bars: 95% intervals. On the left the chosen answer is the shorter one."
    return finish(figure, title, described, keys, note)


def bin_label(each: dict) -> str:
    """A bin of length differences in two lines."""
    low, high = (None if each[end] is None else f"{each[end]:+d}".replace("-", MINUS) for end in ("low", "high"))
    if low is None:
        return f"{high}\nor less"
    if high is None:
        return f"{low}\nor more"
    return f"{each['low']}\n" if low == high else f"{low}\nto {high}"


@dataclass(frozen=True)
class Gains:
    """Differences in accuracy by a number that was varied: (number, difference) from left to right."""

    label: str
    series: int
    points: list[tuple[float, Estimate]]


@matplotlib.rc_context(STYLE)
def gains_chart(title: str, unit: str, curves: list[Gains]) -> Chart:
    """Differences in accuracy, with their intervals as bands, over a number; the dashed line is no difference.

    Args:
        unit: what the number is. Its axis is logarithmic from LOG_AXIS_RATIO on.
    """
    figure, axes = new_figure()
    axes.axhline(0, **NEUTRAL)
    numbers = sorted({number for curve in curves for number, _ in curve.points})
    described = []
    for curve in curves:
        colour = series_colour(curve.series)
        x, values = [number for number, _ in curve.points], [each["value"] for _, each in curve.points]
        low, high = zip(*(ends_of(each) for _, each in curve.points))
        if len(x) > 1:
            axes.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
        else:
            axes.plot([*x, *x], [*low, *high], color=colour, linewidth=2.2)
        axes.plot(x, values, marker="o", markersize=4.5, **line_of(curve.series))
        at = ", ".join(f"{share_text(value)} at {short(number)}" for number, value in zip(x, values, strict=True))
        described.append(f"{curve.label}: {at}")
    if numbers[0] > 0 and numbers[-1] >= LOG_AXIS_RATIO * numbers[0]:
        axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(apart(numbers, logarithmic=axes.get_xscale() == "log")))
    axes.xaxis.set_minor_locator(NullLocator())
    write_axis(axes.xaxis, short)
    write_axis(axes.yaxis, share_text, ticks=5)
    axes.set_title("difference in accuracy")
    axes.set_xlabel(unit)
    return finish(figure, title, described, [Key(curve.label, curve.series) for curve in curves])


@dataclass(frozen=True)
class Measured:
    """A measure by a whole number, as of a round: (number, value) from left to right."""

    label: str
    series: int
    points: list[tuple[int, Estimate]]


@matplotlib.rc_context(STYLE)
def measures_chart(title: str, unit: str, curves: list[Measured]) -> Chart:
    """Values over a whole number, with bars where their intervals are known."""
    figure, axes = new_figure()
    for curve in curves:
        x, values = [number for number, _ in curve.points], [each["value"] for _, each in curve.points]
        low, high = zip(*(ends_of(each) for _, each in curve.points))
        axes.vlines(x, low, high, color=series_colour(curve.series), linewidth=2.2)
        axes.plot(x, values, marker="o", markersize=4.5, **line_of(curve.series))
    write_axis(axes.xaxis, short, ticks=6, are_whole=True)
    write_axis(axes.yaxis, short, ticks=5)
    axes.set_xlabel(unit)
    described = []
    for curve in curves:
        at = ", ".join(f"{short(each['value'])} at {number}" for number, each in curve.points)
        described.append(f"{curve.label}: {at}")
    keys = [Key(curve.label, curve.series) for curve in curves] if len(curves) > 1 else []
    return finish(figure, title, described, keys)


def apart(numbers: list[float], logarithmic: bool) -> list[float]:
    """Those of increasing numbers whose labels have room beside one another on an axis: first and last always."""
    places = np.log(numbers) if logarithmic else np.array(numbers)
    least = (places[-1] - places[0]) * LABEL_SHARE
    chosen = [0]
    for place in range(1, len(numbers) - 1):
        if places[place] - places[chosen[-1]] >= least and places[-1] - places[place] >= least:
            chosen.append(place)
    return [numbers[place] for place in dict.fromkeys([*chosen, len(numbers) - 1])]
