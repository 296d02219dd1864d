"""What is said before DeepSpeed would fail."""

import shutil
import sysconfig

import pytest
import torch

from hafrm_ds.errors import UserError
from hafrm_ds.training import engine
from hafrm_ds.training.engine import check_build_tools

OFFLOADED = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
GPU, CPU = torch.device("cuda"), torch.device("cpu")


def test_an_offloaded_optimizer_needs_a_compiler_and_the_toolkit_on_a_gpu(monkeypatch):
    monkeypatch.setattr(engine, "cuda_toolkit", lambda: None)
    with pytest.raises(UserError, match="its Adam for an offloaded optimizer and needs the CUDA toolkit"):
        check_build_tools(GPU, OFFLOADED)
    check_build_tools(CPU, OFFLOADED)
    check_build_tools(GPU, {"zero_optimization": {"stage": 3}})
    check_build_tools(GPU)


def test_every_missing_tool_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(UserError, match=r"a communication op on CPU and needs a C\+\+ compiler .*ninja .*Python\.h"):
        check_build_tools(CPU)
    check_build_tools(GPU)
