"""Rows in the official formats, and what a benchmark makes of them."""

from hafrm_ds.evaluation.benchmarks.catalogue import BENCHMARKS
from tests.data.row_files import write_lines


def rewardbench_row(subset, **fields):
    texts = {"prompt": "Why?", "chosen": "Because.", "chosen_model": "a", "rejected": "No.", "rejected_model": "b"}
    return texts | {"subset": subset, "id": 7} | fields


def rewardbench2_row(subset, right=1, wrong=3, **fields):
    return {
        "id": "12",
        "prompt": "Why?",
        "chosen": [f"right {n}" for n in range(right)],
        "rejected": [f"wrong {n}" for n in range(wrong)],
        "num_correct": right,
        "num_incorrect": wrong,
        "total_completions": right + wrong,
        "models": [],
        "subset": subset,
    } | fields


def rm_bench_row(domain, **fields):
    answers = {side: [f"{side} {style}" for style in range(3)] for side in ("chosen", "rejected")}
    return {"id": "chat/1", "prompt": "Why?", "domain": domain} | answers | fields


def judgebench_row(source, label="A>B", **fields):
    return {
        "pair_id": "b5ce1305",
        "original_id": 6603,
        "source": source,
        "question": "Which?",
        "response_model": "gpt-4o-2024-05-13",
        "response_A": "this",
        "response_B": "that",
        "label": label,
    } | fields


def summary(name, folder, rows, rewards):
    """The result of a benchmark on rows written to a file."""
    file = folder / f"{name}.jsonl"
    write_lines(file, rows)
    benchmark = BENCHMARKS[name]
    return benchmark.summarize(benchmark.read(str(file), None), rewards)
