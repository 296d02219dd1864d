"""A joint step of models of 135M, 1B and 7B parameters, of random weights, under every kernel and layout that runs.

    python -m tests.gpu.benchmark [SHAPE ...]

What is timed is one micro-batch of MICRO_BATCH_TOKENS tokens, bfloat16. A shape that is trained takes whole steps under
DeepSpeed with ZeRO-3: forward, backward and AdamW. The 7B shape, whose optimizer does not fit beside it, takes forward
and backward with gradient checkpointing. MFU is over the matrix-product peak that is measured beside it, and counts
what `hafrm_ds.capacity.ForwardCost` counts: nothing for padding, masked keys or recomputation.

The log-probs are timed alone before that, and their gradients compared with fp64: in torch's operations, as Triton
kernels, and Liger's, where these are installed. The steps take the faster of the first two, by name in their table, if
it is as exact. Markdown tables are printed and, where the environment names a folder OUT, written to OUT/benchmark.md.
"""

import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from hafrm_ds.config import TrainConfig
from hafrm_ds.data.packing import PackedBatch, lay_out, move
from hafrm_ds.data.tokenization import PromptWithResponses
from hafrm_ds.engine.deepspeed_config import resolve_deepspeed_config
from hafrm_ds.engine.engine import TrainingEngine
from hafrm_ds.engine.shapes import full_shape
from hafrm_ds.hardware.flops import ForwardCost
from hafrm_ds.hardware.measurement import measure_matmul_peak, peak_growth_bytes, peak_memory_bytes, synchronize
from hafrm_ds.model.attention import import_problem
from hafrm_ds.model.hybrid import HybridModel, disable_dropout, make_reward_head
from hafrm_ds.model.token_logprobs import HeadTransform, token_logprobs
from hafrm_ds.objective import ResponseScores, joint_loss, weights_at
from hafrm_ds.processes.ranks import Processes, choose_allocators
from tests.gpu.environment import DEVICE, IS_ALLOWED_ON_CPU, IS_GPU, available_kernels, hardware, table
from tests.gpu.liger import IS_AVAILABLE as HAS_LIGER
from tests.gpu.liger import liger_logprobs
from tests.tiny_models import comparisons_of_pairs

