"""The benchmarks by name."""

from hafrm_ds.evaluation.benchmarks.benchmark import Benchmark
from hafrm_ds.evaluation.benchmarks.judgebench import JUDGEBENCH
from hafrm_ds.evaluation.benchmarks.rewardbench import REWARDBENCH
from hafrm_ds.evaluation.benchmarks.rewardbench2 import REWARDBENCH_2
from hafrm_ds.evaluation.benchmarks.rm_bench import RM_BENCH

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark for benchmark in (REWARDBENCH, REWARDBENCH_2, RM_BENCH, JUDGEBENCH)
}
