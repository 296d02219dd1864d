"""What a row to score may look like, and what is said of one that cannot be scored."""

import json

import pytest

from hafrm_ds.data.pairs import Row, assistant, user
from hafrm_ds.errors import DataError
from hafrm_ds.rewards.loading import load_reward
from hafrm_ds.rewards.model import ModelReward, as_score
from hafrm_ds.scoring.rows import ScoredRow, conversations_of
from tests.tiny_models import save_tiny_final

SYSTEM = {"role": "system", "content": "s"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> ModelReward:
    return load_reward(save_tiny_final(tmp_path_factory.mktemp("model") / "final"), device="cpu")


@pytest.mark.parametrize(
    ("fields", "field", "conversations"),
    [
        ({"messages": [user("a"), assistant("b")]}, "score", [[user("a"), assistant("b")]]),
        ({"prompt": "a", "response": "b"}, "score", [[user("a"), assistant("b")]]),
        ({"prompt": [user("a")], "response": [assistant("b")]}, "score", [[user("a"), assistant("b")]]),
        (
            {"prompt": "a", "responses": ["b", [assistant("c")]]},
            "scores",
            [[user("a"), assistant("b")], [user("a"), assistant("c")]],
        ),
        ({"prompt": "\n\nHuman: a\n\nAssistant:", "response": "b"}, "score", [[user("a"), assistant("b")]]),
        # What is null is not given, as where a file holds rows of two layouts.
        ({"messages": None, "prompt": "a", "response": "b"}, "score", [[user("a"), assistant("b")]]),
        ({"responses": None, "prompt": "a", "response": "b"}, "score", [[user("a"), assistant("b")]]),
        (
            {"prompt": None, "response": None, "messages": [user("a"), assistant("b")]},
            "score",
            [[user("a"), assistant("b")]],
        ),
        ({"prompt": None, "messages": [user("a")], "responses": ["b"]}, "scores", [[user("a"), assistant("b")]]),
        # What stands before the prompt in columns of its own; and a column that repeats what is read.
        ({"system": "s", "prompt": "a", "response": "b"}, "score", [[SYSTEM, user("a"), assistant("b")]]),
        (
            {"system": "s", "messages": [SYSTEM, user("a"), assistant("b")]},
            "score",
            [[SYSTEM, user("a"), assistant("b")]],
        ),
        (
            {"history": [["x", "y"]], "prompt": "a", "response": "b"},
            "score",
            [[user("x"), assistant("y"), user("a"), assistant("b")]],
        ),
        ({"messages": [user("a"), assistant("b")], "prompt": "a"}, "score", [[user("a"), assistant("b")]]),
        ({"messages": json.dumps([user("a"), assistant("b")])}, "score", [[user("a"), assistant("b")]]),
        ({"messages": [user("a"), assistant("b")], "tools": []}, "score", [[user("a"), assistant("b")]]),
    ],
)
def test_the_forms_of_a_row(fields, field, conversations):
    assert conversations_of(Row(fields, "in.jsonl:1", "")) == (field, conversations)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": "a"}, r"in.jsonl:7: needs messages, or prompt with response or responses \(fields: text\)"),
        ({"prompt": "a"}, r"needs messages.*\(fields: prompt\)"),
        ({"messages": None}, r"needs messages.*\(fields: messages\)"),
        ({"prompt": "a", "response": "b", "context": "c"}, "context: filled, but not read"),
        ({"messages": [user("a"), assistant("b")], "prompt": "other"}, "prompt: filled, but not read"),
        ({"prompt": "a", "response": "b", "tools": "search"}, "field 'tools' is the text 'search', expected a list of"),
        ({"prompt": "a", "response": "b", "images": ["x.png"]}, "images: has images or other media"),
        ({"messages": [{"role": "narrator", "content": "a"}]}, "is the text 'narrator', expected one of system"),
        ({"messages": "a"}, "field 'messages' is the text 'a', expected a list of messages"),
        ({"messages": [{"role": "user"}]}, "message 1 of field 'messages' is an object with the keys role"),
        ({"prompt": 3, "response": "b"}, "field 'prompt' is the int 3"),
        ({"prompt": "a", "response": None}, "field 'response' is null, expected a text"),
        ({"prompt": "a", "responses": []}, "field 'responses' is a list of 0, expected a list of answers"),
        ({"prompt": "a", "responses": ["b", 4]}, r"field 'responses\[1\]' is the int 4, expected a text"),
    ],
)
def test_a_row_that_cannot_be_read_is_named_with_its_field(fields, message):
    with pytest.raises(DataError, match=message):
        conversations_of(Row(fields, "in.jsonl:7", ""))


