"""The names of the benchmarks, and their results as tables."""

import io
import json

from rich.console import Console

from hafrm_ds.evaluation.benchmarks.catalogue import BENCHMARKS, render
from tests.evaluation.benchmarks.rows import judgebench_row, rm_bench_row, summary


def shown(result):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(render(result))
    return [line.strip("│┃ ") for line in console.export_text().splitlines()]


def cells(lines, name):
    (line,) = [line for line in lines if line.startswith(f"{name} ")]
    return [cell.strip() for cell in line.split("│")][1:]


def test_names():
    assert list(BENCHMARKS) == ["rewardbench", "rewardbench2", "rm-bench", "judgebench"]


def test_a_table_of_a_whole_benchmark(tmp_path):
    domains = ("chat", "math", "code", "safety-refuse", "safety-response")
    result = summary("rm-bench", tmp_path, [rm_bench_row(domain) for domain in domains], [[1, 3, 5, 0, 2, 4]] * 5)
    assert json.loads(json.dumps(result)) == result
    lines = shown(result)
    assert cells(lines, "Safety") == ["66.7%", "2", "0"]
    assert cells(lines, "safety-refuse") == ["66.7%", "1", "0"]
    assert cells(lines, "overall") == ["66.7%", "5", "0"]
    assert not any("no overall score" in line for line in lines)


def test_a_table_says_what_is_missing_and_reads_no_markup(tmp_path):
    rows = [judgebench_row("livecodebench-[red]x"), judgebench_row("livecodebench")]
    lines = shown(summary("judgebench", tmp_path, rows, [[1, 0], [1, 0]]))
    assert cells(lines, "livecodebench-[red]x") == ["100.0%", "1", "0"]
    assert cells(lines, "overall") == ["none", "2", "0"]
    assert "no overall score without all of Knowledge, Reasoning, Math" in " ".join(" ".join(lines).split())
