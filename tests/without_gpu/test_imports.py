"""This package and what it needs can be imported where there is a GPU and no CUDA toolkit: as installed, in the lowest
versions that setup.py takes, and in the newest.

torch is the one that is installed: its wheels are too large to fetch here. tests/without_gpu/test_signatures.py knows
what changed in it. trl, which tests alone need, asks for newer versions of others than setup.py does.
"""

import os
import subprocess
import sys

import pytest
from packaging.version import Version

from tests.without_gpu.package_index import ROOT, environment, floors, requirements

SCRIPT = """
import importlib, importlib.metadata, importlib.util, pkgutil, sys
from types import SimpleNamespace
import torch, torch.utils.cpp_extension as extensions
extensions.CUDA_HOME = None
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.current_device = lambda: 0
properties = SimpleNamespace(major=9, minor=0, total_memory=141e9, multi_processor_count=132)
torch.cuda.get_device_properties = lambda device=None: properties
torch.cuda.get_device_capability = lambda device=None: (9, 0)
for name in sys.argv[1:]:
    importlib.import_module(name)
import deepspeed, hafrm_ds
from deepspeed.accelerator import get_accelerator
for module in pkgutil.walk_packages(hafrm_ds.__path__, "hafrm_ds."):
    # Imported where model.log_probs asks for it alone; triton comes with torch's builds for GPUs.
    # Those for trainers import the trainer.
    needed = {"model.softmax_kernels": "triton", "clients.for_swift": "swift", "clients.for_nemo_rl": "nemo_rl",
              "clients.for_skyrl": "skyrl_gym"}.get(module.name.removeprefix("hafrm_ds."))
    if needed is None or importlib.util.find_spec(needed):
        importlib.import_module(module.name)
print("imported for", get_accelerator()._name)
print("versions:", *(f"{name}=={importlib.metadata.version(name)}" for name in sys.argv[1:]))
"""
FETCHED = ("deepspeed", "transformers", "accelerate", "datasets", "matplotlib", "pydantic", "peft", "bitsandbytes")


def imported(python: str, *packages: str) -> dict[str, str]:
    """By name, the versions of packages that were imported, with all modules of this project."""
    variables = {name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "CUDA_PATH")}
    variables |= {"DS_ACCELERATOR": "cuda", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([python, "-c", SCRIPT, *packages], env=variables, capture_output=True, text=True)
    assert "imported for cuda" in result.stdout, result.stderr[-2000:]
    return dict(each.split("==") for each in result.stdout.partition("versions:")[2].split())


def test_deepspeed_needs_no_cuda_toolkit():
    assert imported(sys.executable, "deepspeed")["deepspeed"].startswith("0.")


@pytest.mark.index
@pytest.mark.slow
def test_the_lowest_versions_can_be_imported(tmp_path):
    lowest = floors("lora", "qlora")
    assert lowest.keys() - {"torch"} == set(FETCHED)
    python = environment(tmp_path, *(f"{name}=={lowest[name]}" for name in FETCHED))
    found = imported(str(python), *FETCHED)
    assert {name: Version(version) for name, version in found.items()} == {
        name: Version(lowest[name]) for name in FETCHED
    }


@pytest.mark.index
@pytest.mark.slow
def test_the_newest_versions_can_be_imported(tmp_path):
    needed = requirements("lora")
    names = ("deepspeed", "transformers", "accelerate", "peft")
    python = environment(tmp_path, "--upgrade", *(str(needed[name]) for name in names))
    found = imported(str(python), *names)
    assert [name for name in names if not needed[name].specifier.contains(found[name])] == []