MICRO_BATCH_TOKENS = 8192 if IS_GPU else 256
PROMPT_TOKENS, ANSWER_TOKENS = (32, 384), (16, 256)
"""Lengths are drawn evenly between these, about those of chat data."""
COMPARED_TOKENS = 256
EXACT_ENOUGH = 1.1
"""Times the error of torch's operations, by which what is chosen for its speed may be off."""
WARM_UP, ROUNDS = (3, 10) if IS_GPU else (1, 2)
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    """A Llama, by the sizes of its configuration."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    tie_word_embeddings: bool


SHAPES = {
    "tiny": Shape(1000, 64, 192, 2, 4, 2, True),
    "135M": Shape(49152, 576, 1536, 30, 9, 3, True),  # SmolLM2-135M
    "1B": Shape(128256, 2048, 8192, 16, 32, 8, True),  # Llama-3.2-1B
    "7B": Shape(32768, 4096, 14336, 32, 32, 8, False),  # Mistral-7B-v0.3
}
WITHOUT_OPTIMIZER = ("7B",)
DEFAULT_SHAPES = ("135M", "1B", "7B") if IS_GPU else ("tiny",)
BYTES_PER_PARAMETER = {"step": 20, "forward and backward": 4}
"""Weights and gradients in bfloat16; with the optimizer also fp32 weights, gradients and two moments."""


@dataclass(frozen=True)
class StepTime:
    """Median of the rounds. tokens: without padding. fused: as model.fused."""

    layout: str
    attention: str
    fused: str
    seconds: float
    tokens: int
    pairs: int
    mfu: float
    memory_bytes: int


@dataclass(frozen=True)
class LogprobTime:
    """Forward and backward of the log-probs of MICRO_BATCH_TOKENS tokens; memory beyond inputs and gradients.

    error: of the weight's gradient against fp64, relative to its norm, for COMPARED_TOKENS tokens.
    """

    function: str
    seconds: float
    memory_bytes: int
    error: float


@dataclass(frozen=True)
class Report:
    """log_probs: what the steps ran with, as model.log_probs."""

    parameters: int
    peak_flops: float
    steps: list[StepTime]
    logprobs: list[LogprobTime]
    log_probs: str


def timed(name: str) -> str:
    return "forward and backward" if name in WITHOUT_OPTIMIZER else "step"


def random_pairs(vocabulary: int, num_tokens: int) -> list[PromptWithResponses]:
    """Pairs of about `num_tokens` tokens together when the prompt stands once."""
    source = np.random.default_rng(0)
    pairs, total = [], 0

    def tokens(between: tuple[int, int]) -> list[int]:
        return source.integers(3, vocabulary, source.integers(*between)).tolist()

    while total < num_tokens:
        pairs.append(PromptWithResponses(tokens(PROMPT_TOKENS), (tokens(ANSWER_TOKENS), tokens(ANSWER_TOKENS))))
        total += len(pairs[-1].prompt) + sum(map(len, pairs[-1].responses))
    return pairs


def random_causal_lm(name: str, device: torch.device) -> PreTrainedModel:
    config = LlamaConfig(**asdict(SHAPES[name]), max_position_embeddings=4096)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=DTYPE)


def num_parameters(name: str) -> int:
    return sum(parameter.numel() for parameter in random_causal_lm(name, torch.device("meta")).parameters())


def make_steps(name: str, num_pairs: int, zero_stage: int = 3) -> tuple[HybridModel, Callable[[PackedBatch], None]]:
    """The model and what is timed: a step on a micro-batch of `num_pairs` pairs."""
    config = TrainConfig.model_validate(
        {
            "output_dir": "unused",
            "model": {"name_or_path": "unused"},
            "data": {"train": "unused.jsonl"},
            "deepspeed": f"ds_configs/zero{zero_stage}.json",
        }
    )
    causal_lm = random_causal_lm(name, DEVICE)
    disable_dropout(causal_lm)
    head = make_reward_head(SHAPES[name].hidden_size, bias=False, init="normal", dtype=DTYPE, seed=0)
    model = HybridModel(causal_lm.train(), head.to(DEVICE))
    comparisons = move(comparisons_of_pairs(num_pairs), DEVICE)

    def loss_of(scores: ResponseScores) -> torch.Tensor:
        reference, weights = scores.of("logprob").detach(), weights_at(config.objective, 0)
        return joint_loss(config.objective, weights, scores, reference, comparisons).total.mean()

    if timed(name) == "forward and backward":
        causal_lm.gradient_checkpointing_enable({"use_reentrant": False})

        def forward_and_backward(batch: PackedBatch) -> None:
            loss_of(model(batch.to(DEVICE))).backward()
            model.zero_grad()

        return model, forward_and_backward

    # torch 2.13 renames collectives that DeepSpeed calls by their old names.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    processes = Processes.join()
    processes.start_group()
    engine = TrainingEngine(model, config, resolve_deepspeed_config(config, processes.world_size))

    def step(batch: PackedBatch) -> None:
        engine.backward(loss_of(engine(batch)), is_last=True)
        engine.step(learning_rate_factor=1.0)

    return model, step


def median_seconds(work: Callable[[], None]) -> float:
    seconds = []
    for _ in range(WARM_UP + ROUNDS):
        synchronize(DEVICE)
        started = time.perf_counter()
        work()
        synchronize(DEVICE)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[WARM_UP:])


def reset_peak_memory() -> None:
    if IS_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(DEVICE)


def time_steps(name: str, peak_flops: float, log_probs: str) -> list[StepTime]:
    """shared_prefix under every kernel, then packed under the best, and padded under the model's stock attention, with
    fused layers where Liger is installed; at last shared_prefix without."""
    pairs = random_pairs(SHAPES[name].vocab_size, MICRO_BATCH_TOKENS)
    model, step = make_steps(name, len(pairs))
    model.use_log_probs(log_probs, DEVICE)
    model.use_fused("auto", DEVICE)
    cost = ForwardCost.of(model.causal_lm, full_shape)
    runs = [("shared_prefix", kernel, True) for kernel in available_kernels()]
    runs += [("packed", "auto", True), ("padded", "auto", True)]
    layers = model.fused
    if layers is not None:
        runs.append(("shared_prefix", "auto", False))
    times = []
    for layout, kernel, fused in runs:
        model.use_layout(layout, kernel, DEVICE)
        batch = lay_out(pairs, layout)
        reset_peak_memory()
        with nullcontext() if fused or layers is None else layers.taken_away():
            seconds = median_seconds(partial(step, batch))
        times.append(
            StepTime(
                layout,
                model.causal_lm.config._attn_implementation,
                layers.kind if layers is not None and fused else "off",
                seconds,
                tokens=batch.num_positions - batch.num_padding,
                pairs=len(pairs),
                mfu=3 * sum(cost.parts(batch, with_logprob=True)) / seconds / peak_flops,
                memory_bytes=peak_memory_bytes(DEVICE),
            )
        )
    return times


def time_logprobs(name: str) -> list[LogprobTime]:
    shape = SHAPES[name]
    hidden = torch.randn(MICRO_BATCH_TOKENS, shape.hidden_size, device=DEVICE, dtype=DTYPE, requires_grad=True)
    weight = torch.randn(shape.vocab_size, shape.hidden_size, device=DEVICE, dtype=DTYPE, requires_grad=True)
    targets = torch.randint(shape.vocab_size, (MICRO_BATCH_TOKENS,), device=DEVICE)
    functions: dict[str, Callable[..., torch.Tensor]] = {"torch": token_logprobs}
    if IS_GPU and import_problem("triton") is None:
        from hafrm_ds.model.softmax_kernels import TritonSoftmax

        functions["triton"] = partial(token_logprobs, softmax=TritonSoftmax())
    if HAS_LIGER:
        functions["Liger"] = liger_logprobs

    def gradient(function: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        few = slice(COMPARED_TOKENS)
        logprobs = function(inputs[0][few], inputs[1], None, targets[few], HeadTransform())
        return torch.autograd.grad(logprobs.sum(), inputs[1])[0].double()

    exact = gradient(all_logits, [each.detach().double().requires_grad_() for each in (hidden, weight)])
    times = []
    for function_name, function in functions.items():

        def work(function=function) -> None:
            function(hidden, weight, None, targets, HeadTransform()).sum().backward()

        error = ((gradient(function, [hidden, weight]) - exact).norm() / exact.norm()).item()
        times.append(LogprobTime(function_name, median_seconds(work), peak_growth_bytes(DEVICE, work), error))
    return times


def all_logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: None, targets: torch.Tensor, transform
) -> torch.Tensor:
    return (hidden @ weight.t()).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def chosen_log_probs(times: Sequence[LogprobTime]) -> str:
    """The fastest way that model.log_probs has, among those as exact as torch's operations."""
    by_name = {each.function: each for each in times}
    allowed = EXACT_ENOUGH * by_name["torch"].error
    own = [by_name[name] for name in ("torch", "triton") if name in by_name and by_name[name].error <= allowed]
    return min(own, key=lambda each: each.seconds).function


