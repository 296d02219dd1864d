"""The tables of an evaluation in a terminal: nothing is missing, and 100 columns are enough."""

import io
import json

import pytest
from rich.console import Console

from hafrm_ds.data.tables import MAX_SOURCES
from hafrm_ds.evaluation.analysis import analyse
from hafrm_ds.evaluation.calibration import correctness
from hafrm_ds.evaluation.figures import benchmark_table, render_evaluation, set_tables
from hafrm_ds.evaluation.report.results_page import analysis_charts
from tests.evaluation.benchmarks.rows import judgebench_row, rm_bench_row, summary
from tests.evaluation.report.folders import graded_scores, pair_scores


@pytest.fixture(scope="module")
def sets() -> dict:
    return {name: analyse(pair_scores(name, seed=seed)) for seed, name in enumerate(("held out", "pku_saferlhf"))}


def lines_of(content, width: int) -> list[str]:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(content)
    return console.export_text().splitlines()


def lines_of_sets(sets: dict, width: int) -> list[str]:
    return lines_of(render_evaluation({"sets": sets, "benchmarks": {}}), width)


def cells(lines: list[str], after: str) -> list[list[str]]:
    """Rows of the first table that begins in or after the line with this text."""
    start = next(number for number, line in enumerate(lines) if after in line)
    end = next(number for number in range(start, len(lines)) if lines[number].startswith("└"))
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines[start:end] if line.startswith("│")]


def shown(share: dict[str, float]) -> str:
    return f"{share['value']:.1%} [{100 * share['low']:.0f}, {100 * share['high']:.0f}]"


def test_the_first_table_has_all_sets_and_the_yardstick(sets):
    rows = cells(lines_of_sets(sets, 100), "accuracy")
    for name, found in sets.items():
        accuracies = [shown(found["accuracy"][judge]) for judge in ("reward", "implicit", "logprob")]
        assert [name, "60", *accuracies, shown(found["yardsticks"]["longer"])] in rows


def test_each_set_has_calibration_agreement_sources_and_yardsticks(sets):
    lines = lines_of_sets(sets, 150)
    for name, found in sets.items():
        of_set = lines[lines.index(name) :]
        calibration = found["calibration"]
        rows = {row[0]: row[1:] for row in cells(of_set, name)}
        for label, key in (
            ("expected calibration error (ECE)", "ece"),
            ("ECE at this temperature", "ece_at_temperature"),
        ):
            values = [calibration[judge][key] for judge in ("reward", "implicit")]
            assert rows[label] == [*("-" if value is None else f"{value:.1%}" for value in values), ""]
        agreement = found["agreement"]
        assert rows["agreement with implicit reward"] == [
            f"{agreement['reward/implicit']:.1%}", "-", f"{agreement['implicit/logprob']:.1%}"
        ]  # fmt: skip
        assert rows["ties"] == ["0", "0", "0"] and len(rows["mean margin"]) == 3
        part = found["by_source"]["forum"]
        assert ["forum", "30", *map(shown, part["accuracy"].values())] in cells(of_set, "accuracy by source")
        yardsticks = [[f"the {kind} answer", shown(share)] for kind, share in found["yardsticks"].items()]
        assert cells(of_set, "whoever always takes") == yardsticks


def test_a_hundred_columns_truncate_and_fold_no_figure(sets):
    narrow, wide = lines_of_sets(sets, 100), lines_of_sets(sets, 300)
    assert max(map(len, narrow)) <= 100 and "…" not in "".join(narrow)
    for name in sets:
        for table in (name, "accuracy, chosen longer by", "accuracy by source", "whoever always takes"):
            of_set = [cells(lines[lines.index(name) :], table) for lines in (narrow, wide)]
            figures = [[row[1:] for row in rows if any(row[1:])] for rows in of_set]
            assert figures[0] == figures[1] and figures[0]


def test_groups_have_comparisons_and_the_order_within_them():
    found = analyse(graded_scores())
    lines = lines_of_sets({"graded": found}, 100)
    assert max(map(len, lines)) <= 100 and "…" not in "".join(lines) and "pairs" not in "".join(lines)
    rows = {row[0]: row[1:] for row in cells(lines, "order within groups")}
    assert rows["top-1"] == [shown(found["ranking"][judge]["top_1"]) for judge in ("reward", "implicit", "logprob")]
    tau = found["ranking"]["reward"]["tau_b"]
    assert rows["Kendall's tau-b"][0] == f"{tau['value']:.4g} [{tau['low']:.3g}, {tau['high']:.3g}]"
    assert rows["NDCG"][0].startswith(f"{found['ranking']['reward']['ndcg']['value']:.3f}"[:4])


def test_one_head_has_yardsticks_and_nothing_to_agree_with():
    lines = lines_of_sets({"one": analyse(pair_scores("one", policy=False))}, 100)
    assert len(cells(lines, "accuracy")[0]) == 4 and "agreement" not in "".join(lines)


def test_a_set_of_one_source_has_no_table_by_source():
    scores = pair_scores("one")
    scores.sources[:] = ["alone"] * len(scores)
    assert "by source" not in "".join(lines_of_sets({"one": analyse(scores)}, 100))


# ---- benchmarks ------------------------------------------------------------------------------------------------------


def test_the_smallest_of_many_sources_share_a_row():
    scores = pair_scores()
    scores.sources = ["large"] * 20 + [f"small {number}" for number in range(len(scores) - 20)]
    analysis = analyse(scores)
    assert len(analysis["by_source"]) == 41
    table = set_tables(analysis)[-2]
    assert len(table.rows) == MAX_SOURCES
    name, (pairs, reward, *_) = table.rows[-1]
    assert (name, pairs.text) == ("22 other sources", "22")
    right = correctness(scores.margins("reward"))
    rest = [source not in dict(table.rows) for source in scores.sources]
    assert reward.text == f"{right[rest].mean():.1%}" and not reward.detail
    *_, chart = analysis_charts(scores, analysis)
    assert chart.title == "Accuracy by source" and "22 other sources (22)" in chart.svg and "large (20)" in chart.svg


def test_a_table_of_a_whole_benchmark(tmp_path):
    domains = ("chat", "math", "code", "safety-refuse", "safety-response")
    result = summary("rm-bench", tmp_path, [rm_bench_row(domain) for domain in domains], [[1, 3, 5, 0, 2, 4]] * 5)
    assert json.loads(json.dumps(result)) == result
    lines = lines_of(benchmark_table({"cut": 0, "judges": {"reward": result, "logprob": result}}), 100)
    rows = cells(lines, "questions")
    assert lines[0].strip() == "RM-Bench"
    assert ["Safety", "2", "66.7%", "66.7%"] in rows and ["Safety / safety-refuse", "1", "66.7%", "66.7%"] in rows
    assert ["Chat, hard", "", "0.0%", "0.0%"] in rows and ["overall", "5", "66.7%", "66.7%"] in rows


def test_a_table_says_what_is_missing_and_tied_and_reads_no_markup(tmp_path):
    rows = [judgebench_row("livecodebench-[red]x"), judgebench_row("livecodebench")]
    result = summary("judgebench", tmp_path, rows, [[1, 0], [1, 1]])
    lines = lines_of(benchmark_table({"cut": 2, "judges": {"reward": result}}), 100)
    rows = cells(lines, "questions")
    assert ["Coding / livecodebench-[red]x", "1", "100.0%"] in rows and ["overall", "2", "- (1 ties)"] in rows
    title = " ".join(" ".join(lines[:4]).split())
    assert "JudgeBench (2 questions with a cut prompt)" in title
    assert "no overall score without all of Knowledge, Reasoning, Math" in title
