"""What is said before DeepSpeed would fail."""

import os
import shutil
import subprocess
import sys
import sysconfig

import pytest
import torch

from hafrm_ds.config import OptimizerConfig
from hafrm_ds.engine import engine
from hafrm_ds.engine.engine import buffer_dtypes, check_buffers, check_build_tools, parameter_groups
from hafrm_ds.errors import UserError
from hafrm_ds.model.hybrid import HybridModel, make_attribute_head
from tests.tiny_models import tiny_causal_lm, tiny_hybrid

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


@pytest.mark.distributed  # where nothing was built before, DeepSpeed builds what it reduces with
def test_collectives_of_deepspeed_have_the_time_out_of_the_run():
    code = """
import datetime, torch, torch.distributed as dist
from hafrm_ds.engine.engine import start_collectives
wait = datetime.timedelta(minutes=77)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=wait)
start_collectives()
from deepspeed.utils import groups
backend = groups._get_data_parallel_group()._get_backend(torch.device("cpu"))
print("is that of the run:", backend.options._timeout == wait)
"""
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True)
    assert "is that of the run: True" in done.stdout, done.stderr


def test_rotary_frequencies_in_bfloat16_are_refused():
    """What a blanket cast of the module does; from_pretrained leaves them in fp32."""
    model = tiny_causal_lm("llama")
    before = buffer_dtypes(model)
    check_buffers(before, buffer_dtypes(model), "0.19.2")
    with pytest.raises(UserError, match=r"DeepSpeed 0.19.1 .*inv_freq from torch.float32 to torch.bfloat16.* 0.19.5"):
        check_buffers(before, buffer_dtypes(model.bfloat16()), "0.19.1")


def test_the_heads_learn_at_a_rate_of_their_own_in_one_order_on_all_ranks():
    plain = tiny_hybrid("llama-tied")
    model = HybridModel(plain.causal_lm, plain.reward_head, make_attribute_head(32, ["x", "y"], torch.float32))
    *body, heads = parameter_groups(model, OptimizerConfig(reward_head_learning_rate=1e-3, weight_decay=0.1))
    expected = [model.reward_head.weight, model.attribute_head.weight, model.attribute_head.bias]
    assert len(heads["params"]) == 3 and all(own is each for own, each in zip(heads["params"], expected))
    assert (heads["lr"], heads["weight_decay"]) == (1e-3, 0.0)
    assert sum(len(group["params"]) for group in body) == len(list(model.causal_lm.parameters()))
