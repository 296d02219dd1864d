"""Runs one job after another in the same processes: `job_cases.py JSON`, a list of [job name, options]."""

import dataclasses
import json

import torch.distributed as dist

from hafrm_ds.engine.deepspeed_config import load_config
from hafrm_ds.processes.ranks import Processes, run_entry
from hafrm_ds.training.run import precompute_reference, train

JOBS = {"train": train, "precompute": precompute_reference}


def main(arguments: list[str], processes: Processes) -> None:
    cases = next(word for word in arguments if word.startswith("["))
    for number, (job, options) in enumerate(json.loads(cases)):
        store = dist.PrefixStore(f"case {number}", processes.store)
        JOBS[job](load_config(options), dataclasses.replace(processes, store=store))


if __name__ == "__main__":
    run_entry(main)
