"""The paper's data sets by name: what `preset:NAME` stands for in training and in evaluation."""

from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["train", "eval"]


@dataclass(frozen=True)
class Preset:
    """Fields of a `Source`: those of both roles and those of each."""

    both: dict[str, Any]
    train: dict[str, Any] = field(default_factory=dict)
    eval: dict[str, Any] = field(default_factory=dict)


OFFICIAL_SPLITS = {"train": {"split": "train"}, "eval": {"split": "test"}}

PRESETS = {
    "hh_helpful": Preset(
        {"path": "Anthropic/hh-rlhf", "data_dir": "helpful-base", "single_turn": True}, **OFFICIAL_SPLITS
    ),
    "hh_harmless": Preset(
        {"path": "Anthropic/hh-rlhf", "data_dir": "harmless-base", "single_turn": True}, **OFFICIAL_SPLITS
    ),
    "chatbot_arena": Preset(
        {"path": "lmsys/chatbot_arena_conversations", "split": "train", "single_turn": True},
        train={"portion": "5%:"},
        eval={"portion": ":5%"},
    ),
    "beaver_safe": Preset(
        {"path": "PKU-Alignment/PKU-SafeRLHF", "exactly_one_safe": True, "label": "safe"},
        train={"split": "train"},
        eval={"split": "test", "portion": ":1000"},
    ),
    # Read as a file: the hub's load_dataset entry for this set is a script, which datasets no longer runs.
    "alpaca_human_preference": Preset(
        {"path": "hf://datasets/tatsu-lab/alpaca_farm/alpaca_human_preference.json"},
        train={"portion": "10%:"},
        eval={"portion": ":10%"},
    ),
}
