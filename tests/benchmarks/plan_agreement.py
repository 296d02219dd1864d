"""The plan of a run against the run: memory of a process, and seconds of a step.

    OMP_NUM_THREADS=1 deepspeed --num_gpus N tests/benchmarks/plan_agreement.py --config FILE.yaml \
        --deepspeed ds_configs/zeroK.json [--section.key value ...] [--framework_gib X] [--mfu X]
    python tests/benchmarks/plan_agreement.py --tiny DIR --config FILE.yaml [--section.key value ...]

A few steps of the real trainer, and a row of a Markdown table: what the plan says and what was measured. The device is
described by what it does in the same run: the peak of its matrix products, the speed of its memory and of an all-gather
between the processes. --mfu is that of one of the runs, for all. --framework_gib is the memory of the framework itself,
on the CPU: what is measured beyond the plan in a run of a model of one narrow layer, with the tokenizer of the run's,
which --tiny makes.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hafrm_ds.capacity.plan import Machines, Plan
from hafrm_ds.capacity.planner import workload_of
from hafrm_ds.capacity.shapes import model_of_shapes
from hafrm_ds.config import TrainConfig
from hafrm_ds.engine.deepspeed_config import load_config
from hafrm_ds.hardware.devices import Device
from hafrm_ds.hardware.measurement import measure_matmul_peak, peak_memory_bytes
from hafrm_ds.processes.ranks import Processes, run_entry
from hafrm_ds.training.benchmark import trainer_for_measuring
from hafrm_ds.training.logging import RunLog

WARM_UP, STEPS = 1, 3
PROBE_BYTES = 2**28
PROBES = 5


def memory_bandwidth() -> float:
    """Bytes that this process reads and writes a second, while the others do the same."""
    numbers = torch.ones(PROBE_BYTES // 4)
    return 2 * PROBE_BYTES / fastest(lambda: numbers.mul_(1.0))


def link_bandwidth() -> float:
    """Bytes that each process sends a second in an all-gather; 1 for one process alone, which sends none."""
    n = dist.get_world_size()
    if n == 1:
        return 1.0
    own = torch.ones(PROBE_BYTES // 2 // n, dtype=torch.bfloat16)
    whole = torch.empty(len(own) * n, dtype=torch.bfloat16)
    return (n - 1) / n * PROBE_BYTES / fastest(lambda: dist.all_gather_into_tensor(whole, own))


def fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of a few times."""
    seconds = []
    for _ in range(PROBES):
        dist.barrier()
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


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
    parser.add_argument("--mfu", type=float, default=1.0)
    own, rest = parser.parse_known_args(arguments)
    config = load_config(rest)
    log = RunLog(config, processes, files=False)
    trainer = trainer_for_measuring(config, WARM_UP + STEPS, processes, log)
    config, lengths = trainer.config, trainer.train_set.groups.lengths
    walls = [trainer.train_step(step)["seconds"] for step in range(WARM_UP + STEPS)][WARM_UP:]
    measured_bytes = peak_memory_bytes(processes.device)
    memory, link = memory_bandwidth(), link_bandwidth()
    if not processes.is_first:
        return

    model = model_of_shapes(config)
    peak = measure_matmul_peak(processes.device, model.causal_lm.dtype)
    device = Device(processes.device.type, peak, 1.0, memory, link, memory, link)
    machines = Machines(device, processes.world_size, 1, own.mfu, device_type=processes.device.type)
    # The plan is of the steps that were timed, which are few and not the average.
    index = np.concatenate([trainer.plan.global_batch(step) for step in range(WARM_UP, WARM_UP + STEPS)])
    timed, none = lengths.take(index), lengths.take(index[:0])
    plan = Plan(
        config.model_copy(update={"max_steps": STEPS}), model, workload_of(config, model, timed, none), machines
    )
    option = plan.configured
    planned = option.peak_bytes / 2**30 + own.framework_gib
    measured, seconds = measured_bytes / 2**30, statistics.mean(walls)
    print(
        f"| {processes.world_size} | {config.deepspeed.stem} | {planned:.2f} | {measured:.2f} | "
        f"{planned / measured - 1:+.1%} | {option.compute_seconds:.2f} + {option.optimizer_seconds:.2f} + "
        f"{option.traffic_seconds:.2f} | {seconds:.2f} | {option.step_seconds / seconds - 1:+.1%} | "
        f"{option.compute_seconds * own.mfu / seconds:.1%} | "
        f"{peak / 1e9:.0f} GFLOP/s, {memory / 1e9:.1f} and {link / 1e9:.1f} GB/s |",
        file=sys.stderr,
    )


if __name__ == "__main__":
    run_entry(main)
