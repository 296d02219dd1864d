"""launch/score.py as it is run: killed and started again, on several processes, and sharded over them.

HAFRM_KILLS sets how many times it is killed, 1 by default.
"""

import json
import os
import random
from pathlib import Path

import pytest

from tests.distributed.forked_ranks import Ranks, run_ranks
from tests.distributed.launching import launch
from tests.tiny_models import save_tiny_final

pytestmark = pytest.mark.distributed

KILLS = int(os.environ.get("HAFRM_KILLS", "1"))
NUM_ROWS = 1000


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """(folder, function from the name of an output to the arguments)"""
    folder = tmp_path_factory.mktemp("score")
    save_tiny_final(folder / "final")
    source = random.Random(0)
    with (folder / "in.jsonl").open("w") as file:
        for number in range(NUM_ROWS):
            answers = ["".join(source.choice("abcd ") for _ in range(source.randrange(1, 60))) for _ in range(3)]
            file.write(json.dumps({"id": number, "prompt": answers[0], "responses": answers[1:]}) + "\n")
    shared = ["--model", str(folder / "final"), "--input", str(folder / "in.jsonl")]
    return folder, lambda output: [*shared, "--output", str(folder / output)]


def scores(file: Path) -> list[float]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["id"] for row in rows] == list(range(NUM_ROWS))
    return [score for row in rows for score in row["scores"]]


@pytest.fixture(scope="module")
def undisturbed(setting) -> Path:
    folder, arguments = setting
    run_ranks(1, "launch/score.py", *arguments("one.jsonl"))
    return folder / "one.jsonl"


def test_killed_and_started_again_every_row_is_there_once_with_the_same_value(setting, undisturbed):
    folder, arguments = setting
    parts, source = folder / "killed.jsonl.parts", random.Random(0)
    for _ in range(KILLS):
        target = len(list(parts.glob("part-*"))) + source.randrange(2, 5)
        ranks = Ranks("launch/score.py", arguments("killed.jsonl"), folder / "log")
        assert not ranks.wait(120, until=lambda target=target: len(list(parts.glob("part-*"))) >= target)
        ranks.kill()
    assert 0 < len(list(parts.glob("part-*"))) < -(-NUM_ROWS // 64)
    printed = run_ranks(2, "launch/score.py", *arguments("killed.jsonl"))
    assert "parts are there already" in printed
    assert (folder / "killed.jsonl").read_bytes() == undisturbed.read_bytes()


def test_a_model_that_is_sharded_over_the_processes_gives_the_same_scores(setting, undisturbed):
    folder, arguments = setting
    gather_all = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    (folder / "gather_all.json").write_text(json.dumps(gather_all))
    result = launch(
        2, "launch/score.py", *arguments("sharded.jsonl"), "--deepspeed", str(folder / "gather_all.json"), timeout=300
    )
    assert result.returncode == 0, result.stdout[-6000:]
    assert scores(folder / "sharded.jsonl") == pytest.approx(scores(undisturbed), abs=1e-5)
