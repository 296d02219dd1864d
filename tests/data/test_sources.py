"""What may be written as a source, reading of every kind of file, presets, selection, mixing, and the cache."""

import gzip
import json
import os
from collections import Counter
from pathlib import Path

import datasets
import pytest
import yaml
from pydantic import BaseModel, ValidationError

from hafrm_ds.data import sources
from hafrm_ds.data.sources import (
    FEATURES,
    PRESETS,
    EvalSources,
    Source,
    TrainSources,
    mixed_counts,
    portion_range,
    read_pairs,
    resolve_preset,
    source_from_string,
    take_portion,
    usable,
)
from hafrm_ds.errors import DataError

SHARED_DATA = Path(__file__).parents[3] / "shared/data"


class Sets(BaseModel):
    train: TrainSources
    eval: EvalSources = {}


@pytest.fixture
def read(tmp_path, monkeypatch):
    """read(source, ...) in a folder of its own, with a cache of its own."""
    monkeypatch.chdir(tmp_path)
    datasets.disable_progress_bars()

    def run(*given, role="train", seed=0):
        return read_pairs(Sets(train=list(given)).train, role=role, seed=seed, cache_dir=tmp_path / "cache")

    yield run
    datasets.enable_progress_bars()


def rows_of(count, **fields):
    return [{"prompt": f"p{n}", "chosen": "a", "rejected": "b"} | fields for n in range(count)]


def write_lines(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def outcomes(pairs):
    return Counter(pairs["outcome"][:])


def prompts(pairs):
    return [row["prompt"][0]["content"] for row in pairs if not row["outcome"]]


def error_of(read, *given, **options):
    with pytest.raises(DataError) as caught:
        read(*given, **options)
    return str(caught.value)


def faults(**sets):
    with pytest.raises(ValidationError) as caught:
        Sets.model_validate({"train": "x.jsonl"} | sets)
    return [(".".join(map(str, fault["loc"])), fault["msg"]) for fault in caught.value.errors()]


# ---- what may be written -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("pairs.jsonl", {"path": "pairs.jsonl"}),
        ("pairs.jsonl?split=train&lang=en", {"path": "pairs.jsonl", "where": {"split": "train", "lang": "en"}}),
        ("org/name?split=test&config=c&x=1", {"path": "org/name", "split": "test", "config": "c", "where": {"x": "1"}}),
        ("org/name-v1.5?split=test", {"path": "org/name-v1.5", "split": "test"}),
        ("preset:hh_helpful", {"preset": "hh_helpful"}),
        ("preset:hh_helpful?split=test", {"preset": "hh_helpful", "split": "test"}),
    ],
)
def test_source_from_string(text, fields):
    assert source_from_string(text) == fields


def test_a_folder_with_one_slash_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("org/name").mkdir(parents=True)
    assert source_from_string("org/name?split=test") == {"path": "org/name", "where": {"split": "test"}}


def test_eval_sets_are_named_after_their_sources(tmp_path):
    file = tmp_path / "held_out.v2.jsonl"
    file.touch()
    sets = Sets(train="x.jsonl", eval=[str(file), "preset:hh_helpful", {"path": "x", "name": "mine"}]).eval
    assert {name: len(of_set) for name, of_set in sets.items()} == {"held_out": 1, "hh_helpful": 1, "mine": 1}
    named = Sets(train="x.jsonl", eval={"a": ["x.jsonl", "y.jsonl"], "b": "z.jsonl"}).eval
    assert [source.path for source in named["a"]] == ["x.jsonl", "y.jsonl"]
    assert Sets(train="x.jsonl", eval=None).eval == {}


