"""The page of a comparison of methods: its own figures above the runs side by side."""

import re

import pytest

from hafrm_ds.errors import DataError
from hafrm_ds.evaluation.report.writing import write_comparison_report, write_report
from tests.evaluation.report.folders import write_comparison


def test_accuracies_and_paired_differences_stand_above_the_runs(tmp_path):
    write_comparison(tmp_path, {"baseline": [0.6, 0.7], "haf": [0.8, 0.7]}, range(2))
    page = write_report(tmp_path).read_text()
    assert (tmp_path / "report.html").read_text() == page
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))
    assert "2 methods, 2 seeds" in text and "In distribution: near. Out of distribution: far &lt;b&gt;" in text
    assert "haf - baseline" in text and "+10.0 [" in text and "+20.0 · +0.0" in text
    assert "haf, reward head 75.0%" in text
    assert text.index("Paired differences") < text.index("Overview") < text.index("Curves")
    runs = ["baseline-seed0", "haf-seed0", "baseline-seed1", "haf-seed1"]
    assert re.findall(r"<span>((?:baseline|haf)-seed\d)</span>", page)[:4] == runs
    assert "<b>" not in page.replace("far &lt;b&gt;", "")


def test_a_page_of_some_of_the_seeds_says_so(tmp_path):
    write_comparison(tmp_path, {"baseline": [0.6], "haf": [0.8]}, range(3))
    assert "<h1>2 methods, 1 of 3 seeds</h1>" in write_report(tmp_path, tmp_path / "elsewhere.html").read_text()


def test_what_is_no_comparison_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds neither a run"):
        write_report(tmp_path)
    (tmp_path / "comparison.json").write_text('{"seeds": [0]}')
    with pytest.raises(DataError, match=r"comparison\.json has no differences, methods, pairs, planned_seeds, sets"):
        write_report(tmp_path)
    with pytest.raises(DataError, match="holds a comparison of methods, which is drawn alone"):
        write_comparison_report([tmp_path, tmp_path], tmp_path / "page.html")
