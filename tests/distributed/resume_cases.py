"""Runs one training after another in the same processes, some of which are stopped: `resume_cases.py JSON`.

JSON is a list of [options, stop]; stop is null or [step, rank, signal]: while this step is computed, this rank sends
itself this signal. What a run refuses is printed as "refused NUMBER: MESSAGE".
"""

import dataclasses
import json
import os
import signal

import torch.distributed as dist

from hafrm_ds.errors import UserError
from hafrm_ds.options import load_config
from hafrm_ds.training.loop import Trainer
from hafrm_ds.training.processes import Processes, run_entry
from hafrm_ds.training.run import train
from hafrm_ds.training.stopping import Stopped, StopRequest


class StoppedTrainer:
    """Patches a step of the trainer while it is in force."""

    def __init__(self, rank: int, stop: list | None):
        self.own, self.stop, self.usual = rank, stop, Trainer.train_step

    def __enter__(self) -> None:
        def train_step(trainer: Trainer, step: int) -> dict[str, float]:
            if self.stop and [step + 1, self.own] == self.stop[:2]:
                os.kill(os.getpid(), getattr(signal, self.stop[2]))
            return self.usual(trainer, step)

        Trainer.train_step = train_step

    def __exit__(self, *error) -> None:
        Trainer.train_step = self.usual


def main(arguments: list[str], processes: Processes) -> None:
    cases = json.loads(next(word for word in arguments if word.startswith("[")))
    for number, (options, stop) in enumerate(cases):
        stopping = StopRequest()
        stopping.install()
        store = dist.PrefixStore(f"case {number}", processes.store)
        with StoppedTrainer(processes.rank, stop):
            try:
                train(load_config(options), dataclasses.replace(processes, store=store, stopping=stopping))
                assert stop is None, f"case {number} was not stopped"
            except Stopped as stopped:
                assert stop is not None and stopped.step == stop[0], (number, stopped)
            except UserError as error:
                if processes.rank == 0:
                    print(f"refused {number}: {' '.join(str(error).split())}", flush=True)


if __name__ == "__main__":
    run_entry(main)
