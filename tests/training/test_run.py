"""The order of a run's stages, and the report at its end."""

import pytest
import torch.distributed as dist

from hafrm_ds.engine.deepspeed_config import load_config
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.training.logging import RunLog
from hafrm_ds.training.run import leave_report, train
from tests.distributed.launching import write_pairs
from tests.tiny_models import save_tiny_model


class GroupStarted(Exception):
    pass


def test_data_is_ready_before_the_process_group_is_started(tmp_path, monkeypatch):
    """Tokenising may take an hour; ranks that wait for it inside a collective would time out."""

    def start_group(processes: Processes) -> None:
        assert (tmp_path / "run/data_report.json").exists()
        assert not dist.is_initialized()
        raise GroupStarted

    monkeypatch.setattr(Processes, "start_group", start_group)
    options = {
        "output_dir": tmp_path / "run",
        "model.name_or_path": save_tiny_model(tmp_path / "model"),
        "data.train": write_pairs(tmp_path / "pairs.jsonl", 10),
        "data.eval": write_pairs(tmp_path / "held_out.jsonl", 5, seed=1),
        "data.cache_dir": tmp_path / "cache",
        "batch.global_batch_size": 4,
        "logging.tensorboard": False,
    }
    config = load_config([word for name, value in options.items() for word in (f"--{name}", str(value))])
    with pytest.raises(GroupStarted):
        train(config, Processes(0, 0, 1, dist.HashStore()))


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
