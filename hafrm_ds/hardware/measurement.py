"""What the hardware at hand reaches: its matrix-product peak, free memory, and what a piece of work takes of it."""

import ctypes
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch

from hafrm_ds.errors import UserError


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
