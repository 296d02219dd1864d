"""What a model card says, and where the licence comes from."""

import pytest

from hafrm_ds.saved.card import base_license, model_card


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"README.md": "---\nlicense: mit\ntags: [a]\n---\n# A model\n"}, "mit"),
        (
            {"README.md": "# No front matter\n", "LICENSE": "\n  Some Licence, Version 2\nmore\n"},
            "Some Licence, Version 2",
        ),
        ({"README.md": "---\n: [broken\n---\n"}, None),
        ({}, None),
    ],
)
def test_the_licence_of_the_base_is_what_its_folder_names(files, expected, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert base_license(tmp_path) == expected


def test_a_card_of_little_knowledge_says_little():
    card = model_card({"hafrm_ds": "0.1.0", "format": "hybrid", "base": {"model": "/models/mine", "license": None}})
    assert "# Reward model from mine\n" in card
    assert "its folder names none" in card
    assert "base_model" not in card and "## Data" not in card and "## Evaluation" not in card


def test_a_card_says_where_there_is_no_reward():
    metadata = {"hafrm_ds": "0.1.0", "format": "hybrid", "config": {"objective": {"rm_weight": 0.0}}}
    assert "trained without a reward loss" in model_card(metadata)
    assert "is read at the last token" in model_card(metadata | {"config": {"objective": {"rm_weight": 1.0}}})


def test_a_card_names_the_judge_that_was_fitted():
    metadata = {"hafrm_ds": "0.1.0", "format": "hybrid", "judge": {"pairs": 1200, "set": "hh"}}
    assert "weighted by a fit on 1,200 pairs of hh" in model_card(metadata)
    assert "load_judge" not in model_card(metadata | {"format": "sequence-classification"})
