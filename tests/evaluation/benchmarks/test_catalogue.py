"""The names of the benchmarks."""

from hafrm_ds.evaluation.benchmarks.catalogue import BENCHMARKS


def test_names():
    assert list(BENCHMARKS) == ["rewardbench", "rewardbench2", "rm-bench", "judgebench"]
    assert all(name == benchmark.name for name, benchmark in BENCHMARKS.items())
