"""The tables of an evaluation in a terminal: nothing is missing, and 100 columns are enough."""

import io

import pytest
from rich.console import Console

from hafrm_ds.evaluation.analysis import analyse
from hafrm_ds.evaluation.terminal import render_evaluation
from tests.evaluation.report.folders import pair_scores


@pytest.fixture(scope="module")
def sets() -> dict:
    return {name: analyse(pair_scores(name, seed=seed)) for seed, name in enumerate(("held out", "pku_saferlhf"))}


def lines_of(sets: dict, width: int) -> list[str]:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(render_evaluation({"sets": sets, "benchmarks": {}}))
    return console.export_text().splitlines()


def cells(lines: list[str], table: str) -> list[list[str]]:
    """Rows of the table whose first column is called so."""
    start = next(number for number, line in enumerate(lines) if table in line)
    end = next(number for number in range(start, len(lines)) if lines[number].startswith("└"))
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines[start:end] if line.startswith("│")]


def shown(share: dict[str, float]) -> str:
    return f"{share['value']:.1%} [{100 * share['low']:.0f}, {100 * share['high']:.0f}]"


def test_yardsticks_and_agreement_are_those_of_the_analysis(sets):
    rows = cells(lines_of(sets, 100), "Yardsticks [95%]")
    for name, found in sets.items():
        expected = [shown(found["yardsticks"][kind]) for kind in ("longer", "shorter")]
        expected += [
            f"{found['agreement'][pair]:.1%}" for pair in ("reward/implicit", "reward/logprob", "implicit/logprob")
        ]
        assert [name, *expected] in rows


def test_calibration_has_both_scores_at_the_fitted_temperature(sets):
    rows = cells(lines_of(sets, 100), "Calibration")
    for name, found in sets.items():
        values = found["calibration"]["reward"]
        at_temperature = [f"{values[key]:.3f}" for key in ("ece_at_temperature", "brier_at_temperature")]
        assert [name, "reward head"] in [row[:2] for row in rows] and at_temperature in [row[-2:] for row in rows]


def test_a_hundred_columns_cut_and_fold_no_figure(sets):
    narrow, wide = lines_of(sets, 100), lines_of(sets, 300)
    assert max(map(len, narrow)) <= 100 and "…" not in "".join(narrow)
    for table in ("Accuracy [95%]", "Yardsticks [95%]", "Calibration"):
        assert cells(narrow, table) == cells(wide, table)


def test_one_head_has_yardsticks_and_nothing_to_agree_with():
    lines = lines_of({"one": analyse(pair_scores("one", policy=False))}, 100)
    assert len(cells(lines, "Yardsticks [95%]")[0]) == 3 and "agree" not in "".join(lines)
