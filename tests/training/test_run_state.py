"""Which evaluation of a run is the best."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from hafrm_ds.training.run_state import Best, RunState
from tests.engine.test_checkpoint import state_at
from tests.training.test_resume import config_of


def test_the_best_evaluation_is_remembered_with_the_last():
    best = Best("held_out/accuracy/reward")
    for step, value in ((0, 0.9), (10, 0.6), (20, 0.8), (30, 0.8), (40, 0.7)):
        best.consider(step, value)
    assert (best.step, best.value) == (20, 0.8)
    assert (best.latest_step, best.latest_value) == (40, 0.7)


def test_evaluations_without_improvement_are_counted():
    best, counts = Best("hh/loss/reward"), []
    for step, value in enumerate((0.6, 0.7, 0.6, 0.5, 0.5, 0.4), start=1):
        best.consider(step, value)
        counts.append(best.evaluations_since)
    assert counts == [0, 1, 2, 0, 1, 0]


def test_a_value_that_is_no_number_is_never_the_best():
    best = Best("held_out/accuracy/reward")
    for step, value in ((1, math.nan), (2, 0.7), (3, math.nan)):
        best.consider(step, value)
    assert (best.step, best.value, best.evaluations_since) == (2, 0.7, 1)


@pytest.mark.parametrize(
    ("metric", "step"),
    [("hh/loss/reward", 20), ("hh/loss/policy", 20), ("hh/margin/implicit", 30), ("org/loss/accuracy/reward", 30)],
)
def test_a_loss_is_better_when_it_is_smaller(metric, step):
    best = Best(metric)
    for at, value in ((10, 0.6), (20, 0.3), (30, 0.9)):
        best.consider(at, value)
    assert best.step == step


@pytest.mark.parametrize(
    ("metric", "best"),
    [
        ("hh/loss/reward", Best("hh/loss/reward", 0.65, step=2, evaluations_since=1)),
        ("hh/accuracy/reward", Best("hh/accuracy/reward")),
    ],
)
def test_the_best_by_another_metric_is_not_carried_over(tmp_path, monkeypatch, metric, best):
    monkeypatch.setattr(dist, "get_rank", lambda: 0)

    def config(metric: str):
        return config_of(
            tmp_path, data__eval="{hh: b.jsonl}", evaluation__every_steps=2, evaluation__best_metric=metric
        )

    saved = replace(state_at(4), config=config("hh/loss/reward").model_dump(mode="json"))
    saved = replace(saved, best_step=2, best_value=0.65, evaluations_since_best=1)
    engine, log = SimpleNamespace(load=lambda *_: None), SimpleNamespace(start=lambda *_: None)
    state = RunState(engine, Best.of(config(metric)))
    state.restore(tmp_path, saved, config(metric), log)
    assert state.best == best
