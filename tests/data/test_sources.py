"""What may be written as a source, and what is said of faults in it."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from hafrm_ds.data.sources import EvalSources, Source, TrainSources, source_from_string


class Sets(BaseModel):
    train: TrainSources
    eval: EvalSources = {}


def faults(**sets):
    with pytest.raises(ValidationError) as caught:
        Sets.model_validate({"train": "x.jsonl"} | sets)
    return [(".".join(map(str, fault["loc"])), fault["msg"]) for fault in caught.value.errors()]


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("pairs.jsonl", {"path": "pairs.jsonl"}),
        ("pairs.jsonl?split=train&lang=en", {"path": "pairs.jsonl", "where": {"split": "train", "lang": "en"}}),
        ("org/name?split=test&config=c&x=1", {"path": "org/name", "split": "test", "config": "c", "where": {"x": "1"}}),
        ("org/name?split=train+test", {"path": "org/name", "split": "train+test"}),
        ("x.jsonl?lang=c++&name=a%26b", {"path": "x.jsonl", "where": {"lang": "c++", "name": "a&b"}}),
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
    assert "'x?a=1&a=2' gives a field of its row filter twice" in faults(train="x?a=1&a=2")[0][1]
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


def test_the_configuration_loads_nothing_that_reads_data():
    code = "import sys, hafrm_ds.config; print(*sys.modules.keys() & {'datasets', 'pyarrow', 'torch', 'transformers'})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.split() == []
