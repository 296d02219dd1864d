"""Measure what a configuration does a second on this hardware, before paying for a run.

    deepspeed launch/benchmark.py --config launch/recipes/NAME.yaml [--section.key value ...] [--steps N]

Takes the options of training; --steps N (default 10) is the number of timed steps, after two that are not. Trains on
the real pairs and keeps nothing.
"""

import argparse

from hafrm_ds.options import load_config
from hafrm_ds.processes.ranks import Processes, run_entry


def main(arguments: list[str], processes: Processes) -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=10)
    own, rest = parser.parse_known_args(arguments)
    config = load_config(rest, about=__doc__, own=vars(own))
    from hafrm_ds.training.benchmark import benchmark

    benchmark(config, processes, own.steps)


if __name__ == "__main__":
    run_entry(main)
