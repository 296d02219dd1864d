"""Cells as a terminal shows them: intervals in brief, and texts of the data as they are."""

import io

from rich.console import Console

from hafrm_ds.data.tables import MAX_PARTS, NOTHING, Cell, Table, largest, number_estimate, share_estimate


def test_an_estimate_is_brief_in_a_terminal_and_whole_on_a_page():
    assert share_estimate({"value": 0.75, "low": 0.5, "high": 0.875}) == Cell(
        "75.0%", "50.0% to 87.5%", brief="[50, 88]"
    )
    assert share_estimate({"value": 0.75}) == Cell("75.0%")
    assert number_estimate(None).text == NOTHING


def test_a_name_from_the_data_does_not_fill_a_terminal():
    """As of a set whose rows name a whole document as their source."""
    file = io.StringIO()
    Console(file=file, width=80).print(Table([("long text " * 2000, [Cell("1")])], ("Source", "n")).to_rich())
    assert len(file.getvalue().splitlines()) < 10 and "..." in file.getvalue()


def test_a_terminal_reads_no_markup_and_shows_control_characters_as_escapes():
    table = Table([("[red]a\x1b", [Cell("1", "left out", brief="[0, 2]"), Cell("[b]")])], ("[i]", "n", "text"), texts=1)
    file = io.StringIO()
    Console(file=file, width=80).print(table.to_rich())
    for shown in ("[i]", "[red]a\\x1b", "1 [0, 2]", "[b]"):
        assert shown in file.getvalue()
    assert "left out" not in file.getvalue() and "\x1b" not in file.getvalue()


def test_the_smallest_of_many_parts_share_a_row():
    sizes = {f"source {number}": number for number in range(MAX_PARTS)}
    assert largest(sizes, lambda size: size) == (sizes, [])
    named, rest = largest(sizes | {"more": 7, "most": 100}, lambda size: size)
    assert len(named) + 1 == MAX_PARTS and list(named) == [*list(sizes)[3:], "more", "most"]
    assert sum(rest) + sum(named.values()) == sum(sizes.values()) + 107 and max(rest) <= min(named.values())
