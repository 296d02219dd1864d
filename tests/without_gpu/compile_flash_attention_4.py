"""Compiles FlashAttention 4's kernels for this project's calls, forward and backward, where there is no GPU.

    CUTE_DSL_ARCH=sm_90a FLASH_ATTENTION_ARCH=sm_90 FLASH_ATTENTION_NUM_SMS=132 \\
        python -m tests.without_gpu.compile_flash_attention_4 HEAD_DIM:WINDOW ...        (WINDOW 0: none)

Tensors are fake: kernels are compiled, and not started. Prints one line a variant. Four query heads share two others.
"""

import os
import re
import sys
import time
from unittest.mock import MagicMock

import torch
import torch._inductor.runtime.hints  # asks for triton itself, so before it is replaced
from torch._subclasses.fake_tensor import FakeTensorMode

from hafrm_ds.data.packing import lay_out
from hafrm_ds.model.attention import ScoreRule, run_flash_package
from tests.tiny_models import random_items
from tests.without_gpu.fake_cuda import DEVICE, let_fake_tensors_be_indexed, pinned


def compile_variant(head_dim: int, window: int | None) -> tuple[float, float]:
    """Seconds of forward and of backward."""
    segments = lay_out(random_items(seed=0, num_items=4), "shared_prefix").segments.to(DEVICE)
    shapes = (sum(segments.q_lengths), 4, head_dim), *((sum(segments.k_lengths), 2, head_dim),) * 2
    query, key, value = (torch.empty(s, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for s in shapes)
    started = time.perf_counter()
    output = run_flash_package("flash_attn.cute", query, key, value, segments, ScoreRule(None, window, None))
    between = time.perf_counter()
    # Not output.backward(): autograd's engine asks for a device.
    found = output.grad_fn.apply(torch.empty_like(output), None)
    assert [each.shape for each in found[:3]] == [query.shape, key.shape, value.shape]
    return between - started, time.perf_counter() - between


def main(variants: list[str]) -> None:
    major = int(re.fullmatch(r"sm_(\d+)0", os.environ["FLASH_ATTENTION_ARCH"])[1])
    torch.cuda.get_device_capability = lambda device=None: (major, 0)
    torch.Tensor.pin_memory = pinned
    try:
        import triton  # noqa: F401
    except ImportError:  # torch for CPUs comes without; what is compiled here does not use it
        sys.modules["triton"] = MagicMock()
    import cutlass.utils

    class Hardware:
        """Instead of what asks the driver."""

        def get_device_multiprocessor_count(self) -> int:
            return int(os.environ["FLASH_ATTENTION_NUM_SMS"])

        def get_max_active_clusters(self, cluster_size: int) -> int:
            return self.get_device_multiprocessor_count() // cluster_size

    cutlass.utils.HardwareInfo = Hardware
    let_fake_tensors_be_indexed()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for variant in variants:
            head_dim, window = map(int, variant.split(":"))
            forward, backward = compile_variant(head_dim, window or None)
            print(
                f"heads of {head_dim}, window {window}: forward {forward:.1f} s, backward {backward:.1f} s", flush=True
            )


if __name__ == "__main__":
    main(sys.argv[1:])
