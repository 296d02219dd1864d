"""Trains one case after another in the same processes: `train_cases.py JSON`, a list of option lists."""

import json

from hafrm_ds.config import load_config
from hafrm_ds.training.processes import Processes, run_entry
from hafrm_ds.training.run import train


def main(arguments: list[str], processes: Processes) -> None:
    cases = next(word for word in arguments if word.startswith("["))
    for options in json.loads(cases):
        train(load_config(options), processes)


if __name__ == "__main__":
    run_entry(main)
