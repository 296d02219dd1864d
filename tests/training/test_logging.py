"""What a run writes down."""

import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch.distributed as dist

from hafrm_ds.errors import UserError
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.training.logging import RunLog
from tests.training.test_resume import config_of


@pytest.fixture
def wandb(monkeypatch) -> list[dict]:
    """A stand-in for wandb, with the arguments of `init` that its documentation names; gives those of each run."""
    module, started = ModuleType("wandb"), []
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)

    class Run:
        def log(self, data: dict, step: int | None = None) -> None:
            started[-1].setdefault("logged", []).append((step, data))

        def finish(self) -> None:
            started[-1]["finished"] = True

    def init(
        entity=None, project=None, dir=None, id=None, name=None, notes=None, tags=None, config=None,
        config_exclude_keys=None, config_include_keys=None, allow_val_change=None, group=None, job_type=None, mode=None,
        force=None, reinit=None, resume=None, resume_from=None, fork_from=None, save_code=None, tensorboard=None,
        sync_tensorboard=None, monitor_gym=None, settings=None,
    ) -> Run:  # fmt: skip
        started.append({"project": project, "dir": dir, "id": id, "name": name, "resume": resume, "config": config})
        return Run()

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return started


def start(folder: Path, step: int) -> None:
    config = config_of(folder, logging__wandb_project="preferences", logging__tensorboard=False)
    log = RunLog(config, Processes(0, 0, 1, dist.HashStore()))
    log.start(config, step)
    log.metrics("eval", step + 1, {"accuracy/reward": 0.5}, set="held_out")
    log.close()


def test_a_resumed_run_stays_one_run_of_wandb(tmp_path, wandb):
    for name, step in (("a", 0), ("a", 4), ("a", 8), ("b", 0), ("a", 0)):
        start(tmp_path / name, step)
    first, second, third, other, anew = wandb
    assert first["id"] == second["id"] == third["id"]
    assert len({first["id"], other["id"], anew["id"]}) == 3
    assert first["name"] == "a" and other["name"] == "b"
    assert first["dir"] == tmp_path / "a" and first["project"] == "preferences"
    assert {run["resume"] for run in wandb} == {"allow"}
    assert first["config"]["logging"]["wandb_project"] == "preferences"
    assert second["logged"] == [(5, {"eval/held_out/accuracy/reward": 0.5})]
    assert all(run["finished"] for run in wandb)


def test_a_run_from_before_the_id_was_kept_gets_one(tmp_path, wandb):
    start(tmp_path, 4)
    start(tmp_path, 6)
    assert wandb[0]["id"] == wandb[1]["id"] != ""


@pytest.mark.parametrize("resume", ["none", "auto"])
def test_a_config_of_somebody_is_not_written_over(tmp_path, resume):
    config, file = config_of(tmp_path, resume=resume, logging__tensorboard=False), tmp_path / "config.yaml"
    file.write_text("# my own recipe\n")
    with pytest.raises(UserError, match=r"holds a config\.yaml and no run, .* give that file another name"):
        RunLog(config, Processes(0, 0, 1, dist.HashStore()))
    assert file.read_text() == "# my own recipe\n"
    file.unlink()
    for _ in range(2):  # one that was killed before its first row starts again
        log = RunLog(config, Processes(0, 0, 1, dist.HashStore()))
        log.start(config, 0)
        log.close()
