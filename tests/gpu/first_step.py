"""What starts on this GPU: the process group, a group beside it, and one step of a tiny model under each ZeRO stage.

    python -m tests.gpu.first_step

Each line is printed as soon as it is known. The case that is expected to fail (a bound device on one rank) comes last.
"""

import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

from hafrm_ds.config import TrainConfig
from hafrm_ds.data.packing import lay_out
from hafrm_ds.engine.deepspeed_config import resolve_deepspeed_config
from hafrm_ds.engine.engine import TrainingEngine
from hafrm_ds.processes.ranks import Processes, choose_allocators
from tests.gpu.environment import DEVICE, IS_GPU
from tests.tiny_models import pair_losses, random_items, tiny_hybrid

ITEMS = random_items(seed=3, num_items=6)
STAGES = (0, 2, 3)


def tried(name: str, work: Callable[[], str]) -> bool:
    """Print what `work` tells, or how it failed."""
    started = time.perf_counter()
    try:
        outcome, ok = work(), True
    except Exception as error:
        traceback.print_exc()
        outcome, ok = f"FAILED: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", False
    print(f"{name}: {outcome} ({time.perf_counter() - started:.1f} s)", flush=True)
    return ok


def group() -> str:
    Processes.join().start_group()
    beside = dist.new_group([0])
    ones = torch.ones(4, device=DEVICE)
    dist.all_reduce(ones, group=beside)
    dist.barrier()
    return f"{dist.get_backend()}, a sum of {ones.sum().item():.0f}"


def step(stage: int) -> str:
    config = TrainConfig.model_validate(
        {
            "output_dir": "unused",
            "model": {"name_or_path": "unused"},
            "data": {"train": "unused.jsonl"},
            "deepspeed": f"ds_configs/zero{stage}.json",
        }
    )
    model = tiny_hybrid("llama").bfloat16().to(DEVICE)
    engine = TrainingEngine(model, config, resolve_deepspeed_config(config, 1))
    model.use_layout("shared_prefix", "auto", DEVICE)
    mode = torch.cuda.get_sync_debug_mode() if IS_GPU else 0
    if IS_GPU:
        torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        loss = pair_losses(engine(lay_out(ITEMS, "shared_prefix")).of("reward")).mean()
    if IS_GPU:
        torch.cuda.set_sync_debug_mode(mode)
    engine.backward(loss, is_last=True)
    engine.step(learning_rate_factor=1.0)
    synchronising = [str(each.message) for each in waits if "synchroniz" in str(each.message)]
    return f"loss {loss.item():.4f}, gradient norm {engine.gradient_norm:.4f}, host waits in forward: {synchronising}"


def bound() -> str:
    """As the project did before: a device bound to the group of one rank, then a group beside it."""
    dist.destroy_process_group()
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=DEVICE)
    dist.all_reduce(torch.ones(1, device=DEVICE), group=dist.new_group([0]))
    torch.cuda.synchronize()
    return "works here, though it is known to fail elsewhere"


def main() -> int:
    choose_allocators()
    results = [tried("process group", group)]
    results += [tried(f"one step under ZeRO {stage}", partial(step, stage)) for stage in STAGES]
    if IS_GPU:
        tried("a bound device on one rank", bound)
    return 0 if all(results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
