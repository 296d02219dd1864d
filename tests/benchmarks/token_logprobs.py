"""Time and peak memory of the log-probs of response tokens, forward and backward: fused, against all logits at once.

    python tests/benchmarks/token_logprobs.py [--tokens 16384] [--vocabulary 128256] [--hidden 576] [--full_tokens N]

Each contender runs in a process of its own, so that its peak is its own: what it takes beyond its inputs (states and
head) and a first small call. `full` is what trainers do: logits of all tokens, an upcast to fp32, log-softmax. Where
the machine cannot hold that, --full_tokens gives it fewer tokens; its memory is proportional to them. On a GPU,
tests/gpu/benchmark.py compares with Liger as well.
"""

import argparse
import os
import subprocess
import sys
import time

import torch

from hafrm_ds.hardware.measurement import peak_growth_bytes, synchronize
from hafrm_ds.model.token_logprobs import HeadTransform, token_logprobs


def full_logits(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (hidden @ weight.t()).float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def fused(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return token_logprobs(hidden, weight, None, targets, HeadTransform())


CONTENDERS = {"full": full_logits, "fused": fused}


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
    peaks = [peak_growth_bytes(device, lambda each=each: run(each)) / 2**20 for each in (False, True)]
    return (
        f"| {name} | {num_tokens:,} | {peaks[0]:,.0f} | {peaks[1]:,.0f} | {seconds[False]:.2f} | {seconds[True]:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--full_tokens", type=int, help="tokens of the contender with all logits (default: --tokens)")
    parser.add_argument("--only", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
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