def measure(name: str) -> Report:
    """One shape, in a process of its own: DeepSpeed keeps the memory of an engine as long as its process lives."""
    peak_flops = measure_matmul_peak(DEVICE, DTYPE, seconds=2.0)
    logprobs = time_logprobs(name)
    log_probs = chosen_log_probs(logprobs)
    steps = time_steps(name, peak_flops, log_probs)
    if dist.is_initialized():
        dist.destroy_process_group()
    return Report(num_parameters(name), peak_flops, steps, logprobs, log_probs)


def render(name: str, report: Report) -> str:
    def gib(number: int) -> str:
        return f"{number / 2**30:.2f}"

    steps = [
        (
            each.layout,
            each.attention,
            each.fused,
            f"{each.seconds:.4f}",
            f"{each.tokens:,}",
            f"{each.tokens / each.seconds:,.0f}",
            f"{each.pairs / each.seconds:,.1f}",
            gib(each.memory_bytes),
            f"{each.mfu:.1%}",
        )
        for each in report.steps
    ]
    logprobs = [
        (each.function, f"{each.seconds:.4f}", gib(each.memory_bytes), f"{each.error:.2e}") for each in report.logprobs
    ]
    shape = SHAPES[name]
    return "\n\n".join(
        [
            f"### {name}: {report.parameters / 1e6:,.0f}M parameters, {timed(name)}",
            f"bfloat16, {'gradient checkpointing' if name in WITHOUT_OPTIMIZER else 'ZeRO-3'}; measured matrix-product "
            f"peak {report.peak_flops / 1e12:,.1f} TFLOP/s; log-probs by {report.log_probs}; median of {ROUNDS} after "
            f"{WARM_UP}",
            table(("layout", "attention", "fused", "s", "tokens", "tokens/s", "pairs/s", "peak GiB", "MFU"), steps),
            f"Log-probs of {MICRO_BATCH_TOKENS:,} tokens, hidden size {shape.hidden_size}, vocabulary "
            f"{shape.vocab_size:,}, forward and backward:",
            table(("function", "s", "peak GiB", "error of the weight's gradient"), logprobs),
        ]
    )


def too_large(name: str) -> str | None:
    """Why a shape cannot run on this GPU, before any activation."""
    needed = BYTES_PER_PARAMETER[timed(name)] * num_parameters(name)
    if not IS_GPU or needed < (there := torch.cuda.get_device_properties(DEVICE).total_memory):
        return None
    return f"needs {needed / 2**30:.0f} GiB before its activations, of {there / 2**30:.0f} GiB"


def main(names: Sequence[str]) -> None:
    choose_allocators()
    if unknown := set(names) - SHAPES.keys():
        sys.exit(f"unknown shapes {', '.join(sorted(unknown))}; there are {', '.join(SHAPES)}")
    if not IS_GPU and not IS_ALLOWED_ON_CPU:
        sys.exit("needs an NVIDIA GPU")
    sections = [table(("", ""), hardware())]
    print(sections[0], flush=True)
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for name in names:
            reason = too_large(name)
            section = f"### {name}\n\n{reason}" if reason else render(name, pool.submit(measure, name).result())
            sections.append(section)
            print(f"\n{section}", flush=True)
            if out := os.environ.get("OUT"):
                Path(out, "benchmark.md").write_text("\n\n".join(sections) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:] or DEFAULT_SHAPES)
