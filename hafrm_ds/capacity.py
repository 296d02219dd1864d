"""What a computation costs: floating-point operations of a model, and what the hardware reaches."""

import ctypes
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig

from hafrm_ds.data.packing import PackedBatch
from hafrm_ds.errors import UserError


@dataclass(frozen=True)
class ForwardCost:
    """Floating-point operations of one forward pass, and of the backward pass after it.

    per_token: matrix products of the body for one token. per_response_token: the LM head for one predicted token.
    per_visible_key: attention scores and their sum over values, for one query that sees one key, over all layers.
    trained_share, trained_head_share: of the first two, what belongs to weights that are trained.

    A multiplication and its addition count as two. In backward the gradients of a product's inputs cost what it costs
    in forward, and those of its weights as much again where they are trained; attention has two inputs. Recomputation
    under gradient checkpointing is not counted, as usual for MFU; sliding windows are counted as if they were open.
    """

    per_token: float
    per_response_token: float
    per_visible_key: float
    trained_share: float
    trained_head_share: float

    @classmethod
    def of(cls, causal_lm: nn.Module) -> "ForwardCost":
        config: PretrainedConfig = causal_lm.config.get_text_config()
        head = causal_lm.get_output_embeddings().weight
        embedding = causal_lm.get_input_embeddings().weight
        matrices = [
            parameter
            for parameter in causal_lm.parameters()
            if parameter is not head and parameter is not embedding and len(full_shape(parameter)) == 2
        ]
        body = sum(map(full_numel, matrices))
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            per_token=2.0 * body,
            per_response_token=2.0 * full_numel(head),
            per_visible_key=4.0 * config.num_hidden_layers * config.num_attention_heads * head_dim,
            trained_share=sum(full_numel(parameter) for parameter in matrices if parameter.requires_grad) / body,
            trained_head_share=float(head.requires_grad),
        )

    def forward_flops(self, batch: PackedBatch, with_logprob: bool) -> float:
        """Operations that the batch needs; padding is not among them."""
        return sum(self.parts(batch, with_logprob))

    def training_flops(self, batch: PackedBatch, with_logprob: bool) -> float:
        """Operations of forward and backward."""
        body, head, attention = self.parts(batch, with_logprob)
        return (2 + self.trained_share) * body + (2 + self.trained_head_share) * head + 3 * attention

    def parts(self, batch: PackedBatch, with_logprob: bool) -> tuple[float, float, float]:
        """Operations of one forward pass: (body, LM head, attention)."""
        if batch.segments is not None:
            q, k = np.array(batch.segments.q_lengths), np.array(batch.segments.k_lengths)
        else:
            q = k = batch.attention_mask.sum(1).numpy()
        visible_keys = (q * (k - q) + q * (q + 1) // 2).sum()
        head = self.per_response_token * len(batch.target_ids) if with_logprob else 0.0
        return self.per_token * q.sum(), head, self.per_visible_key * visible_keys


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of a parameter, also of one that ZeRO-3 has sharded (whose own shape is empty) or bitsandbytes packed."""
    if (packed := getattr(parameter, "quant_state", None)) is not None:
        return tuple(packed.shape)
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def full_numel(parameter: nn.Parameter) -> int:
    return int(np.prod(full_shape(parameter)))


def measure_matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """FLOP/s of a large square matrix product on this device: the peak that MFU is measured against."""
    size = 8192 if device.type == "cuda" else 1536
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end or best == 0.0:
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        best = max(best, 2.0 * size**3 / (time.perf_counter() - start))
    return best


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process has held: allocated on the GPU, or resident in RAM on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def free_memory_bytes(device: torch.device, num_sharing: int) -> int:
    """Memory that this process may still take: free on its GPU, or its part of what the machine or container has left.

    Args:
        num_sharing: processes that share a CPU's memory.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    left = read_kib(Path("/proc/meminfo"), "MemAvailable")
    try:  # a container may be allowed less
        group = Path("/sys/fs/cgroup")
        allowed, held = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        left = min(left, allowed - held + int(statistics["inactive_file"]))  # the page cache makes room
    except (OSError, ValueError, KeyError):  # no limit, or no cgroup of version 2
        pass
    return left // num_sharing


def peak_growth_bytes(device: torch.device, work: Callable[[], None]) -> int:
    """How much memory `work` takes at its highest, beyond what the process held before."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_reserved(device)
        work()
        synchronize(device)
        return torch.cuda.max_memory_reserved(device) - before
    status = Path("/proc/self/status")
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what malloc keeps of freed memory would hide what `work` takes
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to what is held now
        before = read_kib(status, "VmRSS")
        work()
        return read_kib(status, "VmHWM") - before
    except (OSError, AttributeError) as error:
        raise UserError(
            "this system does not tell how much memory a process takes, which --batch.max_tokens_per_micro_batch auto "
            "needs; give a number"
        ) from error


def read_kib(file: Path, name: str) -> int:
    """The value of a `Name:   123 kB` line of a file under /proc, in bytes."""
    line = next(line for line in file.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
