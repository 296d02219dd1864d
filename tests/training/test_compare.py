"""A comparison of methods: which trainings it takes, and what it leaves after each seed. The trainings are played."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from hafrm_ds.config import TrainConfig
from hafrm_ds.engine.deepspeed_config import load_config
from hafrm_ds.errors import ConfigError, DataError
from hafrm_ds.evaluation.report import writing
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.training import compare as comparison
from hafrm_ds.training.compare import options_file, train_and_compare
from hafrm_ds.training.sweep import arms_of, axes_of
from launch.compare import CompareOptions
from tests.evaluation.report.folders import pair_scores, training_rows, write_rows


def config_of(folder, **changes) -> TrainConfig:
    train = Path(folder) / "train.jsonl"
    train.write_text("pairs")
    given = {
        "output_dir": str(folder),
        "model": {"name_or_path": "some/model"},
        "data": {"train": str(train), "eval": {"held out": "held.jsonl"}},
    }
    return TrainConfig.model_validate(given | changes)


@pytest.fixture
def played(monkeypatch):
    """Trainings that leave what a run leaves at once: folder names, with the seeds and the page that were there before
    each."""
    seen = {}

    def train(run, start, port, processes):
        file, page = (run.output_dir.parents[1] / name for name in ("comparison.json", "report.html"))
        title = page.read_text().split("<h1>")[1].split("</h1>")[0] if page.exists() else None
        seen[run.output_dir.name] = json.loads(file.read_text())["seeds"] if file.exists() else None, title
        uses_policy = run.objective.uses_policy
        scores = pair_scores(policy=uses_policy, seed=run.seed)
        if not run.objective.uses_reward:
            scores = replace(scores, reward=None)
        scores.save(run.output_dir / "evaluation")
        write_rows(run.output_dir, training_rows(3, policy=uses_policy))
        (run.output_dir / "config.yaml").write_text(run.to_yaml())
        data = {"train": Path(run.data.train[0].path).read_text()}
        (run.output_dir / "summary.json").write_text(json.dumps({"steps": 3, "data": data}))

    monkeypatch.setattr(comparison, "train_in_child", train)
    monkeypatch.setattr(comparison, "pairs_seen", lambda arms: {arm.name: 640 for arm in arms})
    return seen


def start(config: TrainConfig, seeds: range, **how) -> dict:
    processes = Processes(rank=0, local_rank=0, world_size=1, store=dist.HashStore())
    train_and_compare(config, arms_of(config, axes_of(config, [], [], {})), seeds, Path("train.py"), processes, **how)
    return json.loads((config.output_dir / "comparison.json").read_text())


def test_results_are_written_after_every_seed(tmp_path, played, capsys):
    results = start(config_of(tmp_path), range(3, 5))
    arms = ("baseline", "dpo", "haf")
    assert played == {f"{arm}-seed3": (None, None) for arm in arms} | {
        f"{arm}-seed4": ([3], "3 methods, 1 of 2 seeds") for arm in arms
    }
    assert (results["seeds"], results["planned_seeds"]) == ([3, 4], [3, 4])
    assert "<h1>3 methods, 2 seeds</h1>" in (tmp_path / "report.html").read_text()
    printed = capsys.readouterr().out
    assert printed.count("Accuracy [95%]") == 1 and "the results of 1 of 2 seeds are in" in printed

    played.clear()
    results = start(config_of(tmp_path), range(3, 6))
    assert list(played) == [f"{arm}-seed5" for arm in arms] and results["seeds"] == [3, 4, 5]
    assert capsys.readouterr().out.count("is finished") == 6


def test_prompts_of_refusals_that_cannot_be_read_are_refused_before_the_first_training(tmp_path, played):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n')
    with pytest.raises(DataError, match=r"prompts\.jsonl:1: has no label"):
        start(config_of(tmp_path), range(1), refusals=[str(prompts)])
    assert not played


def test_data_that_changed_between_two_trainings_is_found(tmp_path, played):
    config = config_of(tmp_path)
    start(config, range(1))
    shutil.rmtree(tmp_path / "runs/haf-seed0")
    Path(config.data.train[0].path).write_text("other pairs")
    with pytest.raises(DataError, match=r"haf-seed0 has seen other pairs of train than \S+baseline-seed0"):
        start(config, range(1))


def test_a_page_that_cannot_be_drawn_costs_no_results(tmp_path, played, capsys, monkeypatch):
    def fail(folder):
        raise MemoryError("too many bins")

    monkeypatch.setattr(writing, "write_report", fail)
    assert start(config_of(tmp_path), range(1))["seeds"] == [0]
    printed = capsys.readouterr().out
    assert "no report was drawn: MemoryError('too many bins')" in printed and "haf - baseline" in printed
    assert not (tmp_path / "report.html").exists()


def test_numbers_of_the_command_line():
    def read_numbers(*words: str) -> CompareOptions:
        required = ["--output_dir", "o", "--model.name_or_path", "m", "--data.train", "a.jsonl"]
        return load_config([*required, *words], CompareOptions)

    options = read_numbers("--alphas", "[0.1, 2]", "--betas", "1e-2")
    assert options.alphas == [0.1, 2.0] and options.betas == [0.01]
    assert read_numbers("--alphas", "0.1", "2").alphas == [0.1, 2.0]
    assert type(options.run) is TrainConfig and "seeds" not in options.to_yaml()
    assert read_numbers("--seed", "5", "--seeds", "2").all_seeds == range(5, 7)
    assert read_numbers("--seed", "5", "--seeds", "3-22").all_seeds == range(3, 23)
    for text in ("22-3", "0", "3-", "-3", "1.5"):
        with pytest.raises(ConfigError, match="seeds: must be a whole number above 0, or a range as 3-22"):
            read_numbers("--seeds", text)
    sweep = read_numbers("--sweep", "{epochs: [1, 2.5], objective.beta: 0.1}").sweep
    assert sweep == {"epochs": [1, 2.5], "objective.beta": [0.1]}
    for text in ("[0.1, 0.2", "[a, b]", "", "{a: 1}", "[[1]]"):
        with pytest.raises(ConfigError, match="alphas"):
            read_numbers("--alphas", text)


def test_runs_whose_names_hold_a_dot_have_options_of_their_own(tmp_path):
    """Beside one another, by which a run can be repeated by hand."""
    runs = [SimpleNamespace(output_dir=tmp_path / f"haf-alpha{alpha}-seed0") for alpha in (0.1, 0.2)]
    assert [options_file(run).name for run in runs] == ["haf-alpha0.1-seed0.yaml", "haf-alpha0.2-seed0.yaml"]
