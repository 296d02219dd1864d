"""Charts: what is drawn of long curves, and what the SVG holds."""

import re

import numpy as np
import pandas as pd
import pytest

from hafrm_ds.data.tables import short
from hafrm_ds.evaluation.report.charts import (
    MAX_BINS,
    MAX_POINTS,
    MIN_BINS,
    Curve,
    Gains,
    apart,
    condensed,
    curves_chart,
    gains_chart,
    histogram_chart,
    histogram_edges,
    intervals_chart,
    length_chart,
    smoothing,
)
from hafrm_ds.evaluation.report.drawing import NUM_COLOURS, Chart


def test_few_rows_are_drawn_as_they_are():
    values = pd.Series([3.0, 1.0, 4.0, 1.0, 5.0])
    assert smoothing(len(values)) == (1, 1)
    points = condensed(values)
    for name in ("mean", "min", "max", "smooth"):
        np.testing.assert_array_equal(points[name], values)


def test_the_running_mean_takes_fewer_at_the_ends():
    values = np.random.default_rng(0).normal(size=45)
    assert smoothing(45) == (1, 5)
    smooth = condensed(pd.Series(values))["smooth"]
    np.testing.assert_allclose(smooth, [values[max(0, place - 2) : place + 3].mean() for place in range(45)])


def test_many_rows_become_means_of_groups_with_their_extremes():
    values = pd.Series(np.arange(2 * MAX_POINTS + 1, dtype=float), np.arange(2 * MAX_POINTS + 1) + 7)
    values.iloc[4] = 1000.0
    points = condensed(values)
    assert smoothing(len(values))[0] == 3 and len(points) == (2 * MAX_POINTS + 1 + 2) // 3
    np.testing.assert_allclose(points["mean"].iloc[:3], [1.0, (3 + 1000 + 5) / 3, 7.0])
    assert (points["min"].iloc[1], points["max"].iloc[1]) == (3.0, 1000.0)
    assert points.index[0] == 8.0 and points.index[-1] == 607.0  # of the one row that is left over


def test_values_that_are_not_finite_are_left_out_and_nothing_is_no_chart():
    curve = Curve("", 0, pd.Series([np.nan, 4.0, np.inf], [1, 2, 3]))
    chart = curves_chart("A", "b", [curve])
    assert "from 4 at step 2 to 4 at step 2" in chart.svg
    assert curves_chart("A", "b", [Curve("", 0, pd.Series([np.nan], [1]))]) is None


def test_a_spike_is_drawn_on_a_logarithmic_axis_where_that_is_allowed():
    values = np.ones(30)
    values[7] = 900.0
    curve = Curve("", 0, pd.Series(values))
    assert "(logarithmic)" in curves_chart("A", "norm", [curve], may_be_logarithmic=True).svg
    assert "(logarithmic)" not in curves_chart("A", "norm", [curve]).svg


def test_the_svg_takes_its_colours_from_the_page_and_nothing_from_elsewhere():
    curves = [Curve(name, series, pd.Series(np.arange(9.0))) for series, name in enumerate(("a", "b"))]
    chart = curves_chart("Loss", "nats", curves, marks=True)
    svg = chart.svg
    assert svg.startswith('<svg class="chart" role="img" aria-label="Loss: a from 0 at step 0 to 8 at step 8; b from')
    assert "var(--series-1)" in svg and "var(--series-2)" in svg and "var(--muted)" in svg
    assert not re.search(r"#[0-9a-f]{6}\b", svg)
    assert not re.search(r"http|<style|<metadata|<\?xml|font-family", svg)
    ids = re.findall(r' id="([^"]+)"', svg)
    assert len(ids) == len(set(ids)) and set(re.findall(r"url\(#([^)]+)\)", svg)) <= set(ids)
    other = curves_chart("Loss", "nats", curves[:1], marks=True).svg
    assert not set(ids) & set(re.findall(r' id="([^"]+)"', other))
    assert [key.label for key in chart.legend] == ["a", "b"] and [key.colour for key in chart.legend] == [1, 2]


def interval(value, low=None, high=None):
    return {"value": value, "low": low, "high": high}


def test_names_of_sources_are_texts_and_never_markup():
    groups = {"<b>$x_1$ & \x07" + 60 * "y": {"reward": interval(0.75, 0.5, 1.0)}, "two": {"reward": interval(0.25)}}
    svg = intervals_chart("By source", groups, {"reward": 0}).svg
    assert "<b>" not in svg and "\x07" not in svg
    assert "&lt;b&gt;$x_1$ &amp; \\x07yyy" in svg and "yyy…" in svg
    assert "reward 75.0%" in svg and "two: reward 25.0%" in svg


def test_equal_scores_have_a_histogram():
    chart = histogram_chart("Scores", "", {"chosen": np.zeros(5), "rejected": np.zeros(5)})
    assert [key.label for key in chart.legend] == ["chosen, mean 0", "rejected, mean 0"]


