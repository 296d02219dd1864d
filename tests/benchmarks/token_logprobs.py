"""Time and peak memory of the log-probs of response tokens, forward and backward: fused, against all logits at once.

    python tests/benchmarks/token_logprobs.py [--tokens 16384] [--vocabulary 128256] [--hidden 576] [--full_tokens N]
    python tests/benchmarks/token_logprobs.py --count

Each contender runs in a process of its own, so that its peak is its own: what it takes beyond its inputs (states and
head) and a first small call. `full` is what trainers do: logits of all tokens, an upcast to fp32, log-softmax. Where
the machine cannot hold that, --full_tokens gives it fewer tokens; its memory is proportional to them. On a GPU,
tests/gpu/benchmark.py compares with Liger as well.

--count runs nothing: it counts, on the meta device, as for a GPU, the floating-point operations and the bytes that the
kernels of forward and backward read and write, each operand once a kernel, for heads of three sizes and the predicted
tokens of a usual micro-batch. `one product` is what no implementation can be below: three products over all tokens.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hafrm_ds.hardware.measurement import peak_growth_bytes, synchronize
from hafrm_ds.model.token_logprobs import Block, HeadTransform, token_logprobs


def full_logits(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (hidden @ weight.t()).float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def fused(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return token_logprobs(hidden, weight, None, targets, HeadTransform())


CONTENDERS: dict[str, Callable[..., torch.Tensor]] = {"full": full_logits, "fused": fused}
COUNTED = ((128_256, 2048), (128_256, 4096), (256_000, 3584))
"""(V, H) of Llama-3.2-1B, Llama-3.1-8B and Gemma-2-9B."""
COUNTED_TOKENS = 5002
MATMUL_FLOPS, BANDWIDTH = 620e12, 2.85e12
"""Of an H100: what large matrix products and large copies reach."""


class Traffic(TorchDispatchMode):
    """Counts operations of matrix products, and bytes that kernels read and write."""

    def __init__(self):
        super().__init__()
        self.flops = self.num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [each for each in tree_leaves((args, kwargs, result)) if isinstance(each, torch.Tensor)]
        if not func.is_view and not name.startswith(("empty", "detach", "_unsafe_view")):
            self.num_bytes += sum(each.nbytes for each in tensors)
        if name in ("mm", "addmm"):
            left, right = [each for each in args if isinstance(each, torch.Tensor)][-2:]
            self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return result


@dataclass(frozen=True)
class CountedKernels:
    """Stands for Triton's kernels, which read each logit once, and in backward write it once."""

    traffic: Traffic
    whole_rows: bool = False

    def fold(self, block: Block, *rest) -> None:
        self.traffic.num_bytes += block.products.nbytes

    def differentiate(self, block: Block, *rest) -> None:
        self.traffic.num_bytes += 2 * block.products.nbytes


def count() -> None:
    """Print a table of operations, bytes, and the time that an H100 needs for either."""
    print("| V, H | | TFLOP | GB | ms of products | ms of traffic |\n|---|---|---|---|---|---|")
    for vocabulary, width in COUNTED:
        with torch.device("meta"):
            weight = torch.empty(vocabulary, width, dtype=torch.bfloat16, requires_grad=True)
            hidden = torch.empty(COUNTED_TOKENS, width, dtype=torch.bfloat16, requires_grad=True)
            targets = torch.empty(COUNTED_TOKENS, dtype=torch.int64)
        for name in ("one product", "torch", "triton"):
            with Traffic() as traffic:
                if name == "one product":
                    (hidden @ weight.t()).sum().backward()
                    traffic.num_bytes = 3 * (weight.nbytes + hidden.nbytes + 2 * COUNTED_TOKENS * vocabulary)
                else:
                    softmax = None if name == "torch" else CountedKernels(traffic)
                    token_logprobs(hidden, weight, None, targets, HeadTransform(), softmax).sum().backward()
            times = 1e3 * traffic.flops / MATMUL_FLOPS, 1e3 * traffic.num_bytes / BANDWIDTH
            print(
                f"| {vocabulary:,}, {width:,} | {name} | {traffic.flops / 1e12:.1f} | {traffic.num_bytes / 1e9:.1f} | "
                f"{times[0]:.1f} | {times[1]:.1f} |"
            )


def measure(name: str, num_tokens: int, vocabulary: int, hidden_size: int) -> str:
    """One row of the table."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocabulary, hidden_size, generator=generator).mul_(0.05).to(device, torch.bfloat16)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator).to(device, torch.bfloat16)
    targets = torch.randint(vocabulary, (num_tokens,), generator=generator).to(device)
    seconds = {}

    def run(with_backward: bool, count: int = num_tokens) -> None:
        started = time.perf_counter()
        inputs = [hidden[:count].detach().requires_grad_(with_backward), weight.detach().requires_grad_(with_backward)]
        logprobs = CONTENDERS[name](*inputs, targets[:count])
        if with_backward:
            logprobs.sum().backward()
        synchronize(device)
        seconds[with_backward] = time.perf_counter() - started

    run(True, 64)
    peaks = [peak_growth_bytes(device, partial(run, each)) / 2**20 for each in (False, True)]
    return (
        f"| {name} | {num_tokens:,} | {peaks[0]:,.0f} | {peaks[1]:,.0f} | {seconds[False]:.2f} | {seconds[True]:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--full_tokens", type=int, help="tokens of the contender with all logits (default: --tokens)")
    parser.add_argument("--count", action="store_true", help="count instead of measuring")
    parser.add_argument("--only", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.count:
        count()
        return
    if options.only:
        print(measure(options.only, options.tokens, options.vocabulary, options.hidden))
        return
    print(f"vocabulary {options.vocabulary:,}, hidden size {options.hidden}, bfloat16\n")
    print("| | tokens | MiB, forward | MiB, with backward | seconds, forward | seconds, with backward |")
    print("|---|---|---|---|---|---|", flush=True)
    for name in ("fused", "full"):
        tokens = options.full_tokens or options.tokens if name == "full" else options.tokens
        words = {"--only": name, "--tokens": tokens, "--vocabulary": options.vocabulary, "--hidden": options.hidden}
        subprocess.run([sys.executable, __file__, *(str(part) for pair in words.items() for part in pair)], check=True)


if __name__ == "__main__":
    main()
