"""Measure what a configuration does a second on this hardware, before paying for a run.

    deepspeed launch/benchmark.py --config launch/recipes/NAME.yaml [--section.key value ...] [--steps N]

Takes the options of training; --steps N (default 10) is the number of timed steps, after two that are not. Trains on
the real pairs and keeps nothing.
"""

from hafrm_ds.config import PositiveInt, TrainConfig
from hafrm_ds.engine.deepspeed_config import load_config
from hafrm_ds.processes.ranks import Processes, run_entry


class BenchmarkOptions(TrainConfig):
    """What is measured, and how long."""

    steps: PositiveInt = 10
    """Timed steps, after two that are not."""


def main(arguments: list[str], processes: Processes) -> None:
    options = load_config(arguments, BenchmarkOptions, about=__doc__)
    from hafrm_ds.training.benchmark import benchmark

    benchmark(options.run, processes, options.steps)


if __name__ == "__main__":
    run_entry(main)
