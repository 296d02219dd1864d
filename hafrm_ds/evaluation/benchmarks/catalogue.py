"""The benchmarks by name, and a result as a table."""

from typing import Any

import rich.table

from hafrm_ds.data.tables import Cell, Table, as_text, count, share
from hafrm_ds.evaluation.benchmarks.benchmark import Benchmark
from hafrm_ds.evaluation.benchmarks.judgebench import JUDGEBENCH
from hafrm_ds.evaluation.benchmarks.rewardbench import REWARDBENCH
from hafrm_ds.evaluation.benchmarks.rewardbench2 import REWARDBENCH_2
from hafrm_ds.evaluation.benchmarks.rm_bench import RM_BENCH

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark for benchmark in (REWARDBENCH, REWARDBENCH_2, RM_BENCH, JUDGEBENCH)
}


def render(result: dict[str, Any]) -> rich.table.Table:
    """A result of `Benchmark.summarize` as a table: categories with their subsets, then the whole."""
    rows: list[tuple[str, list[Cell]]] = []

    def add(name: str, part: dict[str, Any], indent: str) -> None:
        score = "none" if part["score"] is None else f"{part['score']:.1%}"
        rows.append((indent + name, [Cell(score), count(part["questions"]), count(part["ties"])]))
        rows.extend((f"{indent}  {detail}", [share(value)]) for detail, value in part["details"].items())

    for name, category in result["categories"].items():
        add(name, category, "")
        if len(category["subsets"]) > 1:
            for subset, part in category["subsets"].items():
                add(subset, part | {"details": {}}, "  ")
    of_categories = len(rows)
    add("overall", result, "")
    table = Table(rows, (result["title"], "score", "questions", "ties")).to_rich()
    if of_categories:
        table.rows[of_categories - 1].end_section = True
    if result["missing"]:
        absent = {name: result["categories"][name] for name in result["missing"]}
        names = [", ".join(part["missing"]) if part["questions"] else name for name, part in absent.items()]
        table.caption = as_text(f"no overall score without all of {', '.join(names)}")
    return table