def test_faults_are_named_with_the_nearest_valid_name():
    assert faults(train={"path": "x", "splt": "train"}) == [
        ("train.0", "Value error, a source has no field 'splt'; did you mean 'split'?")
    ]
    assert "unknown preset 'hh_helpfull'; did you mean 'hh_helpful'?" in faults(train="preset:hh_helpfull")[0][1]
    assert (
        "unknown format 'transcript'; did you mean 'transcripts'?"
        in faults(train={"path": "x", "format": "transcript"})[0][1]
    )
    assert "a source needs a path or a preset" in faults(train={"name": "x"})[0][1]
    assert "two evaluation sets are called 'x.jsonl'" in faults(eval=["x.jsonl?a=1", "x.jsonl?a=2"])[0][1]
    assert faults(eval=["x.jsonl", {"path": "y", "splt": 1}])[0][0] == "eval.y.0"


def test_weights_are_given_to_all_sources_or_to_none():
    message = faults(train=[{"path": "x", "weight": 1}, "y.jsonl"])[0][1]
    assert "either all sources of a mix have a weight or none has; without one: y.jsonl" in message


@pytest.mark.parametrize(
    ("portion", "message"),
    [
        ("5%", "is no portion"),
        (":", "is no portion"),
        (":5 %", "is no portion"),
        ("-5:", "is no portion"),
        (":120%", "goes beyond 100%"),
        (":1.5", "asks for a part of a pair"),
        ("50%:5%", "is empty"),
        ("7:7", "is empty"),
        (":0", "is empty"),
        ("100%:", "is empty"),
        (650, "write a portion in quotes"),
    ],
)
def test_bad_portions_are_faults_of_the_configuration(portion, message):
    assert message in faults(train={"path": "x", "portion": portion})[0][1]


def test_only_given_fields_are_shown_and_saved():
    source = Source(preset="hh_harmless", path="x.jsonl", max_pairs=5)
    assert repr(source) == "Source(path='x.jsonl', preset='hh_harmless', max_pairs=5)"
    saved = yaml.safe_load(yaml.safe_dump(Sets(train=[source]).model_dump(mode="json")))
    assert saved["train"] == [{"path": "x.jsonl", "preset": "hh_harmless", "max_pairs": 5}]
    assert Sets(**saved).train == [source]


# ---- reading files -------------------------------------------------------------------------------------------------


