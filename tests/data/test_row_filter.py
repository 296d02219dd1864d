import json

import pytest

from tests.data.row_files import error_of, outcomes, rows_of, write_lines


@pytest.mark.parametrize(
    ("value", "kept"), [("1", 3), (1, 3), ("true", 1), (True, 1), ("null", 2), (None, 2), ("1.5", 1), (1.5, 1)]
)
def test_row_filter_compares_as_text(read, value, kept):
    rows = [*(rows_of(1, flag=flag)[0] for flag in (1, "1", 1.0, True, None, 1.5)), *rows_of(1)]
    write_lines("x.jsonl", rows)
    pairs = read({"path": "x.jsonl", "where": {"flag": value}})
    written = value if isinstance(value, str) else json.dumps(value)
    assert outcomes(pairs) == {"": kept, f"row filter flag={written}": len(rows) - kept}


def test_rows_outside_the_filter_need_no_format(read):
    write_lines("x.jsonl", [{"kind": "header"}, *rows_of(2, kind="pair"), {"kind": "pair of another format"}])
    pairs = read("x.jsonl?kind=pair")
    assert pairs["deselected"][:] == ["row filter kind=pair", "", "", "row filter kind=pair"]
    assert pairs["format"][:] == ["", "explicit_prompt", "explicit_prompt", ""]
    assert pairs[0] == {
        "prompt": [],
        "answers": [],
        "comparisons": [],
        "attributes": [],
        "trains_reward": True,
        "source": "x",
        "id": "x.jsonl:1",
        "format": "",
        "dropped": "",
        "deselected": "row filter kind=pair",
        "remarks": "",
    }


def test_row_filters_that_select_nothing(read):
    write_lines("x.jsonl", [*rows_of(3, part="train"), *rows_of(1, part="test")])
    assert error_of(read, "x.jsonl?prat=train") == (
        "x.jsonl: no row has the field 'prat' of the row filter (fields: prompt, chosen, rejected, part)"
    )
    assert error_of(read, "x.jsonl?part=eval") == (
        "x.jsonl: row filter part=eval leaves none of 4 rows (part is 'train' 3 times, 'test' 1 times)"
    )
