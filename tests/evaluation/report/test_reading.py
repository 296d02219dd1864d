"""Folders of runs and evaluations as data, whatever is missing or broken."""

import json
from pathlib import Path

import numpy as np
import pytest

from hafrm_ds.errors import DataError
from hafrm_ds.evaluation.pair_scores import SCORES_FOLDER
from hafrm_ds.evaluation.report.reading import by_step, differences, distinct_names, known, read_results
from tests.evaluation.report.folders import (
    NUM_PAIRS,
    pair_scores,
    training_rows,
    write_evaluation,
    write_rows,
    write_run,
)


def test_a_run_is_read_with_everything_in_it(tmp_path):
    results = read_results(write_run(tmp_path / "run"))
    assert results.is_run and results.name == "run" and results.state == "finished after 40 steps"
    assert len(results.training) == 40 and results.training["loss/reward"][2] == 0.69
    result = results.sets["held out"]
    assert result.overview["pairs"] == NUM_PAIRS and list(result.over_steps.index) == [0, 40]
    assert result.accuracy.keys() == {"reward", "implicit", "logprob"}
    assert result.accuracy["reward"]["low"] < result.accuracy["reward"]["value"] < result.accuracy["reward"]["high"]
    assert results.data["train"].total.kept == 1200


def test_the_state_of_a_run_that_has_not_ended(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "summary.json").unlink()
    assert read_results(folder).state.startswith("has not ended: step 40 was written at 20")
    stopped = {"reason": "SIGTERM", "step": 12, "checkpoint": "step-000012", "time": ""}
    (folder / "stopped.json").write_text(json.dumps(stopped))
    assert read_results(folder).state == "stopped by SIGTERM after step 12; --resume auto resumes from step-000012"


def test_a_run_that_has_only_begun(tmp_path):
    (tmp_path / "config.yaml").touch()
    results = read_results(tmp_path)
    assert results.state == "has written no row yet" and not results.config and not results.sets
    assert len(results.training) == 0


def test_accuracies_without_scores_are_those_of_the_last_row(tmp_path):
    rows = [{"step": step, "kind": "eval", "set": "x", "pairs": 9, "accuracy/reward": step / 10} for step in (0, 7)]
    write_rows(tmp_path, rows)
    result = read_results(tmp_path).sets["x"]
    assert (
        result.accuracy == {"reward": {"value": 0.7, "low": None, "high": None}}
        and result.overview["pairs"] == 9
        and result.analysis is None
    )


def test_a_last_line_that_is_being_written_is_left_out_and_another_is_named(tmp_path):
    write_rows(tmp_path, training_rows(3))
    whole = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(whole[:-20])
    assert list(read_results(tmp_path).training.index) == [1, 2]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "kind": "tr\n' + whole)
    with pytest.raises(DataError, match=r"metrics\.jsonl:1 is no row"):
        read_results(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train"}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:1 is no row.*step"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.yaml", "[1"),
        ("config.yaml", "- 1"),
        ("environment.json", "{"),
        ("data_report.json", '{"train": {"role": "train"}}'),
        ("summary.json", "7"),
        ("metrics.jsonl", b"\xff\xfe"),
        ("evaluation/held%20out.parquet", "nothing"),
    ],
)
def test_a_broken_file_is_named(tmp_path, file, content):
    folder = write_run(tmp_path / "run")
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=file.split("/")[-1]):
        read_results(folder)


def test_a_folder_that_holds_neither_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds neither a run \(metrics\.jsonl\) nor an evaluation"):
        read_results(tmp_path)


def test_a_score_that_is_not_finite_leaves_the_rest_of_the_run_to_read(tmp_path):
    folder = write_run(tmp_path / "run")
    scores = pair_scores()
    scores.reward[3, 0] = np.nan
    scores.save(folder / SCORES_FOLDER)
    result = read_results(folder).sets["held out"]
    assert result.analysis is None and "pairs.jsonl:3 is not finite" in result.problem
    assert "value" in result.accuracy["reward"]


def test_an_evaluation_is_read_and_a_set_without_its_parts_is_named(tmp_path):
    folder = write_evaluation(tmp_path)
    results = read_results(folder)
    assert not results.is_run and results.state == "org/scorer" and results.sets["arena"].overview["pairs"] == NUM_PAIRS
    content = json.loads((folder / "evaluation.json").read_text())
    del content["sets"]["arena"]["by_source"]
    (folder / "evaluation.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"evaluation\.json: the set arena has no by_source"):
        read_results(folder)


def test_rows_that_lack_a_figure_have_none_of_it():
    rows = by_step([{"step": 1, "kind": "train", "a": 2}, {"step": 5, "kind": "train", "b": 0.5, "c": "text"}])
    np.testing.assert_array_equal(rows["a"], [2, np.nan])
    np.testing.assert_array_equal(rows["b"], [np.nan, 0.5])
    assert list(rows.columns) == ["a", "b"] and list(rows.index) == [1, 5]
    assert list(known(rows, "a")) == [2] and known(rows, "c").size == 0
    assert len(by_step([])) == 0 and known(by_step([]), "a").size == 0


def test_names_tell_folders_apart():
    assert distinct_names([Path("/a/one"), Path("/a/two")]) == ["one", "two"]
    assert distinct_names([Path("/a/x/run"), Path("/a/y/run")]) == ["x/run", "y/run"]


def test_differences_name_nested_options_and_what_is_missing():
    one = {"seed": 0, "objective": {"alpha": 0.2, "beta": 0.1}}
    other = {"seed": 0, "objective": {"alpha": 0.0, "beta": 0.1}, "new": 1}
    assert differences([one, other]) == {"objective.alpha": [0.2, 0.0], "new": [None, 1]}
