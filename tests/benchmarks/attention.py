"""Attention kernels alone, on the segments of shared prompts: forward and backward.

    python -m tests.benchmarks.attention [--heads 9] [--kv_heads 3] [--head_dim 64] [--dtype bfloat16]

Every kernel that runs on this machine, and on CPU also scaled_dot_product_attention in the dtype of the inputs, which
`segmented` upcasts. Contenders alternate; medians of rounds.
"""

import argparse
import os
import statistics

import torch
from transformers import LlamaConfig

from hafrm_ds.data.packing import lay_out
from hafrm_ds.data.tokenization import PromptWithResponses
from hafrm_ds.model.attention import KERNELS, ScoreRule, segment_sdpa
from tests.benchmarks.roofline import seconds

ROUNDS = 7
SHAPES = {
    "16 x (60 + 2 x 40)": [PromptWithResponses([1] * 60, ([1] * 40, [1] * 40))] * 16,
    "8 x (150 + 2 x 60)": [PromptWithResponses([1] * 150, ([1] * 60, [1] * 60))] * 8,
    "2 x (600 + 2 x 200)": [PromptWithResponses([1] * 600, ([1] * 200, [1] * 200))] * 2,
    "1 x (1500 + 2 x 250)": [PromptWithResponses([1] * 1500, ([1] * 250, [1] * 250))],
    "1 x (400 + 8 x 60)": [PromptWithResponses([1] * 400, ([1] * 60,) * 8)],
}


def in_input_dtype(query, key, value, segments, rule: ScoreRule) -> torch.Tensor:
    """`segmented` without its upcast."""
    parts = zip(
        query.transpose(0, 1)[None].split(segments.q_lengths, dim=2),
        key.transpose(0, 1)[None].split(segments.k_lengths, dim=2),
        value.transpose(0, 1)[None].split(segments.k_lengths, dim=2),
        strict=True,
    )
    return torch.cat([segment_sdpa(q, k, v, rule) for q, k, v in parts], dim=2)[0].transpose(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv_heads", type=int, default=3)
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    options = parser.parse_args()
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, options.dtype)
    model = LlamaConfig(hidden_size=options.heads * options.head_dim, num_attention_heads=options.heads)
    contenders = {name: kernel.run for name, kernel in KERNELS.items() if not kernel.obstacle(device, dtype, model)}
    if device.type == "cpu" and dtype != torch.float32:
        contenders[f"segmented in {options.dtype}"] = in_input_dtype
    rule = ScoreRule(scale=None, window=None, softcap=None)
    print(f"{options.dtype}, {options.heads} heads, {options.kv_heads} key-value heads of {options.head_dim}\n")
    print("| prompts x (prompt + answers) | kernel | ms, forward | ms, forward and backward |\n|---|---|---|---|")
    for shape, items in SHAPES.items():
        segments = lay_out(items, "shared_prefix").to(device).segments
        assert segments is not None
        counts = [(sum(segments.q_lengths), options.heads), *[(sum(segments.k_lengths), options.kv_heads)] * 2]
        inputs = [torch.randn(*count, options.head_dim, device=device).to(dtype).requires_grad_() for count in counts]
        upstream = torch.randn_like(inputs[0])

        def forward(run, inputs=inputs, segments=segments) -> torch.Tensor:
            return run(*inputs, segments, rule)

        def both(run, forward=forward, inputs=inputs, upstream=upstream) -> None:
            torch.autograd.grad(forward(run), inputs, upstream)

        times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
        for _ in range(1 + ROUNDS):
            for name, run in contenders.items():
                times[name].append((seconds(device, forward, run), seconds(device, both, run)))
        for name, rounds in times.items():
            forward_ms, both_ms = (1e3 * statistics.median(column) for column in zip(*rounds[1:], strict=True))
            print(f"| {shape} | {name} | {forward_ms:.2f} | {both_ms:.2f} |")


if __name__ == "__main__":
    main()
