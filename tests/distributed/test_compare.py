"""launch/compare.py as it is run: stopped by a signal, started again, and asked a third time."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from hafrm_ds.evaluation.pair_scores import load_all
from hafrm_ds.processes.stopping import STOPPED_STATUS
from tests.data.row_files import write_lines
from tests.distributed.launching import REPOSITORY, as_options, write_pairs
from tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.distributed


def start(folder, **changes) -> subprocess.Popen:
    options = {
        "output_dir": folder / "out",
        "deepspeed": "ds_configs/zero1.json",
        "max_steps": 20,
        "model.name_or_path": folder / "model",
        "model.dtype": "float32",
        "data.train": folder / "train.jsonl",
        "data.eval": f"{{near: {folder / 'near.jsonl'}, far: {folder / 'far.jsonl'}}}",
        "data.max_length": 120,
        "batch.global_batch_size": 8,
        "batch.max_tokens_per_micro_batch": 200,
        "optimizer.learning_rate": 1e-3,
        "reference.store": folder / "store",
        "evaluation.at_start": "false",
        "logging.tensorboard": "false",
        "logging.report": "false",
        "seeds": 1,
    }
    return subprocess.Popen(
        [sys.executable, "launch/compare.py", *as_options(options, **changes)],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "160"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_comparison_is_stopped_goes_on_and_is_not_done_twice(tmp_path):
    save_tiny_model(tmp_path / "model")
    for seed, (name, size) in enumerate((("train", 64), ("near", 30), ("far", 20))):
        write_pairs(tmp_path / f"{name}.jsonl", size, seed)
    runs = tmp_path / "out" / "runs"

    first = start(tmp_path)
    metrics, deadline = runs / "dpo-seed0" / "metrics.jsonl", time.monotonic() + 240
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    printed = first.communicate(timeout=120)[0]
    assert first.returncode == STOPPED_STATUS, printed[-4000:]
    assert printed.rstrip().endswith("stopped: SIGTERM; the same command resumes it")
    assert (runs / "baseline-seed0" / "summary.json").exists() and not (runs / "dpo-seed0" / "summary.json").exists()

    second = start(tmp_path)
    printed = second.communicate(timeout=300)[0]
    assert second.returncode == 0, printed[-4000:]
    assert "training 1 of 3" in printed and "baseline-seed0 is finished" in printed
    results = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert results["sets"] == ["near", "far"] and list(results["methods"]) == ["baseline", "dpo", "haf"]
    for name, judge, judges in (
        ("baseline", "reward", {"reward"}),
        ("dpo", "implicit", {"implicit", "logprob"}),
        ("haf", "reward", {"reward", "implicit", "logprob"}),
    ):
        scores = load_all(runs / f"{name}-seed0" / "evaluation")
        assert scores["far"].judges.keys() == judges and len(scores["far"]) == 20
        margins = scores["far"].margins(judge)
        accuracy = results["methods"][name]["accuracy"]["far"]["value"]
        assert accuracy == pytest.approx(((margins > 0) + 0.5 * (margins == 0)).mean())

    prompts = write_lines(
        tmp_path / "prompts.jsonl", [{"prompt": f"say {n}", "label": "safe" if n % 2 else "unsafe"} for n in range(20)]
    )
    third = start(tmp_path, refusals=prompts)
    printed = third.communicate(timeout=120)[0]
    assert third.returncode == 0 and printed.count("is finished") == 3 and "haf - baseline" in printed, printed[-4000:]
    refusals = json.loads((tmp_path / "out" / "refusals" / "refusals.json").read_text())
    assert list(refusals["arms"]) == ["start", "baseline-seed0", "dpo-seed0", "haf-seed0"]
    assert refusals["probes"]["openings"]["changes"]["haf-seed0"]["logit"]["shift"]["value"] != 0
    assert "What is refused" in (tmp_path / "out" / "report.html").read_text()
    changed = start(tmp_path, optimizer__learning_rate=2e-3)
    printed = changed.communicate(timeout=120)[0]
    assert changed.returncode == 1 and "baseline-seed0 holds a finished run with other options" in printed
    assert "optimizer.learning_rate: 0.001 there, 0.002 here" in printed


def test_a_sweep_trains_every_cell_once_and_shares_what_it_has_computed(tmp_path):
    save_tiny_model(tmp_path / "model")
    for seed, (name, size) in enumerate((("train", 32), ("near", 30), ("far", 20))):
        write_pairs(tmp_path / f"{name}.jsonl", size, seed)
    sweep = "{objective.policy_share: [0, 0.5], data.train.portion: [':16', ':32']}"
    changes = {"max_steps": 4, "sweep": sweep, "seeds": "4-5", "objective.alpha": "null", "objective.policy_share": 0.3}
    process = start(tmp_path, **changes)
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == 0, printed[-4000:]
    names = [f"{kind}-pairs{size}" for size in (16, 32) for kind in ("baseline", "haf-share0.5")]
    runs = sorted(each.name for each in (tmp_path / "out" / "runs").iterdir() if each.is_dir())
    assert runs == sorted(f"{name}-seed{seed}" for name in names for seed in (4, 5))
    kept = {name: json.loads((tmp_path / f"out/runs/{name}-seed4/data_report.json").read_text()) for name in names}
    assert [kept[name]["train"]["total"]["kept"] for name in names] == [16, 16, 32, 32]
    results = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert list(results["differences"]) == [f"haf-share0.5-pairs{size} - baseline-pairs{size}" for size in (16, 32)]
    assert [cell["labels"] for cell in results["cells"]] == [{"pairs": "16"}, {"pairs": "32"}]
    assert "gain over Baseline by pairs" in (tmp_path / "out" / "report.html").read_text()
    assert "8 trainings, which see 256 pairs in all" in printed and "0 trainings are left" in printed
    # The reference log-probs of the larger set are computed beside those of the smaller, and none twice.
    assert printed.count("reference log-probs found") == 2, printed
