"""What is said before DeepSpeed would fail."""

import shutil
import sysconfig

import pytest
import torch

from hafrm_ds.engine import engine
from hafrm_ds.engine.engine import buffer_dtypes, check_buffers, check_build_tools
from hafrm_ds.errors import UserError
from tests.tiny_models import tiny_causal_lm

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


def test_rotary_frequencies_in_bfloat16_are_refused():
    """What a blanket cast of the module does; from_pretrained leaves them in fp32."""
    model = tiny_causal_lm("llama")
    before = buffer_dtypes(model)
    check_buffers(before, buffer_dtypes(model), "0.19.2")
    with pytest.raises(UserError, match=r"DeepSpeed 0.19.1 .*inv_freq from torch.float32 to torch.bfloat16.* 0.19.5"):
        check_buffers(before, buffer_dtypes(model.bfloat16()), "0.19.1")
