"""The plan of a run against the run: memory of a process, and operations against the time they take.

    OMP_NUM_THREADS=1 deepspeed --num_gpus N tests/benchmarks/plan_agreement.py --config FILE.yaml \
        --deepspeed ds_configs/zeroK.json [--section.key value ...] [--framework_gib X]
    python tests/benchmarks/plan_agreement.py --tiny DIR --config FILE.yaml [--section.key value ...]

A few steps of the real trainer, and a row of a Markdown table: what the plan says, what was measured, and processor
time, which other work on the machine disturbs least. --framework_gib is the memory of the framework itself, on the CPU:
what is measured beyond the plan in a run of a model of one narrow layer, with the tokenizer of the run's, which --tiny
makes.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hafrm_ds.capacity import measure_matmul_peak, peak_memory_bytes
from hafrm_ds.capacity.devices import Device
from hafrm_ds.capacity.job import workload_of
from hafrm_ds.capacity.plan import Machines, Plan
from hafrm_ds.capacity.shapes import model_of_shapes
from hafrm_ds.config import TrainConfig
from hafrm_ds.options import load_config
from hafrm_ds.reference.compute import ReferenceLogprobs
from hafrm_ds.training.engine import check_build_tools, load_training_engine
from hafrm_ds.training.logging import RunLog
from hafrm_ds.training.loop import Trainer
from hafrm_ds.training.preflight import settle_batch
from hafrm_ds.training.processes import Processes, run_entry
from hafrm_ds.training.run import prepare_data
from hafrm_ds.training.saver import CheckpointSaver

WARM_UP, STEPS = 1, 2


def make_tiny(config: TrainConfig, folder: Path) -> None:
    """A model of one narrow layer with the tokenizer of the run's."""
    tokenizer = AutoTokenizer.from_pretrained(config.model.name_or_path)
    shape = AutoConfig.from_pretrained(config.model.name_or_path)
    shape.update({"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1})
    shape.update({"num_key_value_heads": 1, "head_dim": 8})
    AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(arguments: list[str], processes: Processes) -> None:
    if arguments[0] == "--tiny":
        make_tiny(load_config(arguments[2:]), Path(arguments[1]))
        return
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--framework_gib", type=float, default=0.0)
    own, rest = parser.parse_known_args(arguments)
    config = load_config(rest).model_copy(update={"max_steps": WARM_UP + STEPS})
    check_build_tools(processes.device)
    log = RunLog(config, processes, files=False)
    formatter, pairs, _ = prepare_data(config, processes, log)
    processes.start_group()
    engine = load_training_engine(config, processes)
    config = settle_batch(engine, [pairs], config, log)
    saver = CheckpointSaver(config, engine, processes, log, data={}, reference="", resume_point=None)
    trainer = Trainer(config, engine, pairs, {}, None, saver, log, formatter.tokenizer)
    trainer.train_set.reference = ReferenceLogprobs(np.zeros((len(pairs), 2), dtype=np.float32))
    processor, walls = [], []
    for step in range(WARM_UP + STEPS):
        started = time.process_time()
        walls.append(trainer.train_step(step)["seconds"])
        processor.append(time.process_time() - started)
    measured = peak_memory_bytes(processes.device)
    if not processes.is_first:
        return

    model = model_of_shapes(config)
    no_pairs = {name: values[:0] for name, values in pairs.lengths.items()}
    peak = measure_matmul_peak(processes.device, model.causal_lm.dtype)
    # Only the memory is compared, for which links do not matter.
    device = Device(processes.device.type, peak, 1.0, 1.0, 1.0, 1.0, 1.0)
    machines = Machines(device, processes.world_size, 1, 1.0, device_type=processes.device.type)
    plan = Plan(config, model, workload_of(config, model, pairs.lengths, no_pairs), machines)
    option = plan.configured
    operations = sum(
        plan.cost.training_flops(micro_batch.batch, config.objective.uses_policy)
        for step in range(WARM_UP, WARM_UP + STEPS)
        for micro_batch in trainer.micro_batches(step)[0]
    )
    seconds = sum(processor[WARM_UP:])
    planned, measured = option.peak_bytes / 2**30 + own.framework_gib, measured / 2**30
    print(
        f"| {processes.world_size} | {config.deepspeed.stem} | {option.cut.micro_batches:.1f} | "
        f"{option.states.held / 2**30:.2f} | {option.working_bytes / 2**30:.2f} | {planned:.2f} | {measured:.2f} | "
        f"{planned / measured - 1:+.1%} | {operations / STEPS / 1e9:.0f} | {seconds / STEPS:.1f} | "
        f"{operations / seconds / 1e9:.1f} | {statistics.median(walls[WARM_UP:]):.1f} |",
        file=sys.stderr,
    )


if __name__ == "__main__":
    run_entry(main)
