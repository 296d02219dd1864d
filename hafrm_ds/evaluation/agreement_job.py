"""The job of launch/agreement.py: pairs and rewards in, scores of every pair, what they say, and a composition out.

OUTPUT/pairs.jsonl         prompt and responses of each pair
OUTPUT/scores-K.jsonl      the same rows with scores, by the K-th reward (scoring.files)
OUTPUT/agreement.json      what `evaluation.agreement` says of them; report.html shows it
OUTPUT/composition.yaml    the rewards as a hierarchy, with the means and deviations that were fitted
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import yaml
from pydantic import BeforeValidator, Field
from rich.markup import escape

from hafrm_ds.config import PositiveInt, ScoringSection
from hafrm_ds.data.sources import TrainSources
from hafrm_ds.durability import write_whole
from hafrm_ds.errors import DataError
from hafrm_ds.evaluation.agreement import AGREEMENT_FILE, KEEP, SharedPairs, agreement_of
from hafrm_ds.evaluation.agreement_tables import render_agreement
from hafrm_ds.evaluation.best_of_n.ranking import identity_of_scorer, read_lines, score
from hafrm_ds.evaluation.pair_rows import compared, rows_of_pairs, text_of
from hafrm_ds.evaluation.report.writing import leave_report
from hafrm_ds.processes.console import Console
from hafrm_ds.processes.parts import claim_folder, leave_together
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.rewards.composition import as_mapping
from hafrm_ds.rewards.hierarchy import Mode, Rule
from hafrm_ds.scoring.files import ScoringOptions
from hafrm_ds.scoring.rows import json_line

PAIRS_FILE, COMPOSITION_FILE = "pairs.jsonl", "composition.yaml"


def named_rewards(value: Any) -> Any:
    """One reward, a list of them or {NAME: REWARD} -> {NAME: REWARD}. A function without a name is called as itself."""
    if isinstance(value, dict):
        return value
    found: dict[str, str] = {}
    for each in value if isinstance(value, list) else [value]:
        reward = str(each)
        name = reward.rpartition(":")[2] if "function" in as_mapping(reward) else reward
        if reward in found.values():
            raise ValueError(f"names {reward} twice")
        found[reward if name in found else name] = reward
    return found


class AgreementOptions(ScoringSection):
    """The options of launch/agreement.py."""

    rewards: Annotated[dict[str, str], Field(min_length=2), BeforeValidator(named_rewards)]
    """Two or more: models, functions FILE.py:NAME, or compositions FILE.yaml; or '{NAME: REWARD, ...}' to name them.
    The first is the holistic reward, the others are its aspects."""
    data: TrainSources
    """Preference pairs: one source or several, which are taken together."""
    output_dir: Path
    """Where the results go."""
    mode: Mode = "hierarchical"
    """How the composition, whose held-out accuracy is told, makes one number of holistic reward and aspects."""
    threshold: float = 0.5
    """Of the mode hierarchical: aspects count from this normalised holistic reward on."""
    weight: float = 3.0
    """What the normalised holistic reward counts in the composition, where an aspect counts 1."""
    max_pairs: PositiveInt | None = None
    """Use at most this many pairs: a fixed random choice."""
    chat_template: str | None = None
    """Name or file of a template, for a tokenizer without one."""
    cache_dir: Path | None = None
    """Where read rows are kept between runs. Default: the cache folder of Hugging Face datasets."""

    @property
    def holistic(self) -> str:
        return next(iter(self.rewards))

    @property
    def rule(self) -> Rule:
        return Rule(self.mode, self.threshold, self.weight)


def compare_rewards(options: AgreementOptions, processes: Processes) -> int:
    """Score the pairs by all rewards and compare them; returns how many pairs were left out as some reward could not
    score them. All processes call this together.

    Raises:
        ConfigError, DataError, ModelError: data or rewards cannot be used.
    """
    log, folder = Console(processes), options.output_dir
    scorings = {
        name: ScoringOptions(
            model=Path(reward),
            input=folder / PAIRS_FILE,
            output=folder / f"scores-{number}.jsonl",
            max_tokens_per_micro_batch=options.max_tokens_per_micro_batch,
            **options.loading,
        )
        for number, (name, reward) in enumerate(options.rewards.items(), start=1)
    }
    processes.from_first("pairs", lambda: take_pairs(options, scorings))
    for name, scoring in scorings.items():
        score(name, scoring, processes, log)
    num_bad = processes.from_first("results", lambda: write_results(options, scorings, log))
    leave_together(processes)
    return num_bad


def take_pairs(options: AgreementOptions, scorings: dict[str, ScoringOptions]) -> None:
    """Claim the folder and write the pairs, unless they are there. Raises DataError if it belongs to another job."""
    lines = b"".join(map(json_line, rows_of_pairs(options.data, options.cache_dir, options.max_pairs)))
    identity = {
        "rewards": {name: identity_of_scorer(each) for name, each in scorings.items()},
        "pairs": hashlib.sha256(lines).hexdigest(),
        "max_tokens_per_micro_batch": options.max_tokens_per_micro_batch,
    }
    made = [options.output_dir / name for name in (PAIRS_FILE, AGREEMENT_FILE, COMPOSITION_FILE)]
    claim_folder(options.output_dir, identity, makes=[*made, *(each.output for each in scorings.values())])
    if not (options.output_dir / PAIRS_FILE).exists():
        write_whole(options.output_dir / PAIRS_FILE, lines)


def write_results(options: AgreementOptions, scorings: dict[str, ScoringOptions], log: Console) -> int:
    """agreement.json, composition.yaml, the page and the tables; returns how many pairs were left out."""
    folder = options.output_dir
    scored = {name: compared(read_lines(each.output)) for name, each in scorings.items()}
    rows = scored[options.holistic]
    found = {name: [row["scores"] for row in own] for name, own in scored.items()}
    not_scored = {name: sum(each is None for each in values) for name, values in found.items()}
    used = [place for place in range(len(rows)) if all(values[place] is not None for values in found.values())]
    if not used:
        raise DataError(
            f"no pair of {folder / PAIRS_FILE} was scored by all rewards; the reasons are in {folder}/*.jsonl"
        )
    pairs = SharedPairs(
        [json.dumps(rows[place]["prompt"]) for place in used],
        np.array([[len(text_of(answer)) for answer in rows[place]["responses"]] for place in used]),
        {name: np.array([values[place] for place in used], dtype=np.float64) for name, values in found.items()},
    )
    results = {
        "names": options.rewards,
        "pairs_not_scored": {"by": not_scored, "left_out": len(rows) - len(used)},
        **agreement_of(pairs, options.holistic, options.rule),
    }
    text = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False)
    write_whole(folder / AGREEMENT_FILE, text.encode())
    log.print(render_agreement(results))
    log.print(f"the results are in {escape(str(folder))}")
    if results["rewards"][options.holistic]["deviation"]:
        write_whole(folder / COMPOSITION_FILE, composition_of(options, results).encode())
        log.print(f"the rewards as a hierarchy: {escape(str(folder / COMPOSITION_FILE))}")
    else:
        log.warn(f"{options.holistic} gives all answers the same, so no hierarchy can stand on it")
    leave_report(folder, log)
    return results["pairs_not_scored"]["left_out"]


def composition_of(options: AgreementOptions, results: dict[str, Any]) -> str:
    """The rewards as the YAML of a hierarchy with fitted means and deviations. Aspects that neither ALaRM's rule nor
    held-out accuracy keeps have the weight 0, so that they can be seen and are not computed."""

    def part(name: str, weight: float) -> dict[str, Any]:
        fitted = results["rewards"][name]
        scale = {key: fitted[key] for key in ("mean", "deviation")} if fitted["deviation"] else {}
        return from_any_folder(options.rewards[name]) | scale | {"weight": weight}

    aspects = {
        name: part(name, float(KEEP in (found["by_rule"], found["by_accuracy"])))
        for name, found in results["aspects"].items()
    }
    content = {
        "hierarchy": options.mode,
        "threshold": options.threshold,
        "holistic": part(options.holistic, options.weight),
        "aspects": aspects,
    }
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def from_any_folder(reward: str) -> dict[str, Any]:
    """A reward as a mapping, with the files that it names by their whole path."""
    found = as_mapping(reward)
    [(kind, name)] = found.items()
    path, colon, function = name.rpartition(":") if kind == "function" else (name, "", "")
    return {kind: os.path.abspath(path) + colon + function} if os.path.exists(path) else found
