"""Preferences as rows of messages: what is read, and a row for each comparison of the scored ones."""

import json

import pytest

from hafrm_ds.data.pairs import assistant, user
from hafrm_ds.data.sources import Source
from hafrm_ds.evaluation.pair_rows import compared, grouping_of, rows_of_pairs, text_of


def test_rows_are_the_pairs_that_are_used(tmp_path):
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c", "source": "x"},
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        {"prompt": "d", "chosen": "e", "rejected": "f", "source": "y"},
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = rows_of_pairs([Source(path=str(tmp_path / "pairs.jsonl"))], tmp_path / "cache", None)
    first = found[0]
    assert first == {
        "id": f"{tmp_path}/pairs.jsonl:1",
        "source": "x",
        "prompt": [user("a")],
        "responses": [[assistant("b")], [assistant("c")]],
        "comparisons": [[0, 1, 1.0, 1.0]],
    }
    assert [row["source"] for row in found] == ["x", "y"]
    rows_of_one = rows_of_pairs([Source(path=str(tmp_path / "pairs.jsonl"))], tmp_path / "cache", 1)
    assert rows_of_one in ([], [first], [found[1]])


def test_a_comparison_has_its_own_answers_and_scores():
    row = {
        "id": "x",
        "responses": ["a", "b", "c"],
        "comparisons": [[2, 0, 1.0, 1.0], [1, 0, 0.8, 2.0]],
        "scores": [1.0, 2.0, 3.0],
    }
    assert [(each["responses"], each["scores"]) for each in compared([row])] == [
        (["c", "a"], [3.0, 1.0]),
        (["b", "a"], [2.0, 1.0]),
    ]
    assert [each["scores"] for each in compared([row | {"scores": None}])] == [None, None]
    groups = grouping_of(compared([row, row]))
    assert groups.number.tolist() == [0, 0, 1, 1] and groups.answers.tolist() == [[2, 0], [1, 0]] * 2
    assert groups.target == pytest.approx([1, 0.8] * 2) and groups.weight.tolist() == [1, 2] * 2
    assert grouping_of(compared([row | {"comparisons": [[0, 1, 1.0, 1.0]]}] * 2)) is None


def test_the_text_of_several_messages():
    assert text_of([user("a"), {"role": "assistant", "content": None}, assistant("b")]) == "a\n\n\n\nb"


def test_a_group_is_one_row_with_all_its_comparisons(tmp_path):
    row = {"prompt": "a", "responses": ["b", "c", "d"], "scores": [2, 3, 1]}
    (tmp_path / "groups.jsonl").write_text(json.dumps(row) + "\n")
    source = Source(path=str(tmp_path / "groups.jsonl"))
    [found] = rows_of_pairs([source], tmp_path / "cache", None)
    assert [text_of(answer) for answer in found["responses"]] == ["c", "b", "d"]
    assert sorted(each[:2] for each in found["comparisons"]) == [[0, 1], [0, 2], [1, 2]]
