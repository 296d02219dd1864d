"""Trains one case after another in the same processes: `train_cases.py JSON`, a list of option lists."""

import dataclasses
import json

import torch.distributed as dist

from hafrm_ds.config import load_config
from hafrm_ds.training.processes import Processes, run_entry
from hafrm_ds.training.run import train


def main(arguments: list[str], processes: Processes) -> None:
    cases = next(word for word in arguments if word.startswith("["))
    for number, options in enumerate(json.loads(cases)):
        store = dist.PrefixStore(f"case {number}", processes.store)
        train(load_config(options), dataclasses.replace(processes, store=store))


if __name__ == "__main__":
    run_entry(main)
