import pytest

from hafrm_ds.data.presets import PRESETS
from hafrm_ds.data.selection import selected, take_portion
from hafrm_ds.data.sources import Source, resolve_preset
from tests.data.row_files import outcomes, prompts, rows_of, write_lines, write_rows


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
    parts = {role: selected(take_portion([""] * total, resolved(name, role)["portion"])) for role in ("train", "eval")}
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
