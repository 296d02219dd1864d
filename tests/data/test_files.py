"""Reading of every kind of file, folder and hub set, and the errors of those that cannot be read."""

import csv
import gzip
import io
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hafrm_ds.data import files as tables
from hafrm_ds.data.reading import FEATURES
from tests.data.row_files import error_of, margins, prompts, rows_of, write_lines, write_rows


@pytest.mark.parametrize(
    ("path", "first_id"),
    [
        ("x.jsonl", "x.jsonl:2"),
        ("x.json", "x.json:1"),
        ("x.jsonl.gz", "x.jsonl.gz:1"),
        ("x.json.gz", "x.json.gz:1"),
        ("x.parquet", "x.parquet:1"),
        ("saved", "saved:1"),
        ("splits", "splits[train]:1"),
    ],
)
def test_every_kind_of_file(read, path, first_id):
    write_rows(path, rows_of(3))
    pairs = read(path)
    assert pairs.features == FEATURES
    assert pairs[0] == {
        "prompt": [{"role": "user", "content": "p0"}],
        "answers": [[{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]],
        "comparisons": [{"better": 0, "worse": 1, "margin": None, "target": 1.0, "weight": 1.0}],
        "attributes": [],
        "trains_reward": True,
        "source": path.split(".")[0],
        "id": first_id,
        "format": "explicit_prompt",
        "dropped": "",
        "deselected": "",
        "remarks": "",
    }
    assert prompts(pairs) == ["p0", "p1", "p2"]


@pytest.mark.parametrize(("path", "delimiter"), [("x.csv", ","), ("x.tsv", "\t"), ("x.CSV.GZ", ",")])
def test_values_separated_by_commas_or_tabs(read, path, delimiter):
    rows = [["prompt", "chosen", "rejected", "margin"], ["p0", "a", 'b "x",\ny', "0.5"], [], ["p1", "a", "", ""]]
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows(rows)
    content = text.getvalue().encode("utf-8-sig")
    Path(path).write_bytes(gzip.compress(content) if path.endswith("GZ") else content)
    pairs = read(path)
    assert prompts(pairs) == ["p0", "p1"] and margins(pairs) == [0.5, None]
    assert pairs["id"][:] == [f"{path}:2", f"{path}:4"]
    assert [rejected[0]["content"] for _, rejected in pairs["answers"]] == ['b "x",\ny', ""]


def test_cells_are_labels_flags_and_messages(read):
    header = "prompt,response_0,response_1,better_response_id,safer_response_id,is_response_0_safe,is_response_1_safe\n"
    Path("x.csv").write_text(header + "p,b,a,,1,False,True\np,a,b,0,0,True,False\n")
    pairs = read({"path": "x.csv", "exactly_one_safe": True})
    assert [chosen[0]["content"] for chosen, _ in pairs["answers"]] == ["a", "a"]
    messages = """[{'role': 'user', 'content': "it's p"}]"""  # as pandas writes it
    Path("y.csv").write_text('prompt,chosen,rejected\n"' + messages.replace('"', '""') + '",a,b\n')
    assert prompts(read("y.csv")) == ["it's p"]


@pytest.mark.parametrize("path", ["x.JSONL", "x.ndjson", "x.Json", "x.ndjson.gz"])
def test_other_names_of_json(read, path):
    write_lines(path, rows_of(2))
    if path.endswith(".gz"):
        Path(path).write_bytes(gzip.compress(Path(path).read_bytes()))
    assert prompts(read(path)) == ["p0", "p1"]


def test_a_json_list_behind_many_spaces(read):
    Path("x.json").write_text(" " * 5000 + json.dumps(rows_of(2)))
    assert prompts(read("x.json")) == ["p0", "p1"]


def test_a_text_that_is_no_utf8_in_parquet(read):
    column = pa.Array.from_buffers(pa.string(), 1, pa.array([b"p \xff"], pa.binary()).buffers())
    pq.write_table(pa.table({"prompt": column, "chosen": ["a"], "rejected": ["b"]}), "x.parquet")
    assert error_of(read, "x.parquet").startswith("x.parquet: cannot be read as parquet: UnicodeDecodeError")


def test_two_columns_of_one_name_in_parquet(read):
    columns = [["p"], ["a"], ["b"], ["c"]]
    pq.write_table(pa.table(columns, names=["prompt", "chosen", "rejected", "chosen"]), "x.parquet")
    message = "x.parquet: two columns have the same name (prompt, chosen, rejected, chosen)"
    assert error_of(read, "x.parquet") == message


def test_json_lines_in_a_json_file(read):
    write_lines("x.json", rows_of(2))
    assert read("x.json")["id"][:] == ["x.json:1", "x.json:2"]


def test_columns_of_mixed_types_in_json_lines(read):
    message = {"role": "user", "content": "p"}
    write_lines("x.jsonl", [*rows_of(1, votes=3), *rows_of(1, prompt=[message], votes="all", margin=0.5)])
    assert margins(read("x.jsonl")) == [None, 0.5]


def test_rows_of_single_messages_are_no_whole_set(read):
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    rows = [{name: {"role": role, "content": f"{name} {n}"} for name, role in roles.items()} for n in range(2)]
    write_lines("x.jsonl", rows)
    assert prompts(read("x.jsonl")) == ["prompt 0", "prompt 1"]


def test_a_folder_of_files_is_read_in_order_of_names(read):
    Path("data").mkdir()
    write_lines("data/b.jsonl", rows_of(1))
    write_rows("data/a.parquet", rows_of(2))
    Path("data/README.md").write_text("not data")
    assert read("data")["id"][:] == ["data/a.parquet:1", "data/a.parquet:2", "data/b.jsonl:1"]


def test_what_lies_beside_the_data_is_passed_over(read):
    """A snapshot of the hub: data/, with descriptions beside it, and what macOS leaves behind."""
    Path("set/data").mkdir(parents=True)
    Path("set/dataset_infos.json").write_text('{"default": {}}')
    Path("set/data/._a.jsonl").write_bytes(b"\0\5\x16\7Mac OS X")
    write_lines("set/data/a.jsonl", rows_of(2))
    assert read("set")["id"][:] == ["set/data/a.jsonl:1", "set/data/a.jsonl:2"]


def test_a_folder_of_several_splits_is_not_read_as_one(read):
    Path("set").mkdir()
    for split in ("train_prefs", "test_prefs"):
        write_rows(f"set/{split}-00000-of-00001.parquet", rows_of(2))
    assert "set: holds several splits (test_prefs, train_prefs): give split" in error_of(read, "set")
    read_ids = read({"path": "set", "split": "train_prefs"})["id"][:]
    assert read_ids == [f"set/train_prefs-00000-of-00001.parquet:{number}" for number in (1, 2)]
    assert "holds no shards of split 'train'" in error_of(read, {"path": "set", "split": "train"})


@pytest.mark.parametrize("names", [("Train.csv", "Test.csv"), ("hh_train.csv", "hh_test.csv"), ("a.csv", "a-dev.csv")])
def test_files_that_are_held_out_by_a_word_of_their_names(read, names):
    Path("set").mkdir()
    for name in names:
        Path("set", name).write_text("prompt,chosen,rejected\np,a,b\n")
    assert "set: holds several splits" in error_of(read, "set")


def test_shards_whose_names_end_in_a_hash(read):
    Path("set").mkdir()
    for split, number in (("train", 0), ("train", 1), ("test", 0)):
        write_rows(f"set/{split}-{number:05}-of-00002-a09b74b3ef9c3b5{number}.parquet", rows_of(1))
    assert "set: holds several splits (test, train): give split" in error_of(read, "set")
    assert len(read({"path": "set", "split": "train"})) == 2


def test_a_link_to_a_file_that_is_gone(read):
    Path("set").mkdir()
    write_lines("set/a.jsonl", rows_of(1))
    Path("set/b.jsonl").symlink_to("../blobs/b")
    assert error_of(read, "set") == (
        "set/b.jsonl: is a link to ../blobs/b, which is not there; fetch it, or remove the link"
    )


def test_a_split_of_a_saved_folder(read):
    write_rows("splits", rows_of(3))
    assert read({"path": "splits", "split": "test"})["id"][:] == ["splits[test]:1"]
    assert "has no split 'validation' (splits: train, test)" in error_of(
        read, {"path": "splits", "split": "validation"}
    )


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("x.jsonl", b"", "x.jsonl: holds no rows"),
        ("x.json", b"[]", "x.json: holds no rows"),
        (
            "x.jsonl",
            b'{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"prompt": \n',
            "x.jsonl:2: is not valid JSON: Expecting value (column 11)",
        ),
        ("x.jsonl", b'{"prompt": "\xe9"}\n', "x.jsonl:1: is not UTF-8 (byte 13 is 0xe9)"),
        ("x.jsonl", b"[1, 2]\n", "x.jsonl:1: is a list of 2, expected an object with fields"),
        ("x.json", b'[{"a": 1}', "x.json: is not valid JSON: Expecting ',' delimiter (column 10)"),
        ("x.json", b"[3]", "x.json:1: is the int 3, expected an object with fields"),
        ("x.jsonl.gz", b"plain", "x.jsonl.gz: cannot be read: Not a gzipped file (b'pl')"),
        ("x.jsonl.gz", gzip.compress(b"{}\n" * 999, mtime=0)[:-20], "x.jsonl.gz: cannot be read: "),
        ("x.parquet", b"plain", "x.parquet: cannot be read as parquet: ArrowInvalid"),
        (
            "x.json",
            b'{\n "data": [\n  {"prompt": "p"}\n ]\n}',
            "x.json: is one JSON object with data (a list of 1); a list of objects, or an object a line, is expected",
        ),
        (
            "x.jsonl",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n",
            "x.jsonl: is a Git LFS pointer (size 12345), not the file itself: fetch it with git lfs pull",
        ),
        ("x.parquet", b"version https://git-lfs.github.com/spec/v1\n", "x.parquet: is a Git LFS pointer, not the file"),
        ("x.jsonl", b'{"a": ' + b"1" * 5000 + b"}", "x.jsonl:1: holds a number of too many digits"),
        ("x.jsonl", b'{"a": ' + b"[" * 99999 + b"]" * 99999 + b"}", "x.jsonl:1: is nested too deeply to be read"),
        (
            "x.xlsx",
            b"a,b",
            "x.xlsx: unknown kind of file; known are .jsonl, .json, .jsonl.gz, .json.gz, .ndjson, .ndjson.gz, .parquet",
        ),
        ("x.jsonl", b'[\n {"prompt": "p"}\n]', "x.jsonl: is one JSON list over several lines, not an object a line"),
        ("x.jsonl", b'{\n "prompt": "p"\n}', "x.jsonl: is one JSON object with prompt (the text 'p'); a list of"),
        (
            "x.jsonl",
            b'{"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]}',
            "x.jsonl:1: these are rows of fine-tuning (messages): it holds one answer",
        ),
        ("x.json", b'{"data": [{"prompt": "p"}]}', "x.json:1: is one JSON object with data (a list of 1); a list of"),
        (
            "x.json",
            b'{"prompt": ["p", "q"], "chosen": ["a", "b"], "rejected": ["b", "a"]}',
            "x.json:1: is one JSON object with prompt (a list of 2), chosen (a list of 2), rejected (a list of 2)",
        ),
        (
            "x.jsonl",
            b'{"prompt": "p", "chosen": "a", "rejected": "b", "chosen": "c"}\n',
            "x.jsonl:1: an object has the key 'chosen' twice: which is meant?",
        ),
        ("x.json", b'[{"chosen": [{"role": "x", "role": "y"}]}]', "x.json: an object has the key 'role' twice"),
        ("x.csv", b"", "x.csv: holds no rows"),
        ("x.csv", b"prompt,chosen\np\n", "x.csv:2: has 1 cells, but the header names 2 columns (prompt, chosen)"),
        ("x.csv", b"prompt,prompt\n", "x.csv:1: two columns have the same name (prompt, prompt)"),
        ("x.csv", b'prompt,chosen\n"p,a\n', "x.csv:2: cannot be read: unexpected end of data"),
        ("x.csv", b"prompt,chosen\np,\xe9\n", "x.csv:1: is not UTF-8 (byte 0xe9)"),
        ("x.jsonl", b'{"question": "q"}', "x.jsonl:1: the columns question are of no known format"),
        (
            "x.jsonl",
            b'{"prompt": "p", "chosen": "a", "rejected": "b"}\n\n{"prompt": "p", "chosen": null, "rejected": "b"}\n',
            "x.jsonl:3: field 'chosen' is null, expected a text or a list of messages",
        ),
    ],
)
def test_unreadable_files(read, path, content, message):
    Path(path).write_bytes(content)
    assert message in error_of(read, path)


