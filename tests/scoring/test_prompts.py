"""Files of prompts: what is read of a row, and rows that are refused."""

import pytest

from hafrm_ds.errors import DataError
from hafrm_ds.scoring.prompts import read_prompts
from tests.data.row_files import write_lines


def test_prompts_are_read_in_their_order_with_all_that_belongs_to_them(tmp_path):
    rows = [{"prompt": "a ", "system": "s", "id": "x"}, {"messages": [{"content": "b", "role": "user"}]}]
    first, second = read_prompts("--prompts", write_lines(tmp_path / "in.jsonl", rows))
    assert [each["role"] for each in first.messages] == ["system", "user"] and first.row.fields["id"] == "x"
    assert second.messages == [{"role": "user", "content": "b"}] and second.row.id.endswith("in.jsonl:2")


def test_prompts_that_differ_in_white_space_or_spelling_alone_have_one_key(tmp_path):
    rows = [{"prompt": "a"}, {"prompt": " a\n"}, {"prompt": [{"content": "a ", "role": "user"}]}, {"prompt": "A"}]
    keys = [each.key for each in read_prompts("--prompts", write_lines(tmp_path / "in.jsonl", rows))]
    assert keys[0] == keys[1] == keys[2] != keys[3]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a"}, "b"], "in.jsonl:2: the row is the text 'b', expected an object with a prompt"),
        ([{"prompt": "a"}, {"question": "b"}], "in.jsonl:2: field 'prompt' is missing"),
        ([{"prompt": "a", "context": "c"}], "in.jsonl:1: context: filled, but not read"),
        ([], "--prompts .*in.jsonl is empty"),
    ],
)
def test_a_file_with_a_fault_is_refused_by_its_row(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        read_prompts("--prompts", write_lines(tmp_path / "in.jsonl", rows))
