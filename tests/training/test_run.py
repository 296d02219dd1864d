"""The order of a run's stages, and the report at its end."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from hafrm_ds.config import ObjectiveConfig
from hafrm_ds.data.report import GroupFacts
from hafrm_ds.engine.deepspeed_config import load_config
from hafrm_ds.errors import DataError, ModelError, UserError
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.training.logging import RunLog
from hafrm_ds.training.run import check_orders, leave_report, precompute_reference, train
from tests.distributed.launching import write_pairs
from tests.tiny_models import save_tiny_model


class GroupStarted(Exception):
    pass


def options_of(tmp_path, **more) -> list[str]:
    options = {
        "output_dir": tmp_path / "run",
        "model.name_or_path": save_tiny_model(tmp_path / "model"),
        "data.train": write_pairs(tmp_path / "pairs.jsonl", 10),
        "data.eval": write_pairs(tmp_path / "held_out.jsonl", 5, seed=1),
        "data.cache_dir": tmp_path / "cache",
        "batch.global_batch_size": 4,
        "logging.tensorboard": False,
    }
    return [word for name, value in (options | more).items() for word in (f"--{name}", str(value))]


def test_margins_that_cannot_be_read_stop_a_run_that_uses_margins_alone(tmp_path, monkeypatch):
    def start_group(processes: Processes) -> None:
        raise GroupStarted

    monkeypatch.setattr(Processes, "start_group", start_group)
    rows = [{"prompt": f"p{n}", "chosen": "a", "rejected": "b", "margin": "much" if n == 6 else n} for n in range(8)]
    (tmp_path / "margins.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for use_margin, stop in ((True, DataError), (False, GroupStarted)):
        more = {"data.train": tmp_path / "margins.jsonl", "objective.use_margin": use_margin}
        with pytest.raises(stop) as caught:
            train(load_config(options_of(tmp_path, **more)), Processes(0, 0, 1, dist.HashStore()))
        if use_margin:
            assert str(caught.value).startswith("objective.use_margin is true, but ")
            assert "margins.jsonl:7: field 'margin' is the text 'much', expected a finite number" in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("model.attention", "fa3", "it needs an NVIDIA GPU, not cpu. Set it to auto"),
        ("model.log_probs", "triton", "it runs on GPUs, not on cpu|the package triton is not installed"),
        ("model.fused", "liger", "the package liger_kernel is not installed|it runs on GPUs, not on cpu"),
    ],
)
def test_what_this_machine_cannot_run_is_refused_before_data_is_read(tmp_path, monkeypatch, option, value, reason):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    config = load_config(options_of(tmp_path, **{option: value}))
    for job in (train, precompute_reference):
        with pytest.raises(ModelError, match=rf"{option} {value} cannot be used: ({reason})"):
            job(config, Processes(0, 0, 1, dist.HashStore()))
    assert not (tmp_path / "cache").exists()
    padded = {option: value, "batch.layout": "padded", "data.train": tmp_path / "nothing.jsonl"}
    if option == "model.attention":  # under which no kernel of ours runs
        with pytest.raises(DataError, match=r"nothing\.jsonl"):
            train(load_config(options_of(tmp_path, **padded)), Processes(0, 0, 1, dist.HashStore()))


def test_an_attribute_that_no_row_has_is_refused_by_name(tmp_path):
    rows = [
        {"prompt": f"p{n}", "chosen": "a", "rejected": "b", "attributes": [{"helpful": n}, {"helpful": None}]}
        for n in range(8)
    ]
    (tmp_path / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = {"data.train": tmp_path / "rated.jsonl", "model.attributes": "[helpful, helpfulness, clear]"}
    said = r"names helpfulness, clear, of which none of the 8 pairs of data.train has a value .* \(known: helpful\)"
    with pytest.raises(DataError, match=said):
        train(load_config(options_of(tmp_path, **more)), Processes(0, 0, 1, dist.HashStore()))


def test_the_best_by_both_heads_needs_enough_prompts(tmp_path):
    more = {"data.eval": f"{{held: {write_pairs(tmp_path / 'few.jsonl', 20)}}}"}
    more["evaluation.best_metric"] = "held/accuracy/combined"
    with pytest.raises(
        DataError, match=r"best_metric is held/accuracy/combined, but .*, held, 20 pairs of \d+ prompts"
    ):
        train(load_config(options_of(tmp_path, **more)), Processes(0, 0, 1, dist.HashStore()))


def test_a_finished_run_is_not_resumed_with_other_options(tmp_path, capsys):
    config = load_config(options_of(tmp_path, resume="auto", max_steps=5))
    config.output_dir.mkdir()
    (config.output_dir / "config.yaml").write_text(config.to_yaml())
    (config.output_dir / "summary.json").write_text("{}")
    train(config, Processes(0, 0, 1, dist.HashStore()))
    assert "is finished (summary.json): there is nothing to resume" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"(?s)finished with other options:.*max_steps: 5 there, 8 here.*allow_changed"):
        train(load_config(options_of(tmp_path, resume="auto", max_steps=8)), Processes(0, 0, 1, dist.HashStore()))


def test_data_is_ready_before_the_process_group_is_started(tmp_path, monkeypatch):
    """Tokenising may take an hour; ranks that wait for it inside a collective would time out."""

    def start_group(processes: Processes) -> None:
        assert (tmp_path / "run/data_report.json").exists()
        assert not dist.is_initialized()
        raise GroupStarted

    monkeypatch.setattr(Processes, "start_group", start_group)
    with pytest.raises(GroupStarted):
        train(load_config(options_of(tmp_path)), Processes(0, 0, 1, dist.HashStore()))


def test_a_report_that_cannot_be_drawn_is_a_warning(tmp_path, capsys):
    options = {"output_dir": tmp_path, "model.name_or_path": "any", "data.train": "any", "logging.tensorboard": False}
    config = load_config([word for name, value in options.items() for word in (f"--{name}", str(value))])
    log = RunLog(config, Processes(0, 0, 1, dist.HashStore()))
    leave_report(config, log)
    assert not (tmp_path / "report.html").exists()  # nothing was run
    log.start(config, 0)
    log.metrics("train", 1, {"loss/total": 0.5})
    leave_report(config, log)
    assert "has not ended: step 1" in (tmp_path / "report.html").read_text()
    (tmp_path / "environment.json").write_text("{")
    leave_report(config, log)
    log.close()
    shown = capsys.readouterr().out
    assert f"report: {tmp_path / 'report.html'}" in shown
    assert "WARNING no report was drawn: DataError" in shown and "environment.json" in shown


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"contradictory": 2}, "2 groups whose comparisons contradict one another"),
        (
            {"partial": 1, "soft": 3},
            "1 groups that have a part of the comparisons of their order and 3 comparisons with",
        ),
        ({}, None),
    ],
)
def test_the_loss_of_whole_orders_refuses_what_makes_none(fault, words):
    known = {"answers": 9, "comparisons": 9, "sizes": {"3": 3}, "soft": 0, "contradictory": 0, "partial": 0, "lost": {}}
    sets = {"eval x": SimpleNamespace(report=SimpleNamespace(groups=GroupFacts(**known | fault)))}
    check_orders(sets, ObjectiveConfig())
    with pytest.raises(DataError, match=words) if words else nullcontext():
        check_orders(sets, ObjectiveConfig(ranking_loss="plackett_luce"))
