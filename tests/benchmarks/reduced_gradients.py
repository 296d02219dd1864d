"""How exactly gradients are averaged over the processes, in bfloat16 and in fp32, under each ZeRO stage.

    deepspeed --num_gpus 2 --module tests.benchmarks.reduced_gradients [--rings]

Each process has the gradient of a batch of its own, of a tiny Llama in bfloat16. What DeepSpeed makes of them is
compared with their mean in fp64: the norm of the difference over the norm of the mean. Beside it stands the error that
each gradient has before anything is sent, against the same gradient of the same weights in higher precision.

--rings: how the error grows with the number of processes, in one process alone: the gradients of as many batches, added
one after another as a ring adds them, each sum rounded to bfloat16.
"""

import copy
import json
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn

from hafrm_ds.config import TrainConfig
from hafrm_ds.data.packing import PackedBatch, lay_out
from hafrm_ds.engine.deepspeed_config import resolve_deepspeed_config
from hafrm_ds.engine.engine import TrainingEngine, load_under
from hafrm_ds.model.hybrid import HybridModel
from hafrm_ds.processes.ranks import Processes, run_entry
from tests.tiny_models import random_items, tiny_hybrid, use_layout

STAGES = (0, 1, 2, 3)
RINGS = (2, 4, 8, 16, 64, 256)


def model_of(dtype: torch.dtype) -> HybridModel:
    """The same weights in every process and dtype: those of bfloat16."""
    model = tiny_hybrid("llama", hidden_size=32).bfloat16().to(dtype)
    use_layout(model, "padded")
    return model


def loss_of(forward: Callable, batch: PackedBatch) -> Tensor:
    scores = forward(batch)
    return scores.logprob.mean() + scores.reward.mean()


def gradient(model: nn.Module, of: Callable[[nn.Parameter], Tensor | None]) -> Tensor:
    """Of all parameters in one vector, fp64."""
    parts = [part for parameter in model.parameters() if (part := of(parameter)) is not None]
    assert len(parts) == len(list(model.parameters()))
    return torch.cat([part.double().flatten() for part in parts])


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def reduced(stage: int, in_fp32: bool, batch: PackedBatch, processes: Processes) -> Tensor:
    """What DeepSpeed makes of the gradients of all processes."""
    config = TrainConfig.model_validate(
        {
            "output_dir": "unused",
            "model": {"name_or_path": "unused"},
            "data": {"train": "unused.jsonl"},
            "deepspeed": f"ds_configs/zero{stage}.json",
            "optimizer": {"reduce_in_fp32": in_fp32},
        }
    )
    deepspeed_config = resolve_deepspeed_config(config, processes.world_size)
    model = load_under(deepspeed_config | {"zero_optimization": {"stage": 0}}, lambda: model_of(torch.bfloat16))
    engine = TrainingEngine(model, config, deepspeed_config)
    engine.backward(loss_of(engine, batch), is_last=True)
    return gradient(model, lambda p: p.grad if stage == 0 else safe_get_full_grad(p))


def own_gradient(seed: int) -> tuple[HybridModel, PackedBatch, Tensor]:
    """A process' model and batch, and its gradient."""
    model, batch = model_of(torch.bfloat16), lay_out(random_items(seed=seed), "padded")
    loss_of(model, batch).backward()
    return model, batch, gradient(model, lambda p: p.grad)


def ring_errors() -> dict[int, float]:
    gradients = [own_gradient(seed)[2] for seed in range(max(RINGS))]
    errors = {}
    for size in RINGS:
        total = torch.zeros_like(gradients[0]).bfloat16()
        for each in gradients[:size]:
            total += (each / size).bfloat16()
        errors[size] = relative(total.double(), torch.stack(gradients[:size]).mean(0))
    return errors


def main(arguments: list[str], processes: Processes) -> None:
    if "--rings" in arguments:
        print("| processes | " + " | ".join(map(str, RINGS)) + " |")
        print("| error | " + " | ".join(f"{error:.1e}" for error in ring_errors().values()) + " |")
        return
    processes.start_group()
    own, batch, sent = own_gradient(processes.rank)
    exact = copy.deepcopy(own).double()
    exact.zero_grad()
    loss_of(exact, batch).backward()
    before = relative(sent, gradient(exact, lambda p: p.grad))
    mean = sent / processes.world_size
    dist.all_reduce(mean)
    rows = {
        stage: [relative(reduced(stage, in_fp32, batch, processes), mean) for in_fp32 in (False, True)]
        for stage in STAGES
    }
    if not processes.is_first:
        return
    print(f"{processes.world_size} processes; error of a gradient before it is sent: {before:.1e}\n")
    print("| stage | reduced in bfloat16 | in fp32 |\n|---|---|---|")
    for stage, (bf16, fp32) in rows.items():
        print(f"| {stage} | {bf16:.1e} | {fp32:.1e} |")
    print(json.dumps(rows))


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    run_entry(main)
