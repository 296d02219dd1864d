"""What the tests of this folder run on, and what it can do.

    python -m tests.gpu.environment

HAFRM_GPU_TESTS_ON_CPU=1 lets a machine without a GPU run them on its CPU, with small sizes and the one kernel that a
CPU has: that finds mistakes in the tests, and says nothing about a GPU.
"""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence

import torch
from transformers import LlamaConfig

from hafrm_ds.model.attention import KERNELS, kernel_order

IS_GPU = torch.cuda.is_available()
IS_ALLOWED_ON_CPU = os.environ.get("HAFRM_GPU_TESTS_ON_CPU") == "1"
DEVICE = torch.device("cuda", 0) if IS_GPU else torch.device("cpu")
PACKAGES = ("torch", "transformers", "deepspeed", "datasets", "flash-attn", "flash-attn-4", "liger-kernel", "triton")


def obstacle(kernel: str, dtype: torch.dtype, head_dim: int = 64, softcap: float | None = None) -> str | None:
    """Why a kernel cannot run here; None when it can."""
    config = LlamaConfig(head_dim=head_dim, attn_logit_softcapping=softcap)
    return KERNELS[kernel].obstacle(DEVICE, dtype, config)


def available_kernels(dtype: torch.dtype = torch.bfloat16) -> list[str]:
    return [name for name in kernel_order(DEVICE) if obstacle(name, dtype) is None]


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def driver() -> str:
    if not shutil.which("nvidia-smi"):
        return "unknown (no nvidia-smi)"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True)
    return answer.stdout.splitlines()[0].strip() if answer.returncode == 0 and answer.stdout else "unknown"


def hardware() -> list[tuple[str, str]]:
    """(name, value): what the figures of a run depend on."""
    found = [("python", platform.python_version()), *((package, version(package)) for package in PACKAGES)]
    if not IS_GPU:
        return [("device", f"CPU, {os.cpu_count()} cores"), *found]
    properties = torch.cuda.get_device_properties(DEVICE)
    count = torch.cuda.device_count()
    return [
        ("device", f"{count} x {properties.name}" if count > 1 else properties.name),
        ("memory", f"{properties.total_memory / 2**30:.1f} GiB"),
        ("compute capability", f"{properties.major}.{properties.minor}"),
        ("driver", driver()),
        ("CUDA of torch", str(torch.version.cuda)),
        *found,
    ]


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    print(table(("", ""), hardware()))
    print()
    kernels = [(name, obstacle(name, torch.bfloat16) or "available") for name in KERNELS]
    print(table(("kernel", "bfloat16, heads of 64"), kernels))
    if not IS_GPU and not IS_ALLOWED_ON_CPU:
        sys.exit("torch sees no NVIDIA GPU here: is the driver installed, and torch a build with CUDA?")


if __name__ == "__main__":
    main()
