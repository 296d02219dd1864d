"""How charts are drawn: one look for all, as inline SVG by matplotlib.

Colours are CSS variables of the page, so that one drawing serves light and dark; texts are left as texts and take the
font of the page; legends are written by the page, where they wrap. A chart is drawn WIDTH units wide, about what a
column of the page and a phone have, so that its texts are as large as those around it.
"""

import hashlib
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hafrm_ds.data.tables import MINUS, printable

WIDTH, HEIGHT = 380, 230
RIGHT_MARGIN = 10
POINTS_PER_INCH = 72
NUM_COLOURS = 8
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
TICK_STEPS = (1, 2, 2.5, 5, 10)

# Colours that stand for the page's variables; they occur nowhere else.
TEXT, MUTED, GRID, CARD = "#5e51ea", "#5e51eb", "#5e51ec", "#5e51ed"
NEUTRAL: dict[str, Any] = {"color": MUTED, "linewidth": 1, "linestyle": (0, (4, 3))}
"""The line of what says nothing: the accuracy of a coin, or no difference."""
VARIABLES = {TEXT: "currentColor", MUTED: "var(--muted)", GRID: "var(--grid)", CARD: "var(--card)"}
SERIES = re.compile(r"#5e51e([0-9])\b")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 11,
    "text.color": TEXT,
    "text.parse_math": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": MUTED,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.labelsize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "path.simplify_threshold": 0.3,
}
CLEANING = (
    # What is the same in all charts is in the page's style sheet, or is of no use inside a page.
    (re.compile(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", re.DOTALL), ""),
    (re.compile(r"font-family: [^;]*; "), ""),
    (re.compile(r' transform="rotate\(-0 [^"]*"'), ""),
    # Nothing refers to the names of groups, and they repeat from chart to chart.
    (re.compile(r'<g id="[^"]*"'), "<g"),
    (re.compile(r"xlink:href"), "href"),
    (re.compile(r"\s*\n\s*"), " "),
    # A tenth of a unit is less than a pixel.
    (re.compile(r'(?<= )(d|x|y|width|height)="[^"]*"'), lambda found: re.sub(r"(\.\d)\d+", r"\1", found[0])),
)


@dataclass(frozen=True)
class Key:
    """An entry of a legend. shape: line, band (a filled area) or dot."""

    label: str
    series: int
    shape: str = "line"

    @property
    def colour(self) -> int:
        """Number of the page's variable --series-N."""
        return self.series % NUM_COLOURS + 1

    @property
    def dash(self) -> str:
        """The dashes of its line, as a stroke-dasharray of SVG; "" for a whole line."""
        dash = DASHES[self.series // NUM_COLOURS % len(DASHES)]
        return "" if dash == "-" else " ".join(str(2 * length) for length in dash[1])


@dataclass(frozen=True)
class Chart:
    """A drawing with its title, the entries of its legend, and a sentence on how to read it."""

    title: str
    svg: Markup
    legend: tuple[Key, ...] = ()
    note: str = ""


def new_figure(height: int = HEIGHT, left: int = 46, top: int = 20, bottom: int = 38) -> tuple[Figure, Axes]:
    """A figure with fixed margins: the charts of a page begin at the same place, and no layout has to be searched for,
    which would take half of the time."""
    figure = Figure(figsize=(WIDTH / POINTS_PER_INCH, height / POINTS_PER_INCH))
    width = WIDTH - left - RIGHT_MARGIN
    place = (left / WIDTH, bottom / height, width / WIDTH, (height - top - bottom) / height)
    return figure, figure.add_axes(place)


def series_colour(series: int) -> str:
    """The placeholder of the page's variable --series-N."""
    return f"#5e51e{series % NUM_COLOURS + 1}"


def line_of(series: int) -> dict[str, Any]:
    """How the line of a series is drawn."""
    return {"color": series_colour(series), "linestyle": DASHES[series // NUM_COLOURS % len(DASHES)]}


def write_axis(axis: Axis, form: Callable[[float], str], ticks: int | None = None, are_whole: bool = False) -> None:
    """How the numbers of an axis are written. ticks: about how many there are; None: as many as matplotlib likes."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))
    if ticks is not None:
        axis.set_major_locator(MaxNLocator(ticks, integer=are_whole, steps=TICK_STEPS))


def in_one_line(text: str) -> str:
    return " ".join(text.split())


def share_text(value: float) -> str:
    return f"{100 * value:.3g}%".replace("-", MINUS)


def finish(figure: Figure, title: str, described: Sequence[str], keys: Sequence[Key], note: str = "") -> Chart:
    """The chart of a figure. described: what it shows, in words, for those who cannot see it."""
    return Chart(title, to_svg(figure, f"{title}: {'; '.join(described)}"), tuple(keys), note)


def to_svg(figure: Figure, label: str) -> Markup:
    """The figure as one <svg> element that scales with the page and says `label` to those who cannot see it."""
    file = io.StringIO()
    salt = hashlib.sha256(label.encode(errors="backslashreplace")).hexdigest()
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    for pattern, replacement in CLEANING:
        svg = pattern.sub(replacement, svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    svg = SERIES.sub(r"var(--series-\1)", svg)
    box = f'viewBox="0 0 {figure.get_figwidth() * POINTS_PER_INCH:g} {figure.get_figheight() * POINTS_PER_INCH:g}"'
    head = Markup('<svg class="chart" role="img" aria-label="{}" {}>').format(printable(label), Markup(box))
    return head + Markup(svg[svg.index(">") + 1 :])
