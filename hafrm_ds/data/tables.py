"""Tables as rows of cells: one description, shown by the terminal (`Table.to_rich`) and by pages (templates)."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, TypedDict, TypeVar

import rich.table
from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from hafrm_ds.data.pairs import shortened

LEAST_NAME, BETWEEN_COLUMNS = 16, 3
"""Characters of a terminal that a table needs beside its numbers: names fold, numbers do not."""
LONGEST_NAME = 120
"""Characters of a row's name in a terminal. Names of sources come from the data."""
MAX_SOURCES = 20
"""Sources of a set that tables and charts list, the smaller ones together as one of them."""
NOTHING = "-"
MINUS = "\N{MINUS SIGN}"

Part = TypeVar("Part")


class Estimate(TypedDict):
    """An estimate as the result files hold it; without an interval where there are too few prompts for one."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Cell:
    """The text of a cell, and what stands smaller below it on a page.

    brief: stands in place of the detail in a terminal, beside the text or, where that is too narrow, below it. words: a
        text that may take several lines.
    """

    text: str
    detail: str = ""
    words: bool = False
    brief: str = ""

    def in_terminal(self, between: str) -> str:
        return between.join(filter(None, (self.text, self.brief)))


@dataclass(frozen=True)
class Table:
    """Rows of a name and cells.

    words: all cells hold texts instead of numbers. texts: so many of the last columns do, for the terminal.
    is_dense: without lines between the columns in a terminal, for many of them.
    """

    rows: list[tuple[str, list[Cell]]]
    header: tuple[str, ...] = ()
    caption: str = ""
    words: bool = False
    texts: int = 0
    is_dense: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        last = len(self.header) - 1 - self.texts  # a row may have fewer cells
        numbers = [cells[:last] for _, cells in self.rows if not self.words]
        columns = zip_longest(*([len(cell.in_terminal(" ")) for cell in cells] for cells in numbers), fillvalue=0)
        needed = LEAST_NAME + sum(BETWEEN_COLUMNS + max(column) for column in columns)
        yield self.to_rich(" " if needed <= options.max_width else "\n")

    def to_rich(self, between: str = " ") -> rich.table.Table:
        """The table for a terminal; without a caption the first header takes the place of a title.

        Args:
            between: what stands between the text of a cell and what is brief.
        """
        first, *others = self.header
        table = rich.table.Table(
            title=as_text(self.caption) if self.caption else None,
            title_justify="left",
            box=box.SIMPLE if self.is_dense else box.HEAVY_HEAD,
            padding=(0, 0 if self.is_dense else 1),
        )
        table.add_column(as_text(first), overflow="fold")
        for place, name in enumerate(others):
            is_text = place >= len(others) - self.texts
            table.add_column(as_text(name), justify="left" if is_text else "right", overflow="fold")
        for name, cells in self.rows:
            shown = (as_text(cell.in_terminal(between)) for cell in cells)
            table.add_row(as_text(shortened(name, LONGEST_NAME)), *shown)
        return table


# ---- cells ----------------------------------------------------------------------------------------------------------


def count(number: float | None) -> Cell:
    return Cell(NOTHING if number is None else f"{number:,.0f}")


def share(value: float | None) -> Cell:
    return Cell(NOTHING if value is None else f"{value:.1%}")


def number(value: float | None) -> Cell:
    return Cell(NOTHING if value is None else short(value))


def share_estimate(estimate: Estimate | None) -> Cell:
    """A share with its interval, where that is known."""
    return estimate_cell(estimate, "{:.1%}".format, lambda end: f"{100 * end:.0f}")


def number_estimate(estimate: Estimate | None, form: Callable[[float], str] | None = None) -> Cell:
    """A number with its interval, where that is known. form: how it is written; default: `short`."""
    return estimate_cell(estimate, form or short, "{:.3g}".format)


def estimate_cell(estimate: Estimate | None, form: Callable[[float], str], brief: Callable[[float], str]) -> Cell:
    """An estimate and its interval. brief: how an end of the interval is written in a terminal."""
    if estimate is None or (value := estimate["value"]) is None:
        return Cell(NOTHING)
    low, high = estimate.get("low"), estimate.get("high")
    if low is None or high is None:
        return Cell(form(value))
    return Cell(form(value), f"{form(low)} to {form(high)}", brief=f"[{brief(low)}, {brief(high)}]")


def value_of_option(value: Any) -> Cell:
    """A value as it would be written in a recipe."""
    return Cell(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def facts_table(facts: Iterable[tuple[str, Any]]) -> Table:
    """Names and the value of each, whatever its type."""
    return Table([(name, [value_of_option(value)]) for name, value in facts], words=True)


# ---- texts ----------------------------------------------------------------------------------------------------------


def short(value: float) -> str:
    """A number in few characters: 0.25, 12k, 5e-5, with a real minus."""
    size = abs(value)
    if size >= 1e4:
        scale, letter = next((pair for pair in ((1e12, "T"), (1e9, "G"), (1e6, "M")) if size >= pair[0]), (1e3, "k"))
        text = f"{value / scale:.3g}{letter}"
    elif size < 1e-3 and value:
        mantissa, exponent = f"{value:.2e}".split("e")
        text = f"{float(mantissa):g}e{int(exponent)}"
    else:
        text = f"{value:.4g}"
    return text.replace("-", MINUS)


def rounded(value: float) -> float:
    """To three significant digits."""
    return float(f"{value:.3g}")


def as_text(value: str) -> Text:
    """Text of the data for the terminal: no markup is read in it, and control characters are shown as escapes."""
    return Text(printable(value))


def printable(value: str) -> str:
    """Text with control characters, and what else has no glyph but a newline, as escapes."""
    if value.isprintable():
        return value
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in value)


def listed_sources(
    sources: Mapping[str, Part], size: Callable[[Part], int], together: Callable[[list[Part]], Part]
) -> dict[str, Part]:
    """The sources of a set that are listed, in the order given; of many the smallest stand together at the end."""
    if len(sources) <= MAX_SOURCES:
        return dict(sources)
    named = set(sorted(sources, key=lambda name: -size(sources[name]))[: MAX_SOURCES - 1])
    rest = [part for name, part in sources.items() if name not in named]
    listed = {name: part for name, part in sources.items() if name in named}
    return listed | {f"{len(rest):,} other sources": together(rest)}
