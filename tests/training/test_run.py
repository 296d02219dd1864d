"""The order of a run's stages."""

import pytest
import torch.distributed as dist

from hafrm_ds.options import load_config
from hafrm_ds.training.processes import Processes
from hafrm_ds.training.run import train
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
