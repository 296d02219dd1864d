"""Train Baseline, DPO and HaF from the same start on the same data, and compare them on every set of data.eval.

    deepspeed launch/compare.py --config launch/recipes/NAME.yaml [--section.key value ...] [--seeds 3]
    deepspeed launch/compare.py ... --alphas '[0.05, 0.2, 1]' --betas '[0.05, 0.1]'

Takes the options of training. --seeds N (default 3) trains each with the seeds SEED to SEED + N - 1 of --seed; --alphas
and --betas train HaF for each value of objective.alpha and objective.beta, and DPO for each beta. The first set of
data.eval is taken for the training distribution, all others for out of distribution. Results are written after every
seed. A comparison that was stopped goes on when it is started again.
"""

import argparse
from pathlib import Path

import yaml
from pydantic import TypeAdapter, ValidationError

from hafrm_ds.errors import ConfigError
from hafrm_ds.options import load_config
from hafrm_ds.processes.ranks import Processes, run_entry


def numbers(option: str, text: str) -> list[float]:
    """`[0.1, 0.2]` or `0.1` -> numbers."""
    try:
        value = yaml.safe_load(text)
        return TypeAdapter(list[float]).validate_python(value if isinstance(value, list) else [value])
    except (yaml.YAMLError, ValidationError):
        raise ConfigError([f"--{option} {text}: must be a number or a list of numbers as [0.1, 0.2]"]) from None


def main(arguments: list[str], processes: Processes) -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--alphas", default="[]")
    parser.add_argument("--betas", default="[]")
    own, rest = parser.parse_known_args(arguments)
    config = load_config(rest, about=__doc__, own=vars(own))
    if own.seeds < 1:
        raise ConfigError([f"--seeds is {own.seeds}; it must be at least 1"])
    from hafrm_ds.training.compare import arms_of, train_and_compare

    arms = arms_of(config, numbers("alphas", own.alphas), numbers("betas", own.betas))
    seeds = range(config.seed, config.seed + own.seeds)
    train_and_compare(config, arms, seeds, Path(__file__).with_name("train.py"), processes)


if __name__ == "__main__":
    run_entry(main)
