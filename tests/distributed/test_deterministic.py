"""`deterministic: true` through the launcher: said at the start, and on a CPU no value changes."""

import pytest

from tests.distributed.forked_ranks import Ranks, run_cases
from tests.distributed.launching import as_options, rows, write_pairs
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
    printed = run_cases(1, [[options("plain"), None], [options("deterministic", deterministic="true"), None]])
    assert printed.count(SAID) == 1
    losses = [[row["loss/total"] for row in rows(tmp_path / name, "train")] for name in ("plain", "deterministic")]
    assert len(losses[0]) == 4 and losses[0] == losses[1]
    plain, deterministic = (final_weights(tmp_path / name) for name in ("plain", "deterministic"))
    assert all(plain[name].equal(deterministic[name]) for name in plain | deterministic)


def test_an_environment_that_is_not_deterministic_ends_the_start(options, tmp_path):
    words, log = options("x", deterministic="true"), tmp_path / "log"
    ranks = Ranks("launch/train.py", words, log, num_ranks=1, CUBLAS_WORKSPACE_CONFIG=":0:0")
    assert ranks.wait(120) and ranks.statuses == [1] and "Traceback" not in log.read_text()
    said = "error: deterministic is true, but the environment sets CUBLAS_WORKSPACE_CONFIG to ':0:0'"
    assert said in log.read_text()
