"""Training with the stored reference against training with the reference model evaluated at every step.

    deepspeed --num_gpus 2 tests/benchmarks/online_reference.py --config FILE.yaml [--section.key value ...]

Trains twice from the same weights on the same batches, in one process group: first with a frozen second model that
is run on every micro-batch, as trainers without a cache do; then with log-probs from the store. Prints the largest
relative difference of the losses and the time of both; looking values up and computing missing ones is not timed.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from hafrm_ds.data.micro_batches import make_micro_batch
from hafrm_ds.data.planning import DUMMY
from hafrm_ds.data.prepared import PreparedGroups
from hafrm_ds.engine.deepspeed_config import load_config
from hafrm_ds.engine.engine import Engine, load_scoring_engine, load_training_engine
from hafrm_ds.processes.ranks import Processes, run_entry
from hafrm_ds.reference.offline_pass import ReferenceLogprobs
from hafrm_ds.reference.provide import ReferenceSource, shared_namespace
from hafrm_ds.training.logging import RunLog
from hafrm_ds.training.loop import Trainer
from hafrm_ds.training.preflight import settle_batch
from hafrm_ds.training.run import prepare_data
from hafrm_ds.training.saver import CheckpointSaver


@dataclass(frozen=True)
class OnlineReference(ReferenceLogprobs):
    """Computes the values of a micro-batch of pairs when they are asked for; none is known before."""

    engine: Engine
    pairs: PreparedGroups
    layout: str

    def of(self, responses: np.ndarray) -> torch.Tensor:
        index = np.where(responses == DUMMY, DUMMY, responses // 2)[::2]
        with torch.no_grad():
            batch = make_micro_batch(self.pairs, index.tolist(), self.layout).batch
            logprob = self.engine(batch, with_reward=False).of("logprob").cpu()
        return torch.where(torch.from_numpy(responses == DUMMY), 0.0, logprob)


def main(arguments: list[str], processes: Processes) -> None:
    config = load_config(arguments)
    log = RunLog(config, processes, files=False)
    formatter, pairs, _ = prepare_data(config, processes, log)
    processes.start_group()
    steps = {}
    for name in ("online", "stored"):
        source = None
        if name == "stored":
            source = ReferenceSource.open(config, shared_namespace(config, processes), processes, log)
        engine = load_training_engine(config, processes)
        config = settle_batch(engine, [pairs], config, log)
        saver = CheckpointSaver(config, engine, processes, log, data={}, reference="", resume_point=None)
        trainer = Trainer(config, engine, pairs, {}, source, saver, log, formatter.tokenizer)
        if name == "stored":
            trainer.load_reference()
        else:
            frozen = load_scoring_engine(config, processes)
            unknown = np.full(len(pairs.keys), np.nan, dtype=np.float32)
            trainer.train_set.reference = OnlineReference(unknown, frozen, pairs, config.batch.layout)
        dist.barrier()
        steps[name] = [trainer.train_step(step) for step in range(trainer.num_steps)]
    losses = {name: np.array([step["loss/total"] for step in rows]) for name, rows in steps.items()}
    seconds = {name: sum(step["seconds"] for step in rows[1:]) / (len(rows) - 1) for name, rows in steps.items()}
    difference = np.abs(losses["stored"] / losses["online"] - 1).max()
    if processes.is_first:
        print("\n| reference | seconds a step (without the first) |\n|---|---|")
        for name in steps:
            print(f"| {name} | {seconds[name]:.2f} |")
        ratio = seconds["online"] / seconds["stored"]
        print(
            f"\n{len(losses['online'])} steps, {config.model.dtype}: largest relative difference of a loss "
            f"{difference:.2g}; online takes {ratio:.2f} times as long"
        )


if __name__ == "__main__":
    run_entry(main)
