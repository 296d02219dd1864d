"""Liger's Triton kernels in the layers of every family: computed on the CPU by Triton's interpreter, and counted.

Where Triton or Liger is not installed they are taken from a package index (200 MB).
"""

import sys
from pathlib import Path

import pytest

from hafrm_ds.model.attention import import_problem
from tests.tiny_models import FAMILIES
from tests.without_gpu.package_index import environment
from tests.without_gpu.test_softmax_kernels import run

pytestmark = pytest.mark.index
MISSING = [name for name in ("triton", "liger-kernel") if import_problem(name.replace("-", "_"))]


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    return environment(tmp_path_factory.mktemp("liger"), *MISSING) if MISSING else Path(sys.executable)


def test_scores_and_gradients_are_those_of_every_family(python):
    told = run(python, "tests.without_gpu.interpret_fused_layers", TRITON_INTERPRET="1")
    assert told.count("as exact") == len(FAMILIES) + 2 - 1
    assert told.count("the same") == 2
    assert "opt refused: model.fused liger cannot be used: OPTForCausalLM has no RMSNorm" in told
    assert "llama: as exact" in told and "RMSNorm, gated MLP, rotary embedding by liger" in told


def test_it_starts_and_keeps_what_plans_suppose(python):
    assert run(python, "tests.without_gpu.count_liger_kernels").count("as supposed") == 4
