"""The Triton kernels of the log-probs: computed on the CPU by Triton's interpreter, and compiled for GPUs.

Where Triton is not installed it is taken from a package index (200 MB).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hafrm_ds.model.attention import import_problem
from tests.without_gpu.package_index import ROOT, environment

pytestmark = pytest.mark.index
IS_MISSING = import_problem("triton") is not None


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    return environment(tmp_path_factory.mktemp("triton"), "triton") if IS_MISSING else Path(sys.executable)


def run(python: Path, script: str, **variables: str) -> str:
    result = subprocess.run(
        [python, "-W", "ignore", "-m", script],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_values_and_gradients_are_those_of_torch_in_every_transform_and_dtype(python):
    assert run(python, "tests.without_gpu.interpret_softmax_kernels", TRITON_INTERPRET="1").count("as exact") == 2 * 4


def test_kernels_compile_and_keep_their_logits_in_registers(python):
    assert run(python, "tests.without_gpu.compile_softmax_kernels").count("compiled") == 3 * 2 * 2 * 2