def test_scores_a_few_roundings_apart_are_drawn_as_one():
    steps = np.random.default_rng(0).integers(-3, 4, size=100)
    scores = np.float32(5) + steps.astype(np.float32) * np.spacing(np.float32(5))
    assert len(set(scores)) > 1 and scores.dtype == np.float32
    edges = histogram_edges(scores.astype(np.float64))
    assert len(edges) == MIN_BINS + 1 and sorted(np.histogram(scores, edges)[0])[-2:] == [0, 100]
    assert "mean 5, deviation" in histogram_chart("Scores", "", {"chosen": scores, "rejected": scores[:9]}).svg


def test_an_outlier_costs_no_more_bins_than_there_may_be():
    values = np.random.default_rng(0).normal(size=2000)
    with_outlier = np.concatenate([values, [3e38]])
    edges = histogram_edges(with_outlier)
    assert len(edges) == MAX_BINS + 1 and (edges[0], edges[-1]) == (values.min(), 3e38)
    chart = histogram_chart("Scores", "", {"chosen": np.full(3, 3e38, dtype=np.float32), "rejected": values})
    assert chart.legend[0].label == "chosen, mean 3e+26T"


def test_the_number_of_bins_is_that_of_freedman_and_diaconis():
    for size in (200, 1000):
        values = np.random.default_rng(size).normal(size=size)
        expected = np.histogram_bin_edges(values, bins="fd")
        assert MIN_BINS < len(expected) - 1 < MAX_BINS
        np.testing.assert_allclose(histogram_edges(values), expected)
    few = np.array([0.0] * 90 + [1.0] * 10)  # both quartiles are 0
    np.testing.assert_allclose(histogram_edges(few), np.linspace(0, 1, MIN_BINS + 1))


def test_differences_stand_around_zero_and_accuracies_end_at_all():
    groups = {"set": {"one": interval(0.1, 0.05, 0.15)}}
    differences = intervals_chart("A", groups, {"one": 0}, are_differences=True).svg
    accuracies = intervals_chart("A", groups, {"one": 0}).svg
    assert "difference in accuracy" in differences and ">100%<" not in differences
    assert "difference" not in accuracies and ">100%<" in accuracies


def test_rows_of_one_colour_are_told_apart_by_their_dashes():
    def of_rows(number: int) -> Chart:
        series = {f"method {place}": place for place in range(number)}
        return intervals_chart("A", {"set": {name: interval(0.6, 0.5, 0.7) for name in series}}, series)

    few, many = of_rows(NUM_COLOURS), of_rows(NUM_COLOURS + 1)
    assert many.svg.count("stroke-dasharray") == few.svg.count("stroke-dasharray") + 1
    first, last = many.legend[0], many.legend[-1]
    assert first.colour == last.colour and first.shape == last.shape == "line" and first.dash != last.dash
    assert {key.shape for key in few.legend} == {"dot"}


def test_gains_stand_over_their_numbers_on_a_logarithmic_axis_where_these_are_far_apart():
    def line(*numbers: float) -> Gains:
        return Gains("a line", 0, [(number, {"value": 0.1, "low": 0.05, "high": None}) for number in numbers])

    chart = gains_chart("A gain", "pairs", [line(80, 5120), line(320)])
    assert "a line: 10% at 80, 10% at 5120; a line: 10% at 320" in chart.svg and len(chart.legend) == 2
    places = {
        numbers: [
            float(x)
            for x in re.findall(
                r'<use href="#[^"]*" x="([\d.]+)" y="[\d.]+" style="fill: var\(--series-1',
                gains_chart("", "", [line(*numbers)]).svg,
            )
        ]
        for numbers in ((1, 4, 16), (0, 8, 16))
    }
    for numbers, (_, left, middle, right) in places.items():  # of the marker itself, and where it is used
        assert middle - left == pytest.approx(right - middle, abs=0.2), numbers


def test_labels_of_numbers_leave_room_for_one_another():
    assert apart([0, 0.5, 0.9, 0.95, 1], logarithmic=False) == [0, 0.5, 0.9, 1]
    assert apart([80, 320, 1280, 5120], logarithmic=True) == [80, 320, 1280, 5120]
    assert apart([7], logarithmic=False) == [7]


def test_length_bins_are_named_by_their_ends_and_pairs():
    accuracy = {"reward": {"value": 0.5, "low": 0.4, "high": 0.6}}
    ends = [(None, -101, 5), (-25, -1, 6), (0, 0, 7), (101, None, 8)]
    bins = [{"low": low, "high": high, "pairs": pairs, "accuracy": accuracy, "longer": 0} for low, high, pairs in ends]
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", length_chart("By length", bins, {"reward": 0}).svg)
    shown = " ".join(texts)
    for expected in ("\N{MINUS SIGN}101 or less 5", "\N{MINUS SIGN}25 to \N{MINUS SIGN}1 6", "+101 or more 8"):
        assert expected in shown


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.25, "0.25"), (12345, "12.3k"), (2.5e9, "2.5G"), (5e-5, "5e-5"), (-1.5, "-1.5"), (1234, "1234")],
)
def test_short_numbers(value, text):
    assert short(value).replace("\N{MINUS SIGN}", "-") == text
