"""Every recipe is a valid configuration, and says in its header how it is started."""

from pathlib import Path

import pytest

from hafrm_ds.engine.deepspeed_config import load_config

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
    }
