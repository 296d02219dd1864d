"""From sources to the pairs of a set: outcomes of rows, formats, the cache, and the real files."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hafrm_ds.data import files as tables
from hafrm_ds.data import reading
from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.preparation import PreparationOptions, prepare_groups
from hafrm_ds.data.sources import Source
from tests.data.row_files import error_of, outcomes, rows_of, write_lines

REAL_DATA = os.environ.get("HAFRM_REAL_DATA")
"""A folder with the public sets as JSON lines."""


def test_ties_are_selection(read):
    row = {"instruction": "p", "input": "", "output_1": "a", "output_2": "b"}
    write_lines("x.jsonl", [row | {"preference": value} for value in (1, 2, 0, 3)])
    assert outcomes(read("x.jsonl")) == {"": 2, "tie": 2}
    write_lines("y.jsonl", [row | {"preference": 0}] * 3)
    assert error_of(read, "y.jsonl") == "y: no pair is left of 3 rows (tie: 3)"
    message = error_of(read, {"path": "x.jsonl", "exactly_one_safe": True})
    assert "exactly_one_safe was given, but these are rows of format alpaca_farm, not safe_rlhf" in message


def conversation(*contents):
    return [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]


def test_faults_of_rows_are_dropped_and_ties_and_filters_deselected(read):
    rows = [
        {"chosen": conversation("p", "a"), "rejected": conversation("p", "b")},
        {"chosen": conversation("p", "a"), "rejected": conversation("q", "b")},
        {"chosen": conversation("p", "a"), "rejected": conversation("p", "b", "q")},
        {"chosen": conversation("p", "a", "q", "c"), "rejected": conversation("p", "b", "q", "d")},
    ]
    write_lines("x.jsonl", rows)
    pairs = read("x.jsonl")
    assert pairs["dropped"][:] == ["", "no common prompt", "does not end with an answer", ""]
    assert set(pairs["deselected"][:]) == {""}
    pairs = read({"path": "x.jsonl", "single_turn": True})
    assert pairs["dropped"][:] == ["", "no common prompt", "", ""]
    assert pairs["deselected"][:] == ["", "", "more than one turn", "more than one turn"]


def test_a_source_of_faults_alone_is_an_error(read):
    write_lines("x.jsonl", [{"chosen": "apple", "rejected": "apricot"}] * 2)
    write_lines("y.jsonl", rows_of(9))
    assert error_of(read, "y.jsonl", "x.jsonl") == "x: no pair is left of 2 rows (no common prompt: 2)"


def test_every_row_tells_its_format(read):
    write_lines("x.jsonl", rows_of(1))
    write_lines("y.jsonl", [{"chosen": "p\na", "rejected": "p\nb"}, {"chosen": "a", "rejected": "b"}])
    expected = ["explicit_prompt", "implicit_text", "implicit_text"]
    for _ in ("read", "taken from the cache"):
        assert read("x.jsonl", "y.jsonl")["format"][:] == expected


def test_columns_that_are_not_read_stand_with_their_rows(read):
    write_lines("x.jsonl", [*rows_of(1, votes=3, note=None), *rows_of(1, votes=0, note="x", margin="big")])
    pairs = read("x.jsonl")
    fault = "x.jsonl:2: field 'margin' is the text 'big', expected a finite number"
    assert pairs["remarks"][:] == ["not read: votes", f"not read: votes\nnot read: note\nmargin: {fault}"]
    write_lines("y.jsonl", rows_of(1, system_prompt="Be kind."))
    assert "y.jsonl:1: system_prompt: filled, but not read" in error_of(read, "y.jsonl")
    assert outcomes(read({"path": "y.jsonl", "ignore_columns": ["system_prompt"]})) == {"": 1}


# ---- cache ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch):
    """Counts how often rows are really read."""
    count = []
    original = tables.read_json_lines
    monkeypatch.setattr(tables, "read_json_lines", lambda *given: count.append(given) or original(*given))
    return count


def test_rows_are_read_again_only_when_the_file_or_the_source_changes(read, reads, monkeypatch):
    write_lines("x.jsonl", rows_of(3))
    first = read("x.jsonl")
    again = read("x.jsonl")
    assert len(reads) == 1 and again._fingerprint == first._fingerprint

    limited = read({"path": "x.jsonl", "max_pairs": 2})  # chosen from the rows already read
    assert len(reads) == 1 and limited._fingerprint != first._fingerprint

    assert read({"path": "x.jsonl", "name": "other"})["source"][:] == ["other"] * 3
    assert len(reads) == 2

    before = os.stat("x.jsonl")
    write_lines("x.jsonl", rows_of(3, chosen="c"))  # the same size
    os.utime("x.jsonl", ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    changed = read("x.jsonl")
    assert len(reads) == 3 and changed._fingerprint != first._fingerprint
    assert changed[0]["answers"][0] == [{"role": "assistant", "content": "c"}]

    write_lines("x.jsonl", rows_of(4))
    os.utime("x.jsonl", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert len(read("x.jsonl")) == 4

    monkeypatch.setattr(reading, "FORMAT_VERSION", reading.FORMAT_VERSION + 1)
    read("x.jsonl")
    assert len(reads) == 5


def test_pairs_keep_which_losses_their_source_trains(make_tokenizer, tmp_path):
    for name in ("human", "own"):
        write_lines(tmp_path / f"{name}.jsonl", rows_of(3))
    sources = [Source(path=str(tmp_path / "human.jsonl")), Source(path=str(tmp_path / "own.jsonl"), reward_loss=False)]
    formatter = ChatFormatter.create(make_tokenizer(), None, "2024-07-26")

    def prepare(sources):
        options = PreparationOptions(max_length=100, truncation="drop", cache_dir=tmp_path / "cache")
        return prepare_groups(sources, formatter=formatter, options=options, role="train", seed=0)

    both = prepare(sources)
    assert [both[place].trains_reward for place in range(6)] == [True] * 3 + [False] * 3
    assert both.report.policy_alone == 3 and both.report.to_json()["policy_alone"] == 3
    plain = prepare([sources[0], sources[1].model_copy(update={"reward_loss": True})])
    assert plain.fingerprint != both.fingerprint and "policy_alone" not in plain.report.to_json()


def test_nothing_is_kept_of_a_file_with_an_error(read):
    write_lines("x.jsonl", [*rows_of(2), {"prompt": "p"}])
    for _ in range(2):
        assert "x.jsonl:3: field 'chosen' is missing (fields: prompt)" in error_of(read, "x.jsonl")


# What looks like a pair but says it in other types: read as one it would be another, so it is refused by name.


def test_texts_as_bytes_are_refused(read):
    rows = [{"prompt": "Tell me about tea", "chosen": "tea are good", "rejected": "go away tea"}] * 3
    types = pa.schema([(name, pa.binary()) for name in rows[0]])
    pq.write_table(pa.Table.from_pylist([{k: v.encode() for k, v in row.items()} for row in rows], types), "x.parquet")
    said = error_of(read, "x.parquet")
    assert said.startswith("x.parquet:1: field 'prompt' is the bytes b'Tell me about tea', expected a ")


def test_labels_that_are_texts_are_refused(read):
    texts = {"prompt": "Tell tea", "response_0": "good tea", "response_1": "bad tea"}
    labels = {"better_response_id": "0", "safer_response_id": "0", "is_response_0_safe": "True"}
    write_lines("x.jsonl", [texts | labels | {"is_response_1_safe": "False"}] * 3)
    said = "x.jsonl:1: field 'safer_response_id' is the text '0', expected a finite number"
    assert error_of(read, "x.jsonl") == said
    assert "field 'better_response_id' is the text '0'" in error_of(read, {"path": "x.jsonl", "label": "helpful"})
    only_one_safe = {"path": "x.jsonl", "exactly_one_safe": True}
    assert "field 'is_response_0_safe' is the text 'True', expected true or false" in error_of(read, only_one_safe)


@pytest.mark.parametrize("rejected", ["bad tea", ["bad tea"]])
def test_several_answers_on_a_side_are_refused(read, rejected):
    write_lines("x.jsonl", [{"prompt": "tea", "chosen": ["good tea", "fine tea"], "rejected": rejected}] * 3)
    said = "x.jsonl:1: message 1 of field 'chosen' is the text 'good tea', expected an object with role and content"
    assert error_of(read, "x.jsonl") == said


# ---- real data -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(REAL_DATA is None, reason="HAFRM_REAL_DATA=FOLDER")
@pytest.mark.parametrize(
    ("name", "train", "test", "single_turn"),
    [
        ("hh_harmless", 1828, 475, 658),
        ("hh_helpful", 4915, 1234, 1919),
        ("hhh_alignment", 0, 221, 221),
        ("pandalm", 541, 168, 709),
        ("pku_saferlhf", 2731, 571, 3302),
    ],
)
def test_real_files(read, name, train, test, single_turn):
    path = f"{REAL_DATA}/{name}.jsonl"
    pairs = read(path)
    assert outcomes(pairs) == {"": train + test}
    assert all(row["prompt"][-1]["role"] == "user" and len(row["answers"][0]) == 1 for row in pairs)
    assert outcomes(read(f"{path}?split=test"))[""] == test
    assert outcomes(read({"path": path, "single_turn": True}))[""] == single_turn


CORPUS: dict[str, dict[str, str]] = {name: {} for name in (
    "hh_harmless", "hh_helpful", "hhh_alignment", "pandalm", "pku_saferlhf", "alpaca_eval_groups",
)} | {"xstest_answers": {"chosen": "refusal", "rejected": "compliance"}}  # fmt: skip
"""The sets by name, with the columns of their sources."""


def answers_of(row: dict, columns: dict[str, str]) -> list[tuple[float, str]]:
    """(score, text) of the answers of a row, found without the readers: each text that is no blank once, the best
    first."""
    if "responses" not in row:
        rated = list(zip((1.0, 0.0), (row[columns.get(name, name)] for name in ("chosen", "rejected"))))
    else:
        rated = sorted(zip(row["scores"], row["responses"]), key=lambda each: -each[0])
    first = {text: score for score, text in reversed(rated) if text.strip()}
    return [(score, text) for score, text in rated if first.get(text) == score]


@pytest.mark.skipif(REAL_DATA is None, reason="HAFRM_REAL_DATA=FOLDER")
@pytest.mark.parametrize("name", CORPUS)
def test_texts_of_the_corpus_are_found_again_in_what_is_tokenised(make_tokenizer, tmp_path, name):
    """Of 200 rows of each set, prompt and answers whole and in their places, and all that differ compared."""
    file, columns = tmp_path / f"{name}.jsonl", CORPUS[name]
    with Path(f"{REAL_DATA}/{name}.jsonl").open() as lines:
        file.write_text("".join(line for line, _ in zip(lines, range(200))))
    source = Source(path=str(file), columns=columns)
    formatter = ChatFormatter.create(make_tokenizer(), "text", "2026-01-01")
    options = PreparationOptions(10**6, "drop", max_dropped_share=1, num_proc=1, cache_dir=tmp_path / "cache")
    prepared = prepare_groups([source], formatter=formatter, options=options, role="train", seed=0)
    wanted = []
    for row in map(json.loads, file.open()):
        prompt = row["prompt"] if isinstance(row["prompt"], str) else "".join(each["content"] for each in row["prompt"])
        rated = answers_of(row, columns)
        places = range(len(rated))
        pairs = [(better, worse) for better in places for worse in places if rated[better][0] > rated[worse][0]]
        if pairs:
            wanted.append(([prompt + text + "</s>" for _, text in rated], pairs))
    found = [
        (
            [
                formatter.tokenizer.decode([*group.prompt_ids, *ids], clean_up_tokenization_spaces=False)
                for ids in group.responses
            ],
            [each[:2] for each in group.comparisons],
        )
        for group in map(prepared.__getitem__, range(len(prepared)))
    ]
    total = prepared.report.total
    print(f"{name}: {total.read} groups of 200 rows, {total.kept} kept, {total.deselected} {total.dropped}")
    assert found == wanted and len(found) > 195
    assert total.dropped.keys() <= {"identical answers", "empty answer"} and total.deselected.keys() <= {"tie"}


@pytest.mark.skipif(REAL_DATA is None, reason="HAFRM_REAL_DATA=FOLDER")
def test_a_set_of_the_corpus_without_answers_is_refused_by_its_columns(read):
    """And no file of the folder is forgotten."""
    assert {path.stem for path in Path(REAL_DATA).glob("*.*")} - {"README"} == {*CORPUS, "xstest_prompts"}
    assert "xstest_prompts.csv:2: the columns id, prompt, type" in error_of(read, f"{REAL_DATA}/xstest_prompts.csv")
