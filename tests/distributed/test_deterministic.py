"""`deterministic: true` through the launcher: said at the start, and on a CPU no value changes."""

import json

import pytest

from tests.distributed.launching import as_options, launch, rows, run_jobs, write_pairs
from tests.distributed.test_training import final_weights
from tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.distributed

SAID = "deterministic algorithms are on (CUBLAS_WORKSPACE_CONFIG=:4096:8, NCCL_ALGO=^NVLS,NVLSTree)"


@pytest.fixture
def options(tmp_path):
    model = save_tiny_model(tmp_path / "model")
    train_file = write_pairs(tmp_path / "train.jsonl", 40)

    def of(name: str, **changes) -> list[str]:
        chosen = {
            "output_dir": tmp_path / name,
            "deepspeed": "ds_configs/zero2.json",
            "max_steps": 4,
            "model.name_or_path": model,
            "data.train": train_file,
            "data.max_length": 120,
            "batch.global_batch_size": 8,
            "batch.max_tokens_per_micro_batch": 150,
            "reference.store": tmp_path / f"store-{name}",
            "optimizer.learning_rate": 3e-3,
        }
        return as_options(chosen | changes)

    return of


def test_a_training_says_so_and_gives_the_same_weights(options, tmp_path):
    printed = run_jobs(1, [("train", options("plain")), ("train", options("deterministic", deterministic="true"))])
    assert printed.count(SAID) == 1
    losses = [[row["loss/total"] for row in rows(tmp_path / name, "train")] for name in ("plain", "deterministic")]
    assert len(losses[0]) == 4 and losses[0] == losses[1]
    plain, deterministic = (final_weights(tmp_path / name) for name in ("plain", "deterministic"))
    assert all(plain[name].equal(deterministic[name]) for name in plain | deterministic)


def test_an_environment_that_is_not_deterministic_ends_the_start(options, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    result = launch(1, "tests/distributed/job_cases.py", json.dumps([("train", options("x", deterministic="true"))]))
    assert result.returncode != 0 and "Traceback" not in result.stdout
    assert "error: deterministic is true, but the environment sets CUBLAS_WORKSPACE_CONFIG to ':0:0'" in result.stdout