def test_places_without_data(read):
    assert error_of(read, "no.jsonl") == "no.jsonl: no such file or folder, and not the form of a hub id (ORG/NAME)"
    Path("empty").mkdir()
    assert "empty: this folder holds no data file (.jsonl" in error_of(read, "empty")
    Path("damaged").mkdir()
    Path("damaged/state.json").write_text("{}")
    assert "damaged: datasets cannot load this folder: " in error_of(read, "damaged")
    write_lines("x.jsonl", rows_of(1))
    message = error_of(read, {"path": "x.jsonl", "split": "train"})
    assert (
        message
        == "x.jsonl: split 'train' was given, but this is local data; rows are chosen with where, or with portion"
    )
    assert "data_dir 'd' was given, but this is local data" in error_of(read, {"path": "x.jsonl", "data_dir": "d"})


# ---- hub -----------------------------------------------------------------------------------------------------------


def test_hub_sets_are_loaded_with_all_their_options(read, monkeypatch, tmp_path):
    write_rows("saved", rows_of(2))
    calls = []

    def load_dataset(path, **options):
        calls.append((path, options))
        return datasets.load_from_disk("saved")

    monkeypatch.setattr(tables.datasets, "load_dataset", load_dataset)
    pairs = read({"path": "org/name", "config": "c", "data_dir": "d", "revision": "r", "split": "train[:2]"})
    assert pairs["id"][:] == ["org/name[train[:2]]:1", "org/name[train[:2]]:2"]
    assert pairs["source"][:] == ["org/name", "org/name"]
    options = {
        "name": "c",
        "data_dir": "d",
        "revision": "r",
        "split": "train[:2]",
        "cache_dir": str(tmp_path / "cache"),
    }
    assert calls == [("org/name", options)]


def test_a_hub_set_that_cannot_be_had(read, monkeypatch):
    def load_dataset(path, **options):
        raise ConnectionError("Couldn't reach\nthe hub")

    monkeypatch.setattr(tables.datasets, "load_dataset", load_dataset)
    assert error_of(read, "org/name?config=c") == (
        "org/name: no such file or folder here, and it could not be had from the Hugging Face hub "
        "(config c, split train): ConnectionError: Couldn't reach the hub"
    )


def test_a_file_of_a_hub_set(read, monkeypatch, tmp_path):
    write_lines("downloaded.json", rows_of(1))

    def hf_hub_download(repository, file, *, repo_type, revision):
        assert (repository, file, repo_type, revision) == ("org/name", "some/pairs.json", "dataset", None)
        return str(tmp_path / "downloaded.json")

    monkeypatch.setattr(tables, "hf_hub_download", hf_hub_download)
    assert read("hf://datasets/org/name/some/pairs.json")["id"][:] == ["hf://datasets/org/name/some/pairs.json:1"]
