"""DeepSpeed can be imported where there is a GPU and no CUDA toolkit."""

import os
import subprocess
import sys

SCRIPT = """
import torch, torch.utils.cpp_extension as extensions
from types import SimpleNamespace
extensions.CUDA_HOME = None
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
properties = SimpleNamespace(major=9, minor=0, total_memory=141e9, multi_processor_count=132)
torch.cuda.get_device_properties = lambda device=None: properties
torch.cuda.get_device_capability = lambda device=None: (9, 0)
import deepspeed
from deepspeed.accelerator import get_accelerator
print("imported for", get_accelerator()._name)
"""


def test_deepspeed_needs_no_cuda_toolkit():
    environment = {name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "CUDA_PATH")}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment | {"DS_ACCELERATOR": "cuda"}, capture_output=True, text=True
    )
    assert "imported for cuda" in result.stdout, result.stderr[-2000:]
