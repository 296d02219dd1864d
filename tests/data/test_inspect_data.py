import json
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def inspect_data(make_tokenizer, tmp_path, monkeypatch):
    """inspect_data(*options) -> exit status of the launch file for ten pairs and a folder with a tokenizer alone."""
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = [
        {"prompt": f"question {index}", "chosen": "good", "rejected": "bad", "split": ("train", "test")[index % 2]}
        for index in range(10)
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "--output_dir": tmp_path / "run",
        "--deepspeed": ROOT / "ds_configs/zero3.json",
        "--model.name_or_path": tmp_path / "model",
        "--data.cache_dir": tmp_path / "cache",
        "--data.train": f"{data}?split=train",
        "--data.eval": json.dumps({"held_out": f"{data}?split=test"}),
    }

    def inspect_data(*more):
        given = [str(word) for option in options.items() for word in option]
        monkeypatch.setattr(sys, "argv", ["inspect_data.py", *given, *more])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(ROOT / "launch/inspect_data.py"), run_name="__main__")
        return left.value.code

    return inspect_data


def test_shows_every_set_and_the_tokens_of_examples(inspect_data, capsys):
    assert inspect_data("--examples", "2") == 0
    shown = capsys.readouterr().out
    assert " train " in shown and " eval: held_out " in shown
    assert shown.count("rejected, 4 tokens, read-out at index") == 2 * 2
    assert "'b' 'a' 'd' >>'</s>'<<" in shown


def test_health_compares_the_sets_instead_of_showing_rows(inspect_data, capsys):
    assert inspect_data("--health") == 0
    shown = capsys.readouterr().out
    assert "Length bias" in shown and "Shared with train" in shown and "read-out at index" not in shown


def test_user_errors_are_one_message(inspect_data, capsys):
    assert inspect_data("--data.chat_template", "chatlm") == 1
    assert capsys.readouterr().err.startswith("error: the chat template 'chatlm' cannot be read")
    assert inspect_data("--data.max_length", "10", "--data.truncation", "drop") == 1
    assert "5 of 5 selected pairs (100.0%) would be dropped" in capsys.readouterr().err
