"""Attributes of answers, from a row to the arrays that training and evaluation read."""

import json

import numpy as np
import pytest

from hafrm_ds.config import DataConfig
from hafrm_ds.data.formats import read_groups_of
from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.pairs import Deselected, Row
from hafrm_ds.data.preparation import prepare_groups
from hafrm_ds.data.prepared import ATTRIBUTES, PreparedGroups
from hafrm_ds.data.sources import Source
from hafrm_ds.data.splitting import TrainingItems
from hafrm_ds.errors import DataError

PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
GROUP = {"prompt": "p", "responses": ["a", "b", "c"], "scores": [1, 3, 2]}


def attributes_of(fields, format_name="explicit_prompt", **options):
    (group,) = read_groups_of(Row(fields, "rows.jsonl:7", "rows"), format_name, Source(path="rows.jsonl", **options))
    return {answer[0]["content"]: known for answer, known in zip(group.answers, group.attributes, strict=True)}


@pytest.mark.parametrize(
    ("fields", "format_name", "expected"),
    [
        (
            PAIR | {"attributes": [{"x": 4, "y": 1.5}, {"x": None}]},
            "explicit_prompt",
            {"a": {"x": 4, "y": 1.5}, "b": {}},
        ),
        # Answers that change places take their attributes along.
        (
            PAIR | {"attributes": [{"x": 1}, {"x": 2}], "probability": 0.2},
            "explicit_prompt",
            {"b": {"x": 2}, "a": {"x": 1}},
        ),
        (GROUP | {"attributes": [{"x": 1}, None, {"x": 3}]}, "groups", {"b": {}, "c": {"x": 3}, "a": {"x": 1}}),
        # An answer without a score, and one that repeats another.
        (
            {"prompt": "p", "responses": ["a", "b", "a", "c"], "scores": [1, None, 1, 2]}
            | {"attributes": [{"x": 1}, {"x": 2}, {"x": 3}, {"x": 4}]},
            "groups",
            {"c": {"x": 4}, "a": {"x": 1}},
        ),
        (
            {"instruction": "p", "generations": ["a", "b"], "ratings": [1, 2], "attributes": [{"x": 1}, {"x": 2}]},
            "ratings",
            {"b": {"x": 2}, "a": {"x": 1}},
        ),
    ],
)
def test_each_answer_keeps_its_attributes(fields, format_name, expected):
    found = attributes_of(fields, format_name)
    assert found == expected and list(found) == list(expected)


@pytest.mark.parametrize("attributes", [None, [], [{"x": None}, {}], [{"x": float("nan")}, None]])
def test_a_row_that_rates_nothing_has_none(attributes):
    row = Row(PAIR | {"attributes": attributes}, "rows.jsonl:7", "rows")
    (group,) = read_groups_of(row, "explicit_prompt", Source(path="rows.jsonl"))
    assert group.attributes == ()


@pytest.mark.parametrize(
    ("fields", "format_name", "said"),
    [
        (
            PAIR | {"attributes": [{"x": 1}]},
            "explicit_prompt",
            "field 'attributes' is a list of 1, expected a list of 2 obj",
        ),
        (
            GROUP | {"attributes": {"x": 1}},
            "groups",
            "field 'attributes' is an object with the keys x, expected a list of 3",
        ),
        (
            PAIR | {"attributes": [{"x": "much"}, None]},
            "explicit_prompt",
            "'attributes[0].x' is the text 'much', expected",
        ),
        (
            PAIR | {"attributes": [None, 3]},
            "explicit_prompt",
            "'attributes[1]' is the int 3, expected an object of names",
        ),
        (
            {
                "prompt": "p",
                "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}],
                "attributes": [{}, {}],
            },
            "nectar",
            "is read of pairs and beside responses or generations",
        ),
    ],
)
def test_what_cannot_be_read_is_named(fields, format_name, said):
    with pytest.raises(DataError) as caught:
        attributes_of(fields, format_name)
    assert str(caught.value).startswith("rows.jsonl:7: ") and said in str(caught.value)
    row = Row(fields, "rows.jsonl:7", "rows")
    (group,) = read_groups_of(row, format_name, Source(path="rows.jsonl", ignore_columns=["attributes"]))
    assert isinstance(group, Deselected) or group.attributes == ()


