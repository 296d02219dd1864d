"""Which figures of metrics.jsonl are drawn over the steps, and how."""

from dataclasses import dataclass, field

import pandas as pd

from hafrm_ds.evaluation.figures import JUDGES
from hafrm_ds.evaluation.report.charts import Curve, curves_chart, smoothing
from hafrm_ds.evaluation.report.drawing import Chart
from hafrm_ds.evaluation.report.reading import Results

JUDGE_SERIES = {judge: series for series, judge in enumerate(JUDGES)}
"""The colour of a judge is the same in all charts."""


@dataclass(frozen=True)
class Panel:
    """One chart. columns: column -> (its label, its colour). looks: options of `curves_chart`."""

    title: str
    unit: str
    columns: dict[str, tuple[str, int]]
    looks: dict[str, bool] = field(default_factory=dict)


def of_judges(kind: str, *judges: str) -> dict[str, tuple[str, int]]:
    return {f"{kind}/{judge}": (judge, JUDGE_SERIES[judge]) for judge in judges}


NOISY, SHARE = {"noisy": True}, {"is_share": True}
LOSS_PARTS = {
    "loss/reward": ("reward", 0),
    "loss/policy": ("policy", 1),
    "loss/router": ("router", 2),
    "loss/attributes": ("attributes", 4),
}
EFFICIENCY = {
    "mfu": ("of the peak FLOPs (MFU)", 0),
    "mfu_measured": ("of the measured peak (mfu_measured)", 3),
    "padding_share": ("padding", 1),
    "imbalance": ("waiting for the slowest process", 2),
}
TRAINING_PANELS = (
    Panel("Loss", "nats", {"loss/total": ("total", 7)} | LOSS_PARTS, NOISY),
    Panel("Accuracy on training pairs", "accuracy", of_judges("accuracy", *JUDGES), SHARE | NOISY),
    Panel("Margin of the rewards", "chosen less rejected", of_judges("margin", "reward", "implicit"), NOISY),
    Panel("Margin of the log-probs", "nats, chosen less rejected", of_judges("margin", "logprob"), NOISY),
    Panel("Learning rate", "of the body", {"learning_rate": ("", 0)}),
    Panel("Gradient norm", "before clipping", {"grad_norm": ("", 0)}, NOISY | {"may_be_logarithmic": True}),
    Panel("Throughput", "tokens a second", {"tokens_per_second": ("", 0)}, NOISY),
    Panel("Peak memory", "GiB, of the fullest process", {"memory_gib": ("", 0)}),
    Panel("Efficiency", "share", EFFICIENCY, SHARE | NOISY),
)
GRADIENT_PANELS = (
    Panel(
        "Pull of the losses on the body",
        "share of the policy loss, and the cosine of both",
        {"policy_share": ("share", 1), "body_grad_cosine": ("cosine", 3)},
    ),
    Panel("Weight of the policy loss", "alpha", {"alpha": ("", 1)}, {"may_be_logarithmic": True}),
)
EVALUATION_PANELS = (
    Panel("Accuracy over the steps", "accuracy", of_judges("accuracy", *JUDGES), SHARE),
    Panel("Order within groups over the steps", "Kendall's tau-b", of_judges("tau_b", *JUDGES)),
    Panel("Loss over the steps", "nats", LOSS_PARTS),
    Panel("Margin over the steps", "chosen less rejected", of_judges("margin", "reward", "implicit", "combined")),
)


def panel_charts(panels: tuple[Panel, ...], rows: pd.DataFrame, *, is_dotted: bool = False) -> list[Chart]:
    """One chart of each panel that has something to show. is_dotted: mark each row."""
    charts = [
        curves_chart(panel.title, panel.unit, curves_of(panel, rows), marks=is_dotted, **panel.looks)
        for panel in panels
    ]
    return [chart for chart in charts if chart is not None]


def curves_of(panel: Panel, rows: pd.DataFrame) -> list[Curve]:
    """The curves of the columns that are there, but for one that is 0 throughout, for a total of one part, and for a
    second MFU where both are of the measured peak."""
    found = {name: rows[name] for name in panel.columns if name in rows and rows[name].any()}
    if len(LOSS_PARTS.keys() & found.keys()) < 2:
        found.pop("loss/total", None)
    if {"mfu", "mfu_measured"} <= found.keys() and found["mfu"].equals(found["mfu_measured"]):
        del found["mfu_measured"]
    return [Curve(*panel.columns[name], values) for name, values in found.items()]


def comparison_charts(results: list[Results]) -> list[Chart]:
    """One chart of each figure, with a curve for each run; its colour is its place."""
    colours = {each.name: place for place, each in enumerate(results)}
    charts = []

    def add(panel: Panel, rows: dict[str, pd.DataFrame], kind: str, is_dotted: bool) -> None:
        for column, (label, _) in panel.columns.items():
            curves = [
                Curve(run, colours[run], each[column])
                for run, each in rows.items()
                if column in each and each[column].any()
            ]
            title = f"{kind}: {label}" if label else kind
            charts.append(curves_chart(title, panel.unit, curves, marks=is_dotted, overlaid=True, **panel.looks))

    for panel in TRAINING_PANELS:
        add(panel, {each.name: each.training for each in results}, panel.title, is_dotted=False)
    for name in dict.fromkeys(name for each in results for name in each.sets):
        over_steps = {each.name: each.sets[name].over_steps for each in results if name in each.sets}
        if max(map(len, over_steps.values())) > 1:
            for panel in EVALUATION_PANELS:
                add(panel, over_steps, f"{panel.title.removesuffix(' over the steps')} on {name}", is_dotted=True)
    return [chart for chart in charts if chart is not None]


def how_rows_are_drawn(rows: pd.DataFrame) -> str:
    """What the curves of these rows show, in words."""
    if not len(rows):
        return ""
    group, window = smoothing(len(rows))
    parts = [f"{len(rows):,} rows of metrics.jsonl"]
    if group > 1:
        parts.append(f"each point is the mean of {group} rows and the pale band reaches from their smallest to largest")
    elif window > 1:
        parts.append("pale lines are the rows")
    if window > 1:
        parts.append(f"bold lines of what changes from batch to batch are running means over {window * group:,} rows")
    return "; ".join(parts) + "."