def write_rows(path, rows):
    """Rows in the format that the name of the file says; "saved" and "splits" are folders of save_to_disk."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.endswith(".jsonl"):
        Path(path).write_text("\n" + lines)
    elif path.endswith(".json.gz"):
        Path(path).write_bytes(gzip.compress(json.dumps(rows, indent=1).encode("utf-8-sig")))
    elif path.endswith(".jsonl.gz"):
        Path(path).write_bytes(gzip.compress(lines.encode()))
    elif path.endswith(".json"):
        Path(path).write_text("\ufeff" + json.dumps(rows), encoding="utf-8")
    elif path.endswith(".parquet"):
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif path == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(path)
    elif path == "splits":
        data = datasets.Dataset.from_list(rows)
        datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(path)


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
        "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"role": "assistant", "content": "b"}],
        "margin": None,
        "source": path.split(".")[0],
        "id": first_id,
        "outcome": "",
    }
    assert prompts(pairs) == ["p0", "p1", "p2"]


def test_json_lines_in_a_json_file(read):
    write_lines("x.json", rows_of(2))
    assert read("x.json")["id"][:] == ["x.json:1", "x.json:2"]


def test_columns_of_mixed_types_in_json_lines(read):
    message = {"role": "user", "content": "p"}
    write_lines("x.jsonl", [*rows_of(1, votes=3), *rows_of(1, prompt=[message], votes="all", margin=0.5)])
    assert read("x.jsonl")["margin"][:] == [None, 0.5]


def test_a_folder_of_files_is_read_in_order_of_names(read):
    Path("data").mkdir()
    write_lines("data/b.jsonl", rows_of(1))
    write_rows("data/a.parquet", rows_of(2))
    Path("data/README.md").write_text("not data")
    assert read("data")["id"][:] == ["data/a.parquet:1", "data/a.parquet:2", "data/b.jsonl:1"]


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
        ("x.jsonl.gz", gzip.compress(b"{}\n" * 999)[:-20], "x.jsonl.gz: cannot be read: "),
        ("x.parquet", b"plain", "x.parquet: cannot be read as parquet: ArrowInvalid"),
        ("x.csv", b"a,b", "x.csv: unknown kind of file; known are .jsonl, .json, .jsonl.gz, .json.gz, .parquet"),
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

    monkeypatch.setattr(sources.datasets, "load_dataset", load_dataset)
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

    monkeypatch.setattr(sources.datasets, "load_dataset", load_dataset)
    assert error_of(read, "org/name?config=c") == (
        "org/name: no such file or folder here, and it could not be had from the Hugging Face hub "
        "(config c, split train): ConnectionError: Couldn't reach the hub"
    )


def test_a_file_of_a_hub_set(read, monkeypatch, tmp_path):
    write_lines("downloaded.json", rows_of(1))

    def hf_hub_download(repository, file, *, repo_type, revision):
        assert (repository, file, repo_type, revision) == ("org/name", "some/pairs.json", "dataset", None)
        return str(tmp_path / "downloaded.json")

    monkeypatch.setattr(sources, "hf_hub_download", hf_hub_download)
    assert read("hf://datasets/org/name/some/pairs.json")["id"][:] == ["hf://datasets/org/name/some/pairs.json:1"]


# ---- row filter ----------------------------------------------------------------------------------------------------


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
    assert pairs["outcome"][:] == ["row filter kind=pair", "", "", "row filter kind=pair"]
    assert pairs[0] | {"outcome": ""} == {
        "prompt": [], "chosen": [], "rejected": [], "margin": None, "source": "x", "id": "x.jsonl:1", "outcome": ""
    }  # fmt: skip


def test_row_filters_that_select_nothing(read):
    write_lines("x.jsonl", [*rows_of(3, part="train"), *rows_of(1, part="test")])
    assert error_of(read, "x.jsonl?prat=train") == (
        "x.jsonl: no row has the field 'prat' of the row filter (fields: prompt, chosen, rejected, part)"
    )
    assert error_of(read, "x.jsonl?part=eval") == (
        "x.jsonl: row filter part=eval leaves none of 4 rows (part is 'train' 3 times, 'test' 1 times)"
    )


def test_ties_and_more_turns_are_selection(read):
    row = {"instruction": "p", "input": "", "output_1": "a", "output_2": "b"}
    write_lines("x.jsonl", [row | {"preference": value} for value in (1, 2, 0, 3)])
    assert outcomes(read("x.jsonl")) == {"": 2, "tie": 2}
    write_lines("y.jsonl", [row | {"preference": 0}] * 3)
    assert error_of(read, "y.jsonl") == "y: no pair is left of 3 rows (tie: 3)"
    message = error_of(read, {"path": "x.jsonl", "exactly_one_safe": True})
    assert "exactly_one_safe was given, but these are rows of format alpaca_farm, not safe_rlhf" in message


# ---- portion and max_pairs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("portion", "total", "expected"),
    [
        (":5%", 20490, range(0, 1024)),
        ("5%:", 20490, range(1024, 20490)),
        (":10%", 9691, range(0, 969)),
        ("10%:", 9691, range(969, 9691)),
        ("5%:50%", 1000, range(50, 500)),
        (":29%", 100, range(0, 29)),
        (":12.5%", 16, range(0, 2)),
        (":1000", 3000, range(0, 1000)),
        (":1000", 30, range(0, 30)),
        ("10:50%", 40, range(10, 20)),
        ("2:7", 40, range(2, 7)),
    ],
)
def test_portion_range(portion, total, expected):
    assert portion_range(portion, total) == expected


def test_a_portion_counts_only_pairs_left_by_the_filters(read):
    write_lines("x.jsonl", [{"prompt": f"p{n}", "chosen": "a", "rejected": "b", "odd": n % 2} for n in range(40)])
    pairs = read({"path": "x.jsonl", "where": {"odd": 1}, "portion": ":10%"})
    assert prompts(pairs) == ["p1", "p3"]
    assert outcomes(pairs) == {"": 2, "row filter odd=1": 20, "outside portion": 18}
    message = error_of(read, {"path": "x.jsonl", "portion": ":2%"})
    assert message == "x: no pair is left of 40 rows (outside portion: 40)"


def test_max_pairs_is_a_seeded_choice_in_reading_order(read):
    write_lines("x.jsonl", rows_of(40))
    source = {"path": "x.jsonl", "max_pairs": 10}
    first = read(source)
    assert outcomes(first) == {"": 10, "over max_pairs": 30}
    assert prompts(first) == sorted(prompts(first), key=lambda prompt: int(prompt[1:]))
    assert prompts(read(source)) == prompts(first)
    assert prompts(read(source, seed=1)) != prompts(first)
    assert outcomes(read({"path": "x.jsonl", "max_pairs": 100})) == {"": 40}


# ---- mixing --------------------------------------------------------------------------------------------------------


def test_sources_without_weights_are_concatenated(read):
    write_lines("x.jsonl", rows_of(2))
    write_lines("y.jsonl", rows_of(1))
    assert read("y.jsonl", "x.jsonl")["id"][:] == ["y.jsonl:1", "x.jsonl:1", "x.jsonl:2"]


@pytest.mark.parametrize(
    ("available", "weights", "counts"),
    [
        ([100, 40, 1000], [1, 1, 1], [40, 40, 40]),
        ([100, 40], [3, 1], [100, 33]),
        ([100, 40], [0.1, 0.3], [13, 40]),
        ([49], [0.1], [49]),
    ],
)
def test_mixed_counts(available, weights, counts):
    assert mixed_counts(available, weights) == counts


def test_weights_cap_the_sources_that_are_not_scarcest(read):
    write_lines("x.jsonl", rows_of(10))
    write_lines("y.jsonl", rows_of(30))
    mix = [{"path": "x.jsonl", "weight": 1}, {"path": "y.jsonl", "weight": 2}]
    pairs = read(*mix)
    used = pairs.filter(lambda row: not row["outcome"])
    assert Counter(used["source"][:]) == {"x": 10, "y": 20}
    assert len(set(used["id"][:])) == 30
    assert outcomes(pairs) == {"": 30, "over mixing weight": 10}
    assert read(*mix)["outcome"][:] == pairs["outcome"][:] != read(*mix, seed=1)["outcome"][:]


def test_a_weight_that_leaves_a_source_without_pairs(read):
    write_lines("x.jsonl", rows_of(1))
    write_lines("y.jsonl", rows_of(5))
    message = error_of(read, {"path": "x.jsonl", "weight": 9}, {"path": "y.jsonl", "weight": 1})
    assert message == "the weights leave a source without pairs: x (weight 9) gets 1 of 1, y (weight 1) gets 0 of 5"


# ---- presets -------------------------------------------------------------------------------------------------------


def resolved(name, role, **given):
    return resolve_preset(Source(preset=name, **given), role).model_dump()


def test_presets_depend_on_the_role():
    assert resolved("hh_harmless", "train") == {
        "path": "Anthropic/hh-rlhf", "preset": "hh_harmless", "data_dir": "harmless-base", "split": "train",
        "single_turn": True,
    }  # fmt: skip
    assert resolved("hh_helpful", "eval")["split"] == "test"
    assert resolved("hh_helpful", "eval")["data_dir"] == "helpful-base"
    beaver = resolved("beaver_safe", "eval")
    assert (beaver["split"], beaver["portion"], beaver["exactly_one_safe"], beaver["label"]) == (
        "test", ":1000", True, "safe"
    )  # fmt: skip
    assert "portion" not in resolved("beaver_safe", "train")


@pytest.mark.parametrize(
    ("name", "total", "train", "evaluation"),
    [("chatbot_arena", 20490, 19466, 1024), ("alpaca_human_preference", 9691, 8722, 969)],
)
def test_parts_of_sets_without_official_splits(name, total, train, evaluation):
    parts = {role: usable(take_portion([""] * total, resolved(name, role)["portion"])) for role in ("train", "eval")}
    assert {role: len(part) for role, part in parts.items()} == {"train": train, "eval": evaluation}
    assert parts["eval"] + parts["train"] == list(range(total))


def test_what_the_user_gives_overrides_the_preset(tmp_path):
    given = resolved("hh_helpful", "eval", split="train", single_turn=False, path="org/mirror")
    assert (given["path"], given["split"], given["single_turn"]) == ("org/mirror", "train", False)
    file = tmp_path / "local.jsonl"
    file.touch()
    assert resolved("hh_harmless", "train", path=str(file)) == {
        "path": str(file), "preset": "hh_harmless", "single_turn": True
    }  # fmt: skip


def test_a_preset_on_a_local_file(read):
    def row(n):
        winner = ["model_a", "model_b", "tie", "tie (bothbad)"][n % 4]
        more = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "c"}] if n % 8 == 0 else []
        return {
            "conversation_a": [{"role": "user", "content": f"p{n}"}, {"role": "assistant", "content": "a"}, *more],
            "conversation_b": [{"role": "user", "content": f"p{n}"}, {"role": "assistant", "content": "b"}, *more],
            "winner": winner,
        }

    write_lines("arena.jsonl", [row(n) for n in range(160)])  # 80 ties, 20 of several turns, 60 left
    source = {"preset": "chatbot_arena", "path": "arena.jsonl"}
    rest = {"tie": 80, "more than one turn": 20}
    train, evaluation = read(source), read(source, role="eval")
    assert outcomes(train) == {"": 57, "outside portion": 3, **rest}
    assert outcomes(evaluation) == {"": 3, "outside portion": 57, **rest}
    assert set(prompts(train)).isdisjoint(prompts(evaluation))
    assert set(train["source"][:]) == {"chatbot_arena"}


def test_a_preset_on_a_saved_folder_keeps_its_split(read):
    write_rows("splits", rows_of(3))
    source = {"preset": "hh_harmless", "path": "splits"}
    assert (len(read(source)), len(read(source, role="eval"))) == (3, 1)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_valid_source(name):
    for role in ("train", "eval"):
        assert Source.model_validate(resolved(name, role)).path


# ---- cache ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch):
    """Counts how often rows are really read."""
    count = []
    original = sources.read_json_lines
    monkeypatch.setattr(sources, "read_json_lines", lambda *given: count.append(given) or original(*given))
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
    assert changed[0]["chosen"] == [{"role": "assistant", "content": "c"}]

    write_lines("x.jsonl", rows_of(4))
    os.utime("x.jsonl", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert len(read("x.jsonl")) == 4

    monkeypatch.setattr(sources, "FORMAT_VERSION", sources.FORMAT_VERSION + 1)
    read("x.jsonl")
    assert len(reads) == 5


def test_nothing_is_kept_of_a_file_with_an_error(read):
    write_lines("x.jsonl", [*rows_of(2), {"prompt": "p"}])
    for _ in range(2):
        assert "x.jsonl:3: field 'chosen' is missing (fields: prompt)" in error_of(read, "x.jsonl")


# ---- real data -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the folder shared/data is not here")
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
    path = str(SHARED_DATA / f"{name}.jsonl")
    pairs = read(path)
    assert outcomes(pairs) == {"": train + test}
    assert all(row["prompt"][-1]["role"] == "user" and len(row["chosen"]) == 1 for row in pairs)
    assert outcomes(read(f"{path}?split=test"))[""] == test
    assert outcomes(read({"path": path, "single_turn": True}))[""] == single_turn
