"""Gradients averaged in fp32 on demand, under every ZeRO stage, against fp64."""

import json

import pytest

from tests.distributed.forked_ranks import run_ranks

pytestmark = pytest.mark.distributed


def test_averaging_in_fp32_loses_nothing():
    """In bfloat16 a sum of two is rounded once. Stage 0 holds gradients in bfloat16, so it rounds fp32 at the end."""
    printed = run_ranks(2, "tests/benchmarks/reduced_gradients.py")
    (line,) = [line for line in printed.splitlines() if line.startswith('{"0"')]
    for stage, (in_bf16, in_fp32) in json.loads(line).items():
        assert 1e-3 < in_bf16 < 1e-2, f"stage {stage}"
        assert in_fp32 <= in_bf16 if stage == "0" else in_fp32 < 1e-6, f"stage {stage}"
