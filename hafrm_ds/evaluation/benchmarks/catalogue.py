"""The benchmarks by name, and a result as a table."""

from typing import Any

from rich.table import Table

from hafrm_ds.data.report import as_text, number_table
from hafrm_ds.evaluation.benchmarks.benchmark import Benchmark
from hafrm_ds.evaluation.benchmarks.judgebench import JUDGEBENCH
from hafrm_ds.evaluation.benchmarks.rewardbench import REWARDBENCH
from hafrm_ds.evaluation.benchmarks.rewardbench2 import REWARDBENCH_2
from hafrm_ds.evaluation.benchmarks.rm_bench import RM_BENCH

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark for benchmark in (REWARDBENCH, REWARDBENCH_2, RM_BENCH, JUDGEBENCH)
}


def render(result: dict[str, Any]) -> Table:
    """A result of `Benchmark.summarize` as a table: categories with their subsets, then the whole."""
    table = number_table(result["title"], "score", "questions", "ties")

    def add(name: str, part: dict[str, Any], indent: str) -> None:
        score = "none" if part["score"] is None else f"{part['score']:.1%}"
        table.add_row(as_text(indent + name), score, f"{part['questions']:,}", f"{part['ties']:,}")
        for detail, value in part["details"].items():
            table.add_row(as_text(f"{indent}  {detail}"), f"{value:.1%}", "", "")

    for name, category in result["categories"].items():
        add(name, category, "")
        if len(category["subsets"]) > 1:
            for subset, part in category["subsets"].items():
                add(subset, part | {"details": {}}, "  ")
    table.add_section()
    add("overall", result, "")
    if result["missing"]:
        absent = {name: result["categories"][name] for name in result["missing"]}
        names = [", ".join(part["missing"]) if part["questions"] else name for name, part in absent.items()]
        table.caption = as_text(f"no overall score without all of {', '.join(names)}")
    return table
