"""Every recipe is a valid configuration, and says in its header how it is started."""

import json
import runpy
from pathlib import Path

import pytest
from rich.console import Console

from hafrm_ds.engine.deepspeed_config import load_config
from tests.tiny_models import save_tiny_model

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_is_valid_and_survives_its_own_dump(recipe, tmp_path):
    config = load_config(["--config", str(recipe)])
    dumped = tmp_path / "config.yaml"
    dumped.write_text(config.to_yaml())
    assert load_config(["--config", str(dumped)]) == config


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_the_header_names_the_launch_command(recipe):
    path = recipe.relative_to(ROOT)
    header = [line for line in recipe.read_text().splitlines() if line.startswith("#")]
    assert any("deepspeed" in line and f"launch/train.py --config {path}" in line for line in header)


def test_there_are_recipes():
    assert {recipe.stem for recipe in RECIPES} >= {
        "quickstart",
        "smollm2_hh_harmless",
        "paper_phi2",
        "paper_mistral_lora",
        "llama31_8b_skywork",
        "qwen3_8b_helpsteer3",
        "qwen3_06b_ultrafeedback",
        "tulu3_8b_mixture",
    }


WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
LAYOUTS = {
    "llama31_8b_skywork": lambda question, good, bad: {
        "chosen": [*asked(question), said(good)],
        "rejected": [*asked(question), said(bad)],
        "source": "magpie",
    },
    "qwen3_8b_helpsteer3": lambda question, good, bad: {
        "domain": "general",
        "language": "english",
        "context": asked(question),
        "response1": bad,
        "response2": good,
        "overall_preference": 2,
        "individual_preference": [{"score": 2, "reasoning": "better", "feedback_1": "-", "feedback_2": "+"}],
    },
    "qwen3_06b_ultrafeedback": lambda question, good, bad: {
        "prompt": question,
        "prompt_id": "ab12",
        "chosen": [*asked(question), said(good)],
        "rejected": [*asked(question), said(bad)],
        "messages": [*asked(question), said(good)],
        "score_chosen": 8.0,
        "score_rejected": 6.5,
    },
    "tulu3_8b_mixture": lambda question, good, bad: {
        "id": "q1",
        "source": "wildchat",
        "prompt": question,
        "chosen": [*asked(question), said(good)],
        "rejected": [*asked(question), said(bad)],
    },
}
"""Recipe -> a row in the layout of the set that it trains on."""


def asked(question: str) -> list[dict]:
    return [{"role": "user", "content": question}]


def said(answer: str) -> dict:
    return {"role": "assistant", "content": answer}


@pytest.mark.parametrize("recipe", LAYOUTS)
def test_the_layout_of_a_recipe_is_read_whole(recipe, tmp_path):
    """inspect_data.py on five rows, with the recipe as it is but for the places of model and data."""
    file = tmp_path / "rows.jsonl"
    rows = [LAYOUTS[recipe](f"Count to {word}.", f"one to {word}", f"not {word}") for word in WORDS[:5]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {
        "--config": ROOT / "launch" / "recipes" / f"{recipe}.yaml",
        "--model.name_or_path": save_tiny_model(tmp_path / "model"),
        "--data.train": file,
        "--data.eval": "{}",
        "--evaluation.every_steps": 0,
        "--data.cache_dir": tmp_path / "cache",
    }
    command = runpy.run_path(str(ROOT / "launch" / "inspect_data.py"))
    options = load_config([str(word) for pair in given.items() for word in pair], command["InspectOptions"])
    console = Console(width=200)
    with console.capture() as capture:
        command["inspect"](options, console)
    shown = capture.get()
    assert "Count to" in shown and "one to" in shown and "WARNING" not in shown
    counts = next(line.split() for line in shown.splitlines() if line.split()[1:2] == ["total"])
    assert counts[counts.index("5") :].count("5") == 2, "5 read, 5 kept"