# ---- prepared ------------------------------------------------------------------------------------------------------


@pytest.fixture
def prepare(tmp_path, make_tokenizer):
    """prepare(rows, **options of the source): the groups of a file."""

    def prepare(rows, name="rows.jsonl", **source) -> PreparedGroups:
        content = "".join(json.dumps(row) + "\n" for row in rows)
        if not (tmp_path / name).exists():  # a file that is written anew is read anew
            (tmp_path / name).write_text(content)
        options = DataConfig(train="x", cache_dir=tmp_path / "cache", max_length=64, max_dropped_share=1).preparation
        formatter = ChatFormatter.create(make_tokenizer(), None, "2024-07-26")
        source = Source(path=str(tmp_path / name), **source)
        return prepare_groups([source], formatter=formatter, options=options, role="train", seed=0)

    return prepare


def rated(*known, **fields):
    return {"prompt": "q", "responses": ["aa", "bbb", "c"], "scores": [1, 2, 3], "attributes": known} | fields


ROWS = [
    rated({"x": 1}, {"x": 2, "y": 5}, None),
    {"prompt": "r", "responses": ["d", "e"], "scores": [1, 2]},
    rated({"x": 3}, {"x": 4}, {"x": 6}, responses=["a", "", "b"], prompt="s"),  # an empty answer is left out
    rated({"x": 9}, {"z": 9}, None, responses=["", "", ""]),  # dropped, with all that it says
]


def test_they_lie_beside_the_answers(prepare, tmp_path):
    for groups in (prepare(ROWS), prepare(ROWS)):  # made, and found in the cache
        assert groups.report.attributes == {"x": 4, "y": 1} and len(groups) == 3
        values = groups.attributes_of(["y", "x", "none"], np.arange(len(groups.keys)))
        nan = np.nan  # answers stand with the best first
        expected = [[nan, nan], [5, 2], [nan, 1], [nan, nan], [nan, nan], [nan, 6], [nan, 3]]
        np.testing.assert_array_equal(values[:, :2], np.array(expected, dtype=np.float32))
        assert values.dtype == np.float32 and np.isnan(values[:, 2]).all()
    items = TrainingItems.of(groups, "shared_prefix", 10_000)
    np.testing.assert_array_equal(
        groups.attributes_of(["x"], items.responses([2, -1])), np.array([[6], [3], [nan], [nan]], dtype=np.float32)
    )
    assert len(list((tmp_path / "cache").glob(f"prepared-*/{ATTRIBUTES}"))) == 1
    assert "y (1)" in "".join(groups.report._remarks())


def test_a_set_without_is_as_it_always_was(prepare, tmp_path):
    """Files and fingerprint: a run of before is resumed."""
    plain = [{name: value for name, value in row.items() if name != "attributes"} for row in ROWS]
    without, ignored, rated_set = prepare(plain, "a.jsonl"), prepare(ROWS, ignore_columns=["attributes"]), prepare(ROWS)
    assert without.attributes is None and "attributes" not in without.report.to_json()
    assert without.fingerprint == ignored.fingerprint != rated_set.fingerprint
    assert len(list((tmp_path / "cache").glob(f"prepared-*/{ATTRIBUTES}"))) == 1
    changed = [rated({"x": 1}, {"x": 2, "y": 4}, None), *ROWS[1:]]
    renamed = [rated({"x": 1}, {"x": 2, "w": 5}, None), *ROWS[1:]]
    assert len({prepare(rows, f"{n}.jsonl").fingerprint for n, rows in enumerate((ROWS, changed, renamed))}) == 3


def test_rows_of_one_prompt_are_joined_with_them(prepare):
    pairs = [
        PAIR | {"attributes": [{"x": 1}, {"x": 2}]},
        PAIR | {"chosen": "b", "rejected": "c", "attributes": [None, {"x": 3}]},
    ]
    groups = prepare(pairs, group_by_prompt=True)
    assert len(groups) == 1 and len(groups[0].responses) == 3
    assert groups.attributes_of(["x"], np.arange(3)).ravel().tolist() == [1, 2, 3]
