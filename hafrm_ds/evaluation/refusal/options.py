"""The options of a measurement of refusals (launch/refusals.py)."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from hafrm_ds.config import PositiveInt, ScoringSection
from hafrm_ds.evaluation.refusal.prompts import PROMPT_SETS, TOGETHER, known_parts

GENERATED = "generated"
"""As --answers: continue an opening of either kind."""


def named_models(value: Any) -> Any:
    """One model, a list of them or {NAME: MODEL} -> {NAME: MODEL}."""
    if isinstance(value, dict):
        return value
    models = [str(each) for each in (value if isinstance(value, list) else [value])]
    if len(set(models)) < len(models):
        raise ValueError("names a model twice; give each a name, as in '{A: MODEL, B: MODEL}'")
    return {model: model for model in models}


class RefusalOptions(ScoringSection):
    """The options of launch/refusals.py."""

    models: Annotated[dict[str, str], Field(min_length=1), BeforeValidator(named_models)]
    """One or more: final/ folders of trainings, causal LMs, reward models; or '{NAME: MODEL, ...}' to name them. All
    others are compared with the first."""
    prompts: Annotated[list[str], Field(min_length=1), BeforeValidator(known_parts)] = Field(
        description=f"Of {', '.join((*TOGETHER, *PROMPT_SETS))}: NAME takes a set from the hub, NAME=PATH from there; "
        "PATH is a file with prompts and labels. One or several."
    )
    output_dir: Path
    """Where the results go."""
    answers: str | None = None
    """What the reward head compares: a file with answers to the prompts that refuse and that comply, or generated: the
    first model continues the first opening of either kind."""
    system: Path | None = None
    """A text that is put in front of the prompts as a system message, in arms of their own."""
    rewrite: bool = False
    """Let each policy rewrite the prompts before they are asked, in arms of their own."""
    openings: Path | None = None
    """A YAML file with the openings of refusals and of compliances. Default: those that are shown with the results."""
    generated: PositiveInt | None = None
    """Let each arm answer so many of the prompts, a fixed random choice, and compare with the probe."""
    refusal_judge: str | None = None
    """A reward, as a function FILE.py:NAME, that tells besides the openings whether a generated answer refuses: where
    it is above 0.5."""
    max_new_tokens: PositiveInt = 128
    """Longest text in tokens that is generated or rewritten."""
    max_prompts: PositiveInt | None = None
    """Use at most this many prompts: a fixed random choice."""
    chat_template: str | None = None
    """Name or file of a template, for a tokenizer without one."""
    cache_dir: Path | None = None
    """Where read rows are kept between runs. Default: the cache folder of Hugging Face datasets."""
    deepspeed: Path | None = None
    """A DeepSpeed JSON: shard each model over the processes where it scores."""

    @property
    def given_answers(self) -> Path | None:
        """The file of --answers."""
        return None if self.answers in (None, GENERATED) else Path(str(self.answers))

    def contradictions(self) -> list[str]:
        problems = []
        if self.refusal_judge is not None and self.generated is None:
            problems.append("--refusal_judge judges generated answers: give --generated N, or leave it out")
        return problems
