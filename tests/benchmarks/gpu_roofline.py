"""What a joint step takes on H100s by what it starts, counted on meta tensors: no GPU is used, so nothing is measured.

    PYTHONPATH=. python tests/benchmarks/gpu_roofline.py

A micro-batch of about 8,192 tokens of chat data, as tests/gpu/benchmark.py makes it, bfloat16: forward, backward and,
where the optimizer fits beside them, AdamW. Each kernel takes its time at the rates below, one after another; a step
takes the longer of the device's and the host's time. MFU is of the published peak and counts what the method needs.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from hafrm_ds.capacity.working_memory import META, Pass, working_bytes
from hafrm_ds.data.packing import PackedBatch, lay_out
from hafrm_ds.hardware.flops import ForwardCost
from hafrm_ds.model.hybrid import HybridModel
from hafrm_ds.model.recomputation import set_gradient_checkpointing
from tests.gpu.benchmark import SHAPES, random_pairs
from tests.without_gpu.counting import Counts, Product, counted_step, model_of

PEAK = 989e12
"""NVIDIA's data sheet of the H100, SXM."""
SUSTAINED, TILE, PROCESSORS = 620e12, (128, 256), 132
"""Of products that fill all multiprocessors with whole tiles; others wait for their last wave."""
ATTENTION = 200e12
"""FlashAttention on answers of a few hundred tokens."""
BANDWIDTH = 2.85e12
"""What kernels that only move data reach of 3.35 TB/s."""
SHORTEST = 2.5e-6
"""Seconds of a kernel that moves nothing."""
HOST, HOST_OF_ZERO_3 = 9.7e-6, 5e-3
"""Seconds that the host takes to start a kernel (24 ms for 2,476, gathered from a CPU), and more for each layer."""
GATHERED = 350e9
"""Bytes a second that a GPU of eight gets and gives under ZeRO-3."""
ADAM_BYTES = 28
MEMORY, USABLE = 80e9, 0.9
AIMS = {("1B", 1): 0.40, ("7B", 1): 0.55, ("7B", 8): 0.50}


@dataclass(frozen=True)
class Variant:
    name: str
    fused: bool
    one_kernel_softmax: bool
    checkpointing: bool = False


VARIANTS = (
    Variant("stock layers", False, False),
    Variant("fused", True, False),
    Variant("fused, log_probs triton", True, True),
    Variant("stock layers, checkpointed", False, False, True),
    Variant("fused, log_probs triton, checkpointed", True, True, True),
)


def product_seconds(product: Product) -> float:
    """On whole tiles, in whole waves of them, or by its bytes where that takes longer."""
    tiles = math.ceil(product.rows / TILE[0]) * math.ceil(product.columns / TILE[1])
    waves = math.ceil(tiles / PROCESSORS)
    flops = 2 * waves * PROCESSORS * TILE[0] * TILE[1] * product.inner
    return max(flops / SUSTAINED, product.num_bytes / BANDWIDTH)


def seconds(found: Iterable[Counts]) -> tuple[float, float, int]:
    """(products, all else, kernels)"""
    found = list(found)
    products = [product for counts in found for product in counts.products]
    kernels = sum(counts.kernels.total() for counts in found)
    others = max(sum(counts.num_bytes for counts in found) / BANDWIDTH, (kernels - len(products)) * SHORTEST)
    return sum(map(product_seconds, products)), others, kernels


def activation_bytes(model: HybridModel, name: str, variant: Variant) -> float:
    """Of a token."""
    how = Pass(
        "shared_prefix",
        "cuda",
        with_reward=True,
        with_logprob=False,
        fused=variant.fused,
        recomputation=variant.checkpointing,
    )
    sizes, taken = [], []
    for num_tokens in (2048, 8192):
        items = random_pairs(SHAPES[name].vocab_size, num_tokens)
        sizes.append(lay_out(items, "shared_prefix").num_positions)
        taken.append(working_bytes(model, items, how))
    return (taken[1] - taken[0]) / (sizes[1] - sizes[0])


def row(name: str, variant: Variant, batch: PackedBatch) -> list[str]:
    model = model_of(name)
    if variant.checkpointing:
        set_gradient_checkpointing(model.causal_lm, True)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    body, whole = (
        seconds(counted_step(model, batch, variant.fused, with_logprob, variant.one_kernel_softmax))
        for with_logprob in (False, True)
    )
    cost = ForwardCost.of(model.causal_lm)
    attention = (3.5 + variant.checkpointing) * cost.parts(batch, with_logprob=True)[2] / ATTENTION
    head = whole[0] + whole[1] - body[0] - body[1]
    kept = activation_bytes(model, name, variant)
    device = whole[0] + whole[1] + attention
    needed = cost.training_flops(batch, with_logprob=True)
    layers = SHAPES[name].num_hidden_layers

    states = 16 * parameters
    figures = [f"{value * 1e3:.0f}" for value in (body[0], body[1], attention, head)]
    cells = [f"{whole[2]:,}", *figures, f"{kept / 1e6:.2f}"]
    for gpus, host in ((1, HOST * whole[2]), (8, HOST * whole[2] + HOST_OF_ZERO_3 * layers)):
        fits_alone = states + kept * batch.num_positions < USABLE * MEMORY
        adam = ADAM_BYTES * parameters / gpus / BANDWIDTH if gpus > 1 or fits_alone else 0.0
        sent = 3 * 2 * parameters * 7 / 8 / GATHERED if gpus > 1 else 0.0
        hidden, exposed = max(device, host, sent) + adam, max(device, host) + sent + adam
        fits = states / gpus + kept * batch.num_positions < USABLE * MEMORY
        mfus = [needed / each / PEAK for each in (hidden, exposed)]
        told = f"{mfus[0]:.0%}" if gpus == 1 else f"{mfus[0]:.0%} to {mfus[1]:.0%}"
        missing = "" if gpus == 1 or fits else ", does not fit"
        cells.append(f"{hidden * 1e3:.0f} ms, {told}{missing}" + ("" if adam else ", without Adam"))
    return [variant.name, *cells]


def main() -> None:
    print(f"{META.type} tensors; peak {PEAK / 1e12:.0f} TFLOP/s, aims {AIMS}\n")
    for name in ("135M", "1B", "7B"):
        batch = lay_out(random_pairs(SHAPES[name].vocab_size, 8192), "shared_prefix")
        print(f"{name}, {batch.num_positions:,} tokens, {len(batch.target_ids):,} predicted\n")
        print(
            "| | kernels | products, ms | other kernels | attention | head | MB kept a token "
            "| one GPU, ZeRO-0 | eight, ZeRO-3, all to nothing of the sending hidden |"
        )
        print("|---" * 9 + "|")
        for variant in VARIANTS:
            print(f"| {' | '.join(row(name, variant, batch))} |", flush=True)
        print()


if __name__ == "__main__":
    main()
