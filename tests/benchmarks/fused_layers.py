"""A joint step with and without model.fused, forward and backward, on this machine.

    PYTHONPATH=. python tests/benchmarks/fused_layers.py [KIND ...]        default: compile compile_layers

Random weights in SmolLM2-135M's shape with LAYERS of its layers, bfloat16, one micro-batch of shared prompts. The kinds
take turns, and the first micro-batches, in which torch.compile works, are told apart.
"""

import statistics
import sys
import time
from dataclasses import asdict, replace

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from hafrm_ds.data.packing import lay_out
from hafrm_ds.hardware.measurement import synchronize
from hafrm_ds.model.hybrid import HybridModel, make_reward_head
from tests.gpu.benchmark import SHAPES, random_pairs
from tests.tiny_models import pair_losses

LAYERS, TOKENS = 8, 2048
WARM_UP, ROUNDS = 3, 10
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def model_with(kind: str) -> HybridModel:
    torch.manual_seed(0)
    shape = replace(SHAPES["135M"], num_hidden_layers=LAYERS)
    config = LlamaConfig(**asdict(shape), max_position_embeddings=4096)
    causal_lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(DEVICE).train()
    head = make_reward_head(config.hidden_size, bias=False, init="normal", dtype=torch.bfloat16, seed=0)
    model = HybridModel(causal_lm, head.to(DEVICE))
    model.use_layout("shared_prefix", "auto", DEVICE)
    model.use_fused(kind, DEVICE)
    return model


def seconds(model: HybridModel, number: int) -> float:
    """Of a step on micro-batch `number`: all differ in their lengths."""
    batch = lay_out(random_pairs(SHAPES["135M"].vocab_size, TOKENS + 97 * number), "shared_prefix").to(DEVICE)
    synchronize(DEVICE)
    started = time.perf_counter()
    scores = model(batch)
    pair_losses(scores.reward, scores.logprob, scores.logprob.detach()).mean().backward()
    synchronize(DEVICE)
    model.zero_grad()
    return time.perf_counter() - started


def main() -> None:
    kinds = ("off", *(sys.argv[1:] or ("compile", "compile_layers")))
    models = {kind: model_with(kind) for kind in kinds}
    taken: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(WARM_UP + ROUNDS):
        for kind, model in models.items():
            taken[kind].append(seconds(model, number))
    print(f"{torch.get_num_threads()} threads, {DEVICE.type}, {ROUNDS} rounds\n")
    print("| fused | s, median | lowest | highest | beside off, median of the rounds | first micro-batch, s |")
    print("|---" * 6 + "|")
    for kind, values in taken.items():
        later = values[WARM_UP:]
        ratio = statistics.median(own / off for own, off in zip(later, taken["off"][WARM_UP:]))
        print(
            f"| {kind} | {statistics.median(later):.3f} | {min(later):.3f} | {max(later):.3f} | {ratio:.2f} "
            f"| {values[0]:.1f} |"
        )


if __name__ == "__main__":
    main()
