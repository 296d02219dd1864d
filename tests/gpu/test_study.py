"""tests/gpu/study.sh on a CPU: a tiny model and a few pairs travel in pieces, and the study is stopped and resumed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.launching import REPOSITORY, write_pairs
from tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.distributed

SCRIPT = REPOSITORY / "tests" / "gpu" / "study.sh"


def with_splits(path: Path, num_pairs: int, seed: int) -> Path:
    rows = [json.loads(line) for line in write_pairs(path, num_pairs, seed).read_text().splitlines()]
    split = ["test" if number % 3 == 0 else "train" for number in range(num_pairs)]
    path.write_text("".join(json.dumps(row | {"split": each}) + "\n" for row, each in zip(rows, split, strict=True)))
    return path


def study(*arguments: str | Path, **variables: str | Path) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": path} | {k: str(v) for k, v in variables.items()}
    command = [str(word) for word in ("bash", SCRIPT, *arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_the_study_travels_in_pieces_and_resumes(tmp_path):
    pairs = [with_splits(tmp_path / f"{name}.jsonl", 48, seed) for seed, name in enumerate(("near", "far"))]
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "weight.whl").write_bytes(b"PK\x05\x06" + bytes(18))  # a zip without files
    (tmp_path / "model").mkdir()
    save_tiny_model(tmp_path / "model")
    (tmp_path / "model" / "large.bin").write_bytes(os.urandom(3 * 2**20))
    packed = study(
        *("pack", tmp_path / "pieces", *pairs),
        **{"MODEL": tmp_path / "model", "WHEELS": tmp_path / "wheels", "PIECE_MIB": "1"},
    )
    assert packed.returncode == 0, packed.stdout + packed.stderr
    pieces = list((tmp_path / "pieces").iterdir())
    assert len(pieces) >= 4 and max(piece.stat().st_size for piece in pieces) <= 2**20

    options = ["--max_steps", "3", "--seeds", "1", "--alphas", "[1]", "--data.max_length", "120"]
    options += ["--model.dtype", "float32", "--batch.global_batch_size", "4"]
    out = tmp_path / "out"
    stopped = study("run", tmp_path / "pieces", *options, OUT=out, STUDY_SECONDS="10")
    assert stopped.returncode == 124, stopped.stdout[-4000:]
    assert "the same command resumes" in stopped.stdout
    resumed = study("run", tmp_path / "pieces", *options, OUT=out)
    assert resumed.returncode == 0, resumed.stdout[-4000:]
    trained = {run.name for run in (out / "runs").iterdir() if run.is_dir()}  # their options lie beside them
    assert trained == {"baseline-seed0", "dpo-seed0", "haf-seed0"}
    assert (out / "comparison.json").exists()
