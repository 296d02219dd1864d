"""The options of best-of-N: how candidates are sampled, and what ranks them."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from hafrm_ds.config import Positive, PositiveInt, ScoringSection
from hafrm_ds.options import Section, as_list
from hafrm_ds.rewards.composition import is_model
from hafrm_ds.saved.opening import Judge


class SamplingOptions(Section):
    """How candidates are sampled, in place of --candidates."""

    prompts: Path
    """A file with prompts."""
    policy: str
    """Who answers: a folder or hub id with a causal LM."""
    num_candidates: Annotated[int, Field(ge=2)] = 8
    """Different answers to each prompt; at most twice as many are drawn."""
    temperature: tuple[Positive, Positive] = (0.5, 1.2)
    """LOW HIGH: uniform between these, anew for each answer."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.85
    """Draw from the most probable tokens that together have this probability."""
    max_new_tokens: PositiveInt = 512
    """Longest answer in tokens; longer ones are truncated."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the draws."""
    sampler: Literal["auto", "transformers", "vllm"] = "auto"
    """auto: vLLM on a GPU where it is installed."""
    policy_chat_template: str | None = None
    """Name or file of a template, for a policy without one."""

    def contradictions(self) -> list[str]:
        low, high = self.temperature
        return [] if low <= high else [f"--temperature {low} {high}: the lower of the two comes first"]


class RankingOptions(ScoringSection):
    """The options of launch/best_of_n.py: either candidates or sampling."""

    model: Annotated[list[str], Field(min_length=1), BeforeValidator(as_list)]
    """One or more: final/ folders of trainings, other reward models, functions FILE.py:NAME, or FILE.yaml, which
    composes rewards."""
    output_dir: Path
    """Where the results go."""
    candidates: Path | None = None
    """A file with answers: .jsonl, .json or .parquet."""
    gold: str | None = None
    """Another reward, by whose scores the picks are judged. Default: field gold of the rows."""
    judge: Judge | None = None
    """What ranks: reward (the reward head), implicit (the policy against its reference) or combined (both as one, by
    the fit that is saved with a model). Default: the reward head, and of a model without one the implicit reward."""
    reference: str | None = None
    """Of the implicit reward and the combined judge, what the policy is measured against: a folder, a hub id, or base:
    what its training started from. Default: base."""
    sampling: SamplingOptions | None = None

    def contradictions(self) -> list[str]:
        problems = []
        if self.sampling is None and self.candidates is None:
            problems.append("give --candidates FILE, or --prompts FILE with --policy MODEL")
        if self.sampling is not None:
            problems += self.sampling.contradictions()
            if self.candidates is not None:
                given = ", ".join(f"--{name}" for name in SamplingOptions.model_fields
                                  if name in self.sampling.model_fields_set)  # fmt: skip
                problems.append(f"--candidates brings the answers, so nothing is sampled: leave out {given}")
        if self.judge is not None and not any(map(is_model, self.model)):
            problems.append("--judge is of models alone, and --model names none: a composition names the judge of each")
        if len(set(self.model)) < len(self.model):
            problems.append(f"--model {' '.join(self.model)}: a model stands there twice")
        return problems
