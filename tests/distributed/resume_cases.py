"""Runs one training after another in the same processes, some of which are stopped: `resume_cases.py JSON`.

JSON is a list of [options, fault]; fault is null or [step, rank, what]: while this step is computed, this rank sends
itself a signal, or, if `what` is a number, can write no file larger than so many bytes from then on. A run that ends
with an error prints "refused NUMBER: MESSAGE", once.
"""

import dataclasses
import json
import os
import resource
import signal

import torch.distributed as dist

from hafrm_ds.errors import UserError
from hafrm_ds.options import load_config
from hafrm_ds.training.loop import Trainer
from hafrm_ds.training.processes import FailedElsewhere, Processes, run_entry
from hafrm_ds.training.run import train
from hafrm_ds.training.stopping import Stopped, StopRequest


class FaultyTrainer:
    """While it is in force, a step of the trainer brings the fault about."""

    def __init__(self, rank: int, fault: list | None):
        self.rank, self.fault, self.usual = rank, fault, Trainer.train_step

    def __enter__(self) -> None:
        def train_step(trainer: Trainer, step: int) -> dict[str, float]:
            if self.fault and [step + 1, self.rank] == self.fault[:2]:
                what = self.fault[2]
                if isinstance(what, int):
                    resource.setrlimit(resource.RLIMIT_FSIZE, (what, resource.RLIM_INFINITY))
                else:
                    os.kill(os.getpid(), getattr(signal, what))
            return self.usual(trainer, step)

        Trainer.train_step = train_step

    def __exit__(self, *error) -> None:
        Trainer.train_step = self.usual
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def main(arguments: list[str], processes: Processes) -> None:
    cases = json.loads(next(word for word in arguments if word.startswith("[")))
    for number, (options, fault) in enumerate(cases):
        stopping = StopRequest()
        stopping.install()
        store = dist.PrefixStore(f"case {number}", processes.store)
        with FaultyTrainer(processes.rank, fault):
            try:
                own = dataclasses.replace(processes, store=store, stopping=stopping)
                train(load_config(options), own)
                assert fault is None, f"case {number} was not stopped"
            except Stopped as stopped:
                assert fault is not None and stopped.step == fault[0], (number, stopped)
            except UserError as error:
                if own.speaks() and not isinstance(error, FailedElsewhere):
                    print(f"refused {number}: {' '.join(str(error).split())}", flush=True)


if __name__ == "__main__":
    run_entry(main)
