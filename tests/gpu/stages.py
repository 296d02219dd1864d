"""A joint step of one shape under ZeRO 0, 2 and 3, a profile of it, and the log-probs by the size of a block.

    python -m tests.gpu.stages [SHAPE]        default: 1B

Each line is printed as soon as it is known; where the environment names a folder OUT, profiles are written there.
"""

import os
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from hafrm_ds.data.packing import lay_out
from hafrm_ds.hardware.measurement import peak_growth_bytes, peak_memory_bytes, synchronize
from hafrm_ds.model import token_logprobs
from hafrm_ds.model.token_logprobs import HeadTransform
from hafrm_ds.processes.ranks import choose_allocators
from tests.gpu.benchmark import (
    DTYPE,
    MICRO_BATCH_TOKENS,
    SHAPES,
    make_steps,
    median_seconds,
    random_pairs,
    reset_peak_memory,
)
from tests.gpu.environment import DEVICE, IS_GPU

STAGES = (0, 2, 3)
BLOCK_MIB = (128, 256, 1024, 2048) if IS_GPU else (1, 16)


def step_under(name: str, stage: int) -> str:
    """Time of a step and what the host waited for; its profile goes to a file."""
    choose_allocators()
    pairs = random_pairs(SHAPES[name].vocab_size, MICRO_BATCH_TOKENS)
    model, step = make_steps(name, len(pairs), stage)
    model.use_layout("shared_prefix", "auto", DEVICE)
    batch = lay_out(pairs, "shared_prefix")
    reset_peak_memory()
    seconds = median_seconds(lambda: step(batch))
    memory = peak_memory_bytes(DEVICE) / 2**30
    print(f"ZeRO {stage}: {seconds:.4f} s a step, peak {memory:.2f} GiB", flush=True)

    if IS_GPU:
        torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(batch)
    if IS_GPU:
        torch.cuda.set_sync_debug_mode("default")
    waits = sum("synchroniz" in str(each.message) for each in caught)

    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if IS_GPU else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiled:
        step(batch)
        synchronize(DEVICE)
    order = "self_cuda_time_total" if IS_GPU else "self_cpu_time_total"
    if out := os.environ.get("OUT"):
        (Path(out) / f"profile_zero{stage}.txt").write_text(profiled.key_averages().table(sort_by=order, row_limit=40))
        profiled.export_chrome_trace(str(Path(out) / f"trace_zero{stage}.json.gz"))
    if dist.is_initialized():
        dist.destroy_process_group()
    return f"ZeRO {stage}: the host waited {waits} times in a step"


def blocks_of(name: str) -> None:
    """Forward and backward of the log-probs, by the bytes of a block: as the project has it, then others."""
    shape = SHAPES[name]
    hidden = torch.randn(MICRO_BATCH_TOKENS, shape.hidden_size, device=DEVICE, dtype=DTYPE, requires_grad=True)
    weight = torch.randn(shape.vocab_size, shape.hidden_size, device=DEVICE, dtype=DTYPE, requires_grad=True)
    targets = torch.randint(shape.vocab_size, (MICRO_BATCH_TOKENS,), device=DEVICE)

    def work() -> None:
        token_logprobs.token_logprobs(hidden, weight, None, targets, HeadTransform()).sum().backward()

    for mebibytes in (token_logprobs.BLOCK_BYTES // 2**20, *BLOCK_MIB):
        token_logprobs.BLOCK_BYTES = mebibytes * 2**20
        growth = peak_growth_bytes(DEVICE, work) / 2**30
        print(f"log-probs, blocks of {mebibytes} MiB: {median_seconds(work):.4f} s, {growth:.2f} GiB", flush=True)


def main(name: str = "1B") -> None:
    # An engine keeps its memory as long as its process lives.
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for stage in STAGES:
            print(pool.submit(step_under, name, stage).result(), flush=True)
    blocks_of(name)


if __name__ == "__main__":
    main(*sys.argv[1:])
