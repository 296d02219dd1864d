"""launch/correct.py as it is run: killed by SIGKILL and started again, and read by the entry files of training."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.corrections.desk import desk, played
from tests.distributed.launching import REPOSITORY
from tests.rewards.scripted import Answer, scripted
from tests.tiny_models import save_tiny_final, save_tiny_model

pytestmark = pytest.mark.distributed

NUM_DIALOGUES = 100


def start(script: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, script, *map(str, arguments)]
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, **both)


def finished(process: subprocess.Popen) -> str:
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 0, printed[-4000:]
    return printed


def arguments(folder: Path, url: str) -> list[object]:
    folder.mkdir()
    (folder / "scenario.yaml").write_text(desk(folder / "out", url, dialogues=NUM_DIALOGUES, parallel=4).to_yaml())
    return ["--config", folder / "scenario.yaml"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("correct") / "one"
    with scripted(played()) as endpoint:
        finished(start("launch/correct.py", *arguments(folder, endpoint.url)))
    return folder / "out" / "pairs.jsonl"


def test_killed_and_started_again_no_dialogue_is_played_twice_and_the_rows_are_the_same(undisturbed, tmp_path):
    folder, script = tmp_path / "killed", played()
    with scripted(lambda body: Answer(script(body), seconds=0.02)) as endpoint:
        words = arguments(folder, endpoint.url)
        there = folder / "out" / "dialogues"
        for at_least in (15, 40):
            process = start("launch/correct.py", *words)
            until = time.monotonic() + 120
            while len(list(there.glob("0*.json"))) < at_least and time.monotonic() < until:
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
            process.communicate()
        kept = {file.name: file.stat().st_mtime_ns for file in there.glob("0*.json")}
        assert 40 <= len(kept) < NUM_DIALOGUES
        printed = finished(start("launch/correct.py", *words))
        assert f"{len(kept)} of {NUM_DIALOGUES} dialogues are there already" in printed
        assert all((there / name).stat().st_mtime_ns == time_ for name, time_ in kept.items())
        # What a kill has cut off is asked again, at most as many dialogues as were played at once.
        again = len(endpoint.requests) - len({json.dumps(each) for each in endpoint.requests})
        assert again <= 2 * 4 * 10
    assert (folder / "out" / "pairs.jsonl").read_bytes() == undisturbed.read_bytes()
    assert len(undisturbed.read_text().splitlines()) > NUM_DIALOGUES / 2


def test_sigterm_ends_it_at_once_and_it_resumes(undisturbed, tmp_path):
    script, is_slow = played(), threading.Event()
    # More than the 5 s of the scenario: each request is tried three times.
    with scripted(lambda body: Answer(script(body), seconds=8 if is_slow.is_set() else 0.05)) as endpoint:
        words = arguments(tmp_path / "stopped", endpoint.url)
        there = tmp_path / "stopped" / "out" / "dialogues"
        process = start("launch/correct.py", *words)
        while len(list(there.glob("0*.json"))) < 5 and process.poll() is None:
            time.sleep(0.02)
        is_slow.set()
        time.sleep(0.5)  # all requests of now are slow ones
        process.terminate()
        printed, _ = process.communicate(timeout=10)
        is_slow.clear()
        assert process.returncode == 75 and "stopped: SIGTERM" in printed
        finished(start("launch/correct.py", *words))
    assert (tmp_path / "stopped" / "out" / "pairs.jsonl").read_bytes() == undisturbed.read_bytes()


def test_sigterm_while_a_policy_draws_is_no_crash(tmp_path):
    final = save_tiny_final(tmp_path / "final")
    with scripted(played()) as endpoint:
        seats = desk(tmp_path, endpoint.url).model_dump()["seats"]
        seats["assistant"] |= {"endpoint": None, "model": str(final), "max_tokens": 100}
        scenario = desk(tmp_path / "out", endpoint.url, seats=seats, dialogues=NUM_DIALOGUES, parallel=4)
        (tmp_path / "scenario.yaml").write_text(scenario.to_yaml())
        process = start("launch/correct.py", "--config", tmp_path / "scenario.yaml")
        while not list((tmp_path / "out" / "dialogues").glob("0*.json")) and process.poll() is None:
            time.sleep(0.02)
        process.terminate()
        printed, _ = process.communicate(timeout=20)
    assert process.returncode == 75 and "stopped: SIGTERM" in printed


def test_training_and_inspection_take_the_pairs_as_they_are(undisturbed, tmp_path):
    save_tiny_model(tmp_path / "model")
    shared = ["--model.name_or_path", tmp_path / "model", "--model.dtype", "float32", "--data.train", undisturbed]
    shared += ["--data.max_length", "400", "--output_dir", tmp_path / "run", "--batch.global_batch_size", "4"]
    shared += ["--max_steps", "2", "--deepspeed", "ds_configs/zero0.json", "--reference.store", tmp_path / "store"]
    printed = finished(start("launch/inspect_data.py", *shared))
    assert "explicit_prompt" in printed
    finished(start("launch/train.py", *shared, "--batch.max_tokens_per_micro_batch", "1024"))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2]