@pytest.mark.parametrize(
    ("line", "fields", "message"),
    [
        (b'{"prompt": "a"', {}, "in.jsonl:7: is not valid JSON"),
        (b'{"prompt": "\xff"}', {}, "in.jsonl:7: is not UTF-8"),
        (b"[1]", {}, "in.jsonl:7: is a list, expected an object"),
        (b'{"id": 5}', {"id": 5}, "in.jsonl:7: needs messages"),
        (b'{"id": 5, "prompt": "a", "response": "' + b"b" * 600 + b'"}', None, "in.jsonl:7: the conversation has"),
    ],
)
def test_a_bad_line_is_kept_with_its_reason(model, line, fields, message):
    row = ScoredRow.read(line, "in.jsonl:7")
    written, error = row.written(model.scores(row.conversations), "in.jsonl:7")
    assert error.startswith(message)
    result = json.loads(written)
    assert result.pop("score") is None and result.pop("score_error") == error
    assert fields is None or result == fields


@pytest.mark.parametrize(
    ("fields", "lost"),
    [
        ({"prompt": "a", "response": "b", "tools": [{"name": "f"}]}, "tools"),
        ({"prompt": "a", "response": [{"role": "assistant", "tool_calls": [{"name": "f"}]}]}, "tool calls"),
        ({"messages": [user("a"), {"role": "tool", "content": "3"}, assistant("b")]}, "tool messages"),
    ],
)
def test_tools_that_the_template_does_not_write_cost_a_row_its_score(model, fields, lost):
    row = ScoredRow.read(json.dumps(fields).encode(), "in.jsonl:7")
    written, error = row.written(model.scores(row.conversations), "in.jsonl:7")
    assert error.startswith(f"in.jsonl:7: the tokenizer's own chat template leaves out {lost}: the model would not see")
    assert json.loads(written) == fields | {"score": None, "score_error": error}


def test_a_row_comes_out_as_it_came_in_and_a_score_that_is_no_number_is_an_error():
    line = '{"id": 12345678901234567890, "note": "\\ud800 é", "prompt": "a", "responses": ["b", "c"]}'.encode()
    row = ScoredRow.read(line, "in.jsonl:1")
    written, error = row.written([as_score(1.5), as_score(-2.25)], "in.jsonl:1")
    assert error == ""
    assert json.loads(written) == json.loads(line) | {"scores": [1.5, -2.25]}
    written, error = row.written([as_score(1.5), as_score(float("nan"))], "in.jsonl:1")
    assert json.loads(written)["scores"] is None
    assert error == "in.jsonl:1: the score is not finite"


def test_a_row_that_was_scored_before_keeps_its_score_under_another_name():
    line = b'{"prompt": "a", "response": "b", "score": 4.5, "scores": [1, 2], "score_error": "old message"}'
    row = ScoredRow.read(line, "in.jsonl:1")
    written, error = row.written([as_score(1.5)], "in.jsonl:1")
    assert error == ""
    expected = {"prompt": "a", "response": "b", "input_score": 4.5, "input_scores": [1, 2], "score": 1.5}
    assert json.loads(written) == expected
    written, error = row.written([as_score(float("nan"))], "in.jsonl:1")
    assert json.loads(written) == expected | {"score": None, "score_error": error}


def test_a_number_of_too_many_digits_costs_its_row_alone():
    row = ScoredRow.read(b'{"prompt": "a", "response": "b", "user_id": ' + b"7" * 5000 + b"}", "in.jsonl:2")
    assert row.error == "in.jsonl:2: holds a number of too many digits (4,300 can be read)"


@pytest.mark.parametrize(
    ("row", "rated", "expected"),
    [
        ({"response": "b"}, [[1.5, 0.25, 4]], {"score": 1.5, "attributes": {"x": 0.25, "y": 4}}),
        (
            {"responses": ["b", "c"]},
            [[1.5, 0.25, 4], [-1, 2, 3]],
            {"scores": [1.5, -1], "attributes": [{"x": 0.25, "y": 4}, {"x": 2, "y": 3}]},
        ),
    ],
)
def test_attributes_stand_beside_the_score(row, rated, expected):
    fields = {"prompt": "a", "attributes": "of the input"} | row
    read = ScoredRow.read(json.dumps(fields).encode(), "in.jsonl:1")
    written, error = read.written([as_score(*values) for values in rated], "in.jsonl:1", ["x", "y"])
    assert (json.loads(written), error) == ({"prompt": "a"} | row | {"input_attributes": "of the input"} | expected, "")
    written, _ = read.written([as_score(values[0]) for values in rated], "in.jsonl:1")
    assert json.loads(written)["attributes"] == "of the input"
    written, error = read.written([as_score(1.0, float("nan"), 1.0)] * len(rated), "in.jsonl:1", ["x", "y"])
    assert error == "in.jsonl:1: the score is not finite" and "attributes" not in json.loads(written)
