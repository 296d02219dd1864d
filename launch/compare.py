"""Train Baseline, DPO and HaF from the same start on the same data, and compare them on every set of data.eval.

    deepspeed launch/compare.py --config launch/recipes/NAME.yaml [--section.key value ...] [--seeds 3]
    deepspeed launch/compare.py ... --alphas '[0.05, 0.2, 1]' --betas '[0.05, 0.1]'
    python launch/compare.py ... --seeds 3-22 --sweep '{objective.policy_share: [0, 0.5, 0.9, 1], epochs: [1, 4]}'

Takes the options of training. --seeds N (default 3) trains each with the seeds SEED to SEED + N - 1 of --seed, and
--seeds M-N with the seeds M to N; --alphas and --betas train HaF for each value of objective.alpha and objective.beta,
and DPO for each beta; --sweep trains every combination of the values of any options. The first set of data.eval is
taken for the training distribution, all others for out of distribution. Results are written after every seed. With
--refusals PROMPTS it measures what the trainings refuse, too. A comparison that was stopped resumes when it is started
again.
"""

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from hafrm_ds.config import PositiveInt, TrainConfig, in_one_message
from hafrm_ds.engine.deepspeed_config import load_config
from hafrm_ds.options import as_list
from hafrm_ds.processes.ownership import sole_owner
from hafrm_ds.processes.ranks import Processes, run_entry

Numbers = Annotated[list[float], BeforeValidator(as_list)]
Values = Annotated[list[Any], BeforeValidator(as_list)]


def increasing(seeds: str) -> str:
    first, last = map(int, re.fullmatch(r"(\d+)-(\d+)", seeds).groups())  # type: ignore[union-attr]
    if last < first:
        raise ValueError("the last seed is before the first")
    return seeds


def known_prompts(words: Any) -> list[str]:
    from hafrm_ds.evaluation.refusal.prompts import known_parts  # it imports datasets, which takes a while

    return known_parts(words)


SeedRange = Annotated[str, Field(pattern=r"^\d+-\d+$"), AfterValidator(increasing)]
Seeds = Annotated[PositiveInt | SeedRange, in_one_message("must be a whole number above 0, or a range as 3-22")]


class CompareOptions(TrainConfig):
    """What is trained, and how often."""

    seeds: Seeds = 3
    """Train each method with so many seeds, from --seed on; or with those of a range, as 3-22."""
    alphas: Numbers = Field(default=[])
    """Train HaF for each of these values of objective.alpha. Default: that of the configuration."""
    betas: Numbers = Field(default=[])
    """Train HaF and DPO for each of these values of objective.beta. Default: that of the configuration."""
    sweep: dict[str, Values] = Field(default={})
    """Train every combination of the values of these options: {optimizer.learning_rate: [1e-5, 1e-4], epochs: [1, 3]}.
    Of objective.policy_share 0 is Baseline and 1 is DPO. data.train.FIELD is a field of every training source:
    {data.train.portion: [":80", ":320"]} are the first 80 and 320 pairs."""

    refusals: Annotated[list[str], BeforeValidator(known_prompts)] = Field(default=[])
    """Prompts, as launch/refusals.py takes them: measure what the trainings refuse when all are done."""

    @property
    def all_seeds(self) -> range:
        if isinstance(self.seeds, int):
            return range(self.seed, self.seed + self.seeds)
        first, last = map(int, self.seeds.split("-"))
        return range(first, last + 1)


def main(arguments: list[str], processes: Processes) -> None:
    options = load_config(arguments, CompareOptions, about=__doc__)
    from hafrm_ds.training.compare import train_and_compare
    from hafrm_ds.training.sweep import arms_of, axes_of

    axes = axes_of(options.run, options.alphas, options.betas, options.sweep)
    arms = arms_of(options.run, axes)
    sweep = {axis.name: axis.to_json() for axis in axes} if options.sweep else None
    train_script = Path(__file__).with_name("train.py")
    with sole_owner(options.output_dir, processes):
        train_and_compare(options.run, arms, options.all_seeds, train_script, processes, sweep, options.refusals)


if __name__ == "__main__":
    run_entry(main)
