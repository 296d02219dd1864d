"""Tests and benchmark of tests/gpu allocate memory as the entry files do: their figures of memory are then theirs."""

import os

import pytest

from tests.gpu import benchmark, conftest

ENTRIES = {
    "tests": lambda: conftest.pytest_runtest_setup(None),
    "benchmark": lambda: benchmark.main(["no such shape"]),
}


@pytest.mark.parametrize("enter", ENTRIES.values(), ids=ENTRIES)
def test_segments_of_memory_grow(monkeypatch, enter):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "THP_MEM_ALLOC_ENABLE"):
        monkeypatch.setenv(name, "")  # so that all is as it was after the test
        monkeypatch.delenv(name)
    for module in (benchmark, conftest):  # CI allows them on a CPU; here they are to end before they begin
        monkeypatch.setattr(module, "IS_ALLOWED_ON_CPU", False)
    with pytest.raises((SystemExit, pytest.skip.Exception)):
        enter()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
