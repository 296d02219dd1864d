"""Runs one job after another in the same processes, some of which are stopped: `cases.py JSON`.

JSON is a list of [options, fault], of trainings, and [options, fault, "precompute"]. The fault is null for a job that
must come to its end, "refused" for one that must not, or [step, rank, what]: while this step is computed, this rank

    SIGNAL             sends itself this signal
    SIGNAL evaluating  does so in the second micro-batch of the evaluation that follows
    NUMBER             can write no file larger than so many bytes from then on

A job with a fault that ends with an error prints "refused NUMBER: MESSAGE", once.
"""

import dataclasses
import functools
import json
import os
import resource
import signal

import torch.distributed as dist

from hafrm_ds.engine.deepspeed_config import load_config
from hafrm_ds.errors import UserError
from hafrm_ds.processes.ranks import FailedElsewhere, Processes, run_entry
from hafrm_ds.processes.stopping import Stopped, StopRequest
from hafrm_ds.training import loop
from hafrm_ds.training.loop import Trainer
from hafrm_ds.training.run import precompute_reference, train
from hafrm_ds.training.saver import CheckpointSaver


class Fault:
    """While it is in force, a step of the trainer brings the fault about."""

    def __init__(self, rank: int, fault: list | str | None):
        self.rank, self.fault = rank, fault
        self.train_step, self.must_stop = Trainer.train_step, CheckpointSaver.must_stop
        self.until_signal = 0

    def __enter__(self) -> None:
        def train_step(trainer: Trainer, step: int) -> dict[str, float]:
            if isinstance(self.fault, list) and [step + 1, self.rank] == self.fault[:2]:
                self.happen(self.fault[2])
            return self.train_step(trainer, step)

        def must_stop(saver: CheckpointSaver) -> bool:
            self.until_signal -= 1
            if self.until_signal == 0:
                os.kill(os.getpid(), self.signal)
            return self.must_stop(saver)

        Trainer.train_step, CheckpointSaver.must_stop = train_step, must_stop

    def happen(self, what: str | int) -> None:
        if isinstance(what, int):
            resource.setrlimit(resource.RLIMIT_FSIZE, (what, resource.RLIM_INFINITY))
            return
        name, *later = what.split()
        self.signal = getattr(signal, name)
        if later:
            self.until_signal = 2
        else:
            os.kill(os.getpid(), self.signal)

    def __exit__(self, *error) -> None:
        Trainer.train_step, CheckpointSaver.must_stop = self.train_step, self.must_stop
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def main(arguments: list[str], processes: Processes) -> None:
    cases = json.loads(next(word for word in arguments if word.startswith("[")))
    loop.measure_matmul_peak = functools.cache(loop.measure_matmul_peak)  # half a second, and the same for every run
    for number, (options, fault, *job) in enumerate(cases):
        stopping = StopRequest()
        stopping.install()
        store = dist.PrefixStore(f"case {number}", processes.store)
        own = dataclasses.replace(processes, store=store, first_store=None, stopping=stopping)
        try:
            with Fault(processes.rank, fault):
                (precompute_reference if job == ["precompute"] else train)(load_config(options), own)
            assert fault is None, f"case {number} was not stopped"
        except Stopped as stopped:
            assert fault is not None and stopped.step == fault[0], (number, stopped)
        except UserError as error:
            if fault is None:
                raise
            if own.speaks() and not isinstance(error, FailedElsewhere):
                print(f"refused {number}: {' '.join(str(error).split())}", flush=True)


if __name__ == "__main__":
    run_entry(main)
