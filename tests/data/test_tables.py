"""Cells as a terminal shows them: intervals in brief, and texts of the data as they are."""

import io

import pytest
from rich.console import Console

from hafrm_ds.data.tables import MAX_SOURCES, NOTHING, Cell, Table, listed_sources, number_estimate, share_estimate


def test_an_estimate_is_brief_in_a_terminal_and_whole_on_a_page():
    assert share_estimate({"value": 0.75, "low": 0.5, "high": 0.875}) == Cell(
        "75.0%", "50.0% to 87.5%", brief="[50, 88]"
    )
    assert share_estimate({"value": 0.75}) == Cell("75.0%")
    assert number_estimate(None).text == NOTHING


def test_a_name_from_the_data_does_not_fill_a_terminal():
    """As of a set whose rows name a whole document as their source."""
    file = io.StringIO()
    Console(file=file, width=80).print(Table([("long text " * 2000, [Cell("1")])], ("Source", "n")))
    assert len(file.getvalue().splitlines()) < 10 and "..." in file.getvalue()


@pytest.mark.parametrize(("width", "form"), [(90, "97.5% [95, 99]"), (72, "97.5%")])
def test_a_terminal_that_is_too_narrow_gets_intervals_below_their_values_and_never_cut(width, form):
    cells = [Cell("97.5%", brief="[95, 99]"), Cell("100.0%", brief="[100, 100]")]
    table = Table([("set", cells * 2)], ("accuracy", *("reward head", "both heads") * 2))
    file = io.StringIO()
    Console(file=file, width=width).print(table)
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    (values,) = [line for line in lines if "│ set" in line]
    assert values.count(form) == 2 and ("[95, 99]" in values) == (width == 90)
    assert sum(line.count("[95, 99]") + line.count("[100, 100]") for line in lines) == 4


def test_rows_may_have_fewer_cells_than_columns():
    """As the random choice in the tables of a best of N, of which nothing is said over itself."""
    table = Table([("(random choice)", []), ("a model", [Cell("1.5"), Cell("yes")])], ("Pick", "gold", "won"), texts=1)
    file = io.StringIO()
    Console(file=file, width=80).print(table)
    assert "1.5" in file.getvalue() and "(random choice)" in file.getvalue()


def test_a_terminal_reads_no_markup_and_shows_control_characters_as_escapes():
    table = Table([("[red]a\x1b", [Cell("1", "left out", brief="[0, 2]"), Cell("[b]")])], ("[i]", "n", "text"), texts=1)
    file = io.StringIO()
    Console(file=file, width=80).print(table)
    for shown in ("[i]", "[red]a\\x1b", "1 [0, 2]", "[b]"):
        assert shown in file.getvalue()
    assert "left out" not in file.getvalue() and "\x1b" not in file.getvalue()


def test_the_smallest_of_many_sources_stand_together():
    sizes = {f"source {number}": number for number in range(MAX_SOURCES)}
    assert listed_sources(sizes, lambda size: size, sum) == sizes
    listed = listed_sources(sizes | {"more": 7, "most": 100}, lambda size: size, sum)
    assert list(listed) == [*list(sizes)[3:], "more", "most", "3 other sources"] and len(listed) == MAX_SOURCES
    assert listed["3 other sources"] == 0 + 1 + 2 and listed["source 3"] == 3
