"""Policies that were trained on different rewards from one start, held against one another under a gold reward: the
check of HAF-RM's section 4.5 as one command.

    win rate against the first   share of prompts whose answer gold prefers to that of the first policy; a tie counts
                                 half

Legend: P prompts, S trainings of a policy, which differ in their seed alone.
"""

from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator, Field

from hafrm_ds.config import PositiveInt, ScoringSection
from hafrm_ds.evaluation.bootstrap import estimates
from hafrm_ds.evaluation.calibration import correctness
from hafrm_ds.evaluation.policies import Measuring, PolicyMeasures, measure_policy
from hafrm_ds.evaluation.policy_tables import POLICIES_FILE, render_policies
from hafrm_ds.evaluation.results import leave_results
from hafrm_ds.options import as_list
from hafrm_ds.processes.agreement import environment
from hafrm_ds.processes.console import Console
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.saved.opening import identity_of_model

GOLD = "gold"


def named_policies(value: Any) -> Any:
    """A list of policies, or {NAME: POLICY or [POLICY, ...]} -> {NAME: [POLICY, ...]}."""
    if isinstance(value, dict):
        return {name: as_list(each) for name, each in value.items()}
    return {str(each): [each] for each in as_list(value)}


class PolicyComparisonOptions(ScoringSection):
    """The options of launch/compare_policies.py."""

    policies: Annotated[dict[str, list[str]], Field(min_length=2), BeforeValidator(named_policies)]
    """Two or more: '{NAME: POLICY, ...}', or '{NAME: [POLICY, POLICY], ...}' for trainings with several seeds, the same
    number of each. All others are held against the first."""
    start: str
    """The model that all of them started from."""
    prompts: Path
    """A file with prompts that nothing was trained on."""
    gold: str
    """The reward that judges: a model, a function FILE.py:NAME or a composition FILE.yaml, which no policy was trained
    on."""
    output_dir: Path
    """Where the results go."""
    max_new_tokens: PositiveInt = 256
    """Longest answer in tokens."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the draws."""
    chat_template: str | None = None
    """Name or file of a template, for a tokenizer without one."""

    def contradictions(self) -> list[str]:
        if len({len(each) for each in self.policies.values()}) > 1:
            return ["--policies: the number of trainings differs; give the same seeds of each"]
        return []


def compare_policies(options: PolicyComparisonOptions, processes: Processes) -> None:
    """Measure policies and hold them against one another. All processes call this together.

    Leaves in output_dir: policies.json, report.html, and the answers of every policy with what gold gives them.

    Raises:
        DataError, ModelError: prompts, policies or gold cannot be used.
    """
    log = Console(processes)
    how = Measuring(
        options.start,
        "--prompts",
        options.prompts,
        {GOLD: {"model": Path(options.gold)}},
        options.max_new_tokens,
        options.max_tokens_per_micro_batch,
        options.seed,
        options.loading,
    )
    everything = {
        f"{name} {number}": model for name, each in options.policies.items() for number, model in enumerate(each)
    }

    def identity() -> dict[str, Any]:
        opened = {name: identity_of_model(how.policy(model)) for name, model in everything.items()}
        asked = options.model_dump(mode="json", exclude={"output_dir"})
        return {"policies": opened, "measured": how.identity(), "options": asked}

    def results(folder: Path) -> dict[str, Any] | None:
        found = {}
        for place, (name, model) in enumerate(everything.items()):
            own = options.output_dir / "answers" / f"policy-{place + 1}"
            found[name] = measure_policy(own, model, how, processes.for_job(name), log)
        if not processes.is_first:
            return None
        measured = {
            name: [known for number in range(len(each)) if (known := found[f"{name} {number}"]) is not None]
            for name, each in options.policies.items()
        }
        facts = {"start": options.start, "gold": options.gold, "policies": options.policies}
        ran = {"environment": environment(processes.world_size, processes.device), "job": identity()}
        return facts | compared(measured) | ran

    leave_results(options.output_dir / POLICIES_FILE, render_policies, identity, results, processes, log)


def compared(policies: dict[str, list[PolicyMeasures]]) -> dict[str, Any]:
    """What the answers of policies are worth.

    Args:
        policies: the trainings of each, in the same order of seeds.

    Returns:
        prompts, seeds; measures: of each policy gold, kl, words and win_rate against the first (None of itself), as
        estimates over prompts and seeds, and the shares distinct and truncated.
    """
    (one, *_), *_ = policies.values()
    first, names = gold_of(next(iter(policies.values()))), one.prompts
    measures = {}
    for number, (name, trainings) in enumerate(policies.items()):
        gold = gold_of(trainings)
        columns = {
            "gold": gold,
            "kl": np.stack([each.divergence for each in trainings]),
            "words": np.stack([each.words for each in trainings]),
        }
        found: dict[str, Any] = dict(estimates(columns, names))
        found["win_rate"] = None
        if number:
            found["win_rate"] = estimates({"": correctness(gold - first)}, names, are_shares=True)[""]
        for share in ("distinct", "truncated"):
            found[share] = float(np.mean([getattr(each, share) for each in trainings]))
        measures[name] = found
    return {"prompts": len(names), "seeds": len(first), "measures": measures}


def gold_of(trainings: list[PolicyMeasures]) -> np.ndarray:
    """[S, P]."""
    return np.stack([each.rewards[GOLD] for each in trainings])
