"""The share of fields that an answer has exactly as they are known."""

import json
import time

import pytest

from hafrm_ds.data.pairs import assistant, user
from hafrm_ds.errors import ModelError
from hafrm_ds.rewards.loading import load_reward

KNOWN = {"name": "Ines Okafor", "bicycles": 2, "hurt": False, "when": "3 May"}


@pytest.fixture
def reward(tmp_path):
    rows = [
        {"prompt": "Fill in the form.", "fields": KNOWN},
        {"prompt": [user("Who?"), assistant("Who asks?"), user("I.")], "fields": {"name": "Ines"}},
    ]
    (tmp_path / "known.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "form.yaml").write_text("fields: known.jsonl")
    return load_reward(tmp_path / "form.yaml")


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        (json.dumps(KNOWN), 1.0),
        (f"Here it is:\n```json\n{json.dumps(KNOWN | {'more': 1})}\n```", 1.0),
        (json.dumps(KNOWN | {"name": " Ines Okafor\n", "bicycles": "2"}), 1.0),
        (json.dumps(KNOWN | {"name": "ines okafor", "hurt": None}), 0.5),
        ("name: Ines Okafor\n  when :  3 May \nbicycles: two", 0.5),
        ("bicycles: 2\nhurt: false\nnothing else", 0.5),
        ("Here it is:\nname: Ines Okafor\nnotes:\nbicycles: 2", 0.5),  # a line without a value has none of the next
        ("name: Ines Okafor\r\nwhen: 3 May at 10:30", 0.25),
        ("I cannot.", 0.0),
        ("{}", 0.0),
    ],
)
def test_fields_count_where_they_are_exactly_as_known(answer, value, reward):
    assert reward.scores([[user("Fill in the form."), assistant(answer)]])[0].value == value


def test_an_answer_of_empty_lines_is_read_in_no_time(reward):
    started = time.monotonic()
    assert reward.scores([[user("Fill in the form."), assistant("\n" * 60_000 + "b")]])[0].value == 0.0
    assert time.monotonic() - started < 5


def test_a_prompt_that_is_not_known_is_an_error_and_never_a_0(reward):
    known = [user("Who?"), assistant("Who asks?"), user(" I. ")]
    scores = reward.scores([[*known, assistant("name: Ines")], [user("I."), assistant("name: Ines")]])
    assert [score.value for score in scores] == [1.0, None]
    assert scores[1].error == "known.jsonl has no row of this prompt"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{}", "known.jsonl:1: field 'prompt' is missing"),
        ('{"prompt": "p", "fields": {}}', "known.jsonl:1: field 'fields' is an object"),
        ("{", "known.jsonl:1"),
        (
            '{"prompt": "p", "fields": {"a": 1}}\n{"prompt": "p ", "fields": {"a": "1"}}\n'
            '{"prompt": "p", "fields": {"a": 2}}',
            "known.jsonl:3: an earlier row has the same prompt and other fields",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_named(line, problem, tmp_path):
    (tmp_path / "known.jsonl").write_text(line)
    (tmp_path / "form.yaml").write_text("fields: known.jsonl")
    with pytest.raises(ModelError) as error:
        load_reward(tmp_path / "form.yaml")
    assert problem in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    (tmp_path / "form.yaml").write_text("fields: none.jsonl")
    with pytest.raises(ModelError, match=r"none\.jsonl"):
        load_reward(tmp_path / "form.yaml")
