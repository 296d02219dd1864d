"""Train Baseline, DPO and HaF from the same start on the same data, and compare them on every set of data.eval.

    deepspeed launch/compare.py --config launch/recipes/NAME.yaml [--section.key value ...] [--seeds 3]
    deepspeed launch/compare.py ... --alphas '[0.05, 0.2, 1]' --betas '[0.05, 0.1]'

Takes the options of training. --seeds N (default 3) trains each with the seeds SEED to SEED + N - 1 of --seed; --alphas
and --betas train HaF for each value of objective.alpha and objective.beta, and DPO for each beta. The first set of
data.eval is taken for the training distribution, all others for out of distribution. Results are written after every
seed. A comparison that was stopped resumes when it is started again.
"""

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field

from hafrm_ds.config import PositiveInt, TrainConfig
from hafrm_ds.engine.deepspeed_config import load_config
from hafrm_ds.options import as_list
from hafrm_ds.processes.ownership import sole_owner
from hafrm_ds.processes.ranks import Processes, run_entry

Numbers = Annotated[list[float], BeforeValidator(as_list)]


class CompareOptions(TrainConfig):
    """What is trained, and how often."""

    seeds: PositiveInt = 3
    """Train each method with so many seeds, from --seed on."""
    alphas: Numbers = Field(default=[])
    """Train HaF for each of these values of objective.alpha. Default: that of the configuration."""
    betas: Numbers = Field(default=[])
    """Train HaF and DPO for each of these values of objective.beta. Default: that of the configuration."""


def main(arguments: list[str], processes: Processes) -> None:
    options = load_config(arguments, CompareOptions, about=__doc__)
    from hafrm_ds.training.compare import arms_of, train_and_compare

    arms = arms_of(options.run, options.alphas, options.betas)
    seeds = range(options.seed, options.seed + options.seeds)
    with sole_owner(options.output_dir, processes):
        train_and_compare(options.run, arms, seeds, Path(__file__).with_name("train.py"), processes)


if __name__ == "__main__":
    run_entry(main)
