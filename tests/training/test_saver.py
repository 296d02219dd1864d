"""When a checkpoint is due and when a run stops, as one rank sees it."""

import errno
import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from hafrm_ds.engine.checkpoint import FileFacts, read_state, saved_steps, write_json
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.processes.stopping import Stopped
from hafrm_ds.training.logging import RunLog
from hafrm_ds.training.loop import Trainer
from hafrm_ds.training.resume import ResumePoint
from hafrm_ds.training.run_state import Best
from hafrm_ds.training.saver import CheckpointSaver
from tests.engine.test_checkpoint import state_at
from tests.training.test_resume import config_of


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A saver of a rank, and the steps that it saves."""

    def make(rank: int = 0, point: ResumePoint | None = None, **options) -> tuple[CheckpointSaver, list[int]]:
        evaluated = {"data__eval": "{hh: b.jsonl}", "evaluation__every_steps": 1}
        config = config_of(tmp_path, **evaluated, **{f"checkpoint__{name}": value for name, value in options.items()})
        saver = CheckpointSaver(config, None, Processes(rank, rank, 2, dist.HashStore()), None, {}, None, point)
        saved: list[int] = []

        def save() -> None:
            saved.append(saver.state.step)
            saver.last_step, saver.last_time = saver.state.step, time.monotonic()

        monkeypatch.setattr(saver, "save", save)
        return saver, saved

    return make


def run(saver: CheckpointSaver, num_steps: int) -> None:
    for step in range(1, num_steps + 1):
        saver.hear(saver.votes())
        saver.state.step = step
        saver.after_step()


@pytest.mark.parametrize(("every", "steps"), [(0, []), (1, [1, 2, 3, 4, 5, 6, 7]), (3, [3, 6])])
def test_saving_by_steps(make, every, steps):
    saver, saved = make(every_steps=every)
    run(saver, 7)
    assert saved == steps


@pytest.mark.parametrize(("minutes", "steps"), [(30, [1]), (0, [])])
def test_saving_by_time_from_the_last_save_on(make, minutes, steps):
    saver, saved = make(every_minutes=minutes)
    saver.last_time -= 31 * 60
    run(saver, 3)
    assert saved == steps


def test_only_the_clock_of_rank_0_counts(make):
    saver, _ = make(rank=1, every_minutes=30)
    saver.last_time -= 31 * 60
    assert saver.votes() == [0, 0]


def test_a_stop_of_another_rank_saves_and_ends_this_one(make):
    saver, saved = make()
    saver.hear([3.0, 0.0])
    saver.state.step = 4
    with pytest.raises(Stopped) as stopped:
        saver.after_step()
    assert saved == [4]
    assert (stopped.value.reason, stopped.value.step, stopped.value.checkpoint) == ("SIGTERM", 4, "step-000004")


def test_a_stop_before_the_first_step_saves_nothing(make):
    saver, saved = make()
    saver.hear([2.0, 0.0])
    with pytest.raises(Stopped) as stopped:
        saver.after_step()
    assert saved == []
    assert stopped.value.checkpoint is None


@pytest.mark.parametrize(("folder", "steps"), [("checkpoints", []), ("another/run/checkpoints", [2])])
def test_a_stop_before_the_first_new_step_saves_what_this_run_has_not_in_its_folder(make, tmp_path, folder, steps):
    saver, saved = make(point=ResumePoint(tmp_path / folder / "step-000002", state_at(2), ()))
    saver.state.step = 2
    saver.hear([3.0, 0.0])
    with pytest.raises(Stopped, match="--resume auto resumes from step-000002"):
        saver.after_step()
    assert saved == steps


@pytest.mark.parametrize(("final", "steps"), [("last", []), ("best", [2])])
def test_the_best_step_is_saved_for_a_final_that_is_made_of_it(make, final, steps):
    saver, saved = make(final=final)
    for step in (1, 2, 3):
        saver.state.step, saver.state.best = step, Best("hh/accuracy/reward", 0.5, step=2)
        saver.after_step()
    assert saved == steps


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Engine:
    """Saves and loads next to nothing."""

    stage, device, model = 2, torch.device("cpu"), SimpleNamespace(uses_stock_logits=False)

    def expected_checkpoint_bytes(self) -> int:
        return 0

    def save(self, folder: Path) -> dict[str, FileFacts]:
        return {f"{folder.name}/part.pt": write_json(folder / "part.pt", {})}

    def load(self, *source) -> None:
        pass


def train(folder: Path, point: ResumePoint | None = None, stop: bool = False) -> CheckpointSaver:
    """Run the loop for four steps, or until a signal in the second; every other step has an evaluation, the first of
    which is the best."""
    evaluated = {"data__eval": "{hh: b.jsonl}", "evaluation__every_steps": 2, "evaluation__at_start": False}
    config = config_of(folder, **evaluated, checkpoint__final="best", logging__tensorboard=False)
    processes = Processes(0, 0, 1, dist.HashStore())
    log = RunLog(config, processes)
    saver = CheckpointSaver(config, Engine(), processes, log, {}, "start", point)

    def train_step(step: int) -> dict[str, float]:
        saver.hear([3.0 if stop and step == 1 else 0.0, 0.0])
        return {}

    def evaluate(step: int) -> bool:
        if saver.stop_reason is not None:
            return False
        saver.state.last_evaluation = {"hh": {"accuracy/reward": 1 / step}}
        saver.state.judge = {"of step": step}
        saver.state.note_best(step)
        return True

    trainer = SimpleNamespace(config=config, saver=saver, state=saver.state, log=log, train_step=train_step)
    trainer.rank, trainer.num_steps, trainer.has_lost_patience = 0, 4, False
    trainer.evaluate, trainer.report = evaluate, lambda step, metrics: None
    try:
        Trainer.run(trainer)
    finally:
        log.close()
    return saver


def test_a_stop_before_the_best_evaluation_leaves_final_what_an_uninterrupted_run_does(one_process, tmp_path):
    straight = train(tmp_path / "straight")
    with pytest.raises(Stopped, match="--resume auto resumes from step-000002"):
        train(tmp_path / "resumed", stop=True)
    folder = tmp_path / "resumed/checkpoints/step-000002"
    assert read_state(folder).evaluation_is_due
    resumed = train(tmp_path / "resumed", ResumePoint(folder, read_state(folder), ()))
    assert not read_state(folder).evaluation_is_due
    for saver in (straight, resumed):
        assert saver.state.best.step == 2
        assert saver.restore_step(2)
        assert saver.state.last_evaluation == {"hh": {"accuracy/reward": 0.5}}
        assert saver.state.judge == {"of step": 2}
        rows = map(json.loads, (saver.config.output_dir / "metrics.jsonl").read_text().splitlines())
        assert [row["step"] for row in rows if row["kind"] == "checkpoint"] == [2]


def test_an_old_checkpoint_that_cannot_be_deleted_is_a_warning(one_process, tmp_path, monkeypatch, capsys):
    """As on NFS, where a folder whose file is still open somewhere is never empty."""
    config = config_of(tmp_path, checkpoint__every_steps=1, checkpoint__keep_last=1, logging__tensorboard="false")
    processes = Processes(0, 0, 1, dist.HashStore())
    remove = shutil.rmtree

    def rmtree(path: Path, ignore_errors: bool = False) -> None:
        if "step-000001" not in str(path):
            remove(path, ignore_errors=ignore_errors)
        elif not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    log = RunLog(config, processes)
    saver = CheckpointSaver(config, Engine(), processes, log, {}, "start", None)
    saver.begin()
    run(saver, 3)
    log.close()
    assert list(saved_steps(tmp_path / "checkpoints")) == [3]
    said = capsys.readouterr().out
    assert said.count("WARNING") == 1 and "Directory not empty" in said and "step-000001" in said
    rows = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [row["step"] for row in rows if row["kind"] == "checkpoint"] == [1, 2, 3]
