"""A training of seconds for the clusters of these tests, and what a run that was cut short must equal."""

import json
from pathlib import Path

import torch

from tests.clusters.namespaces import say
from tests.distributed.launching import as_options, write_pairs
from tests.distributed.test_resume import compared_rows
from tests.distributed.test_training import final_weights
from tests.tiny_models import save_tiny_model


def write_setting(folder: Path) -> None:
    """The model and the data that `options` names."""
    save_tiny_model(folder / "model")
    write_pairs(folder / "train.jsonl", 200)
    write_pairs(folder / "test.jsonl", 40, seed=1)


def options(folder: Path, max_steps: int, **changes) -> list[str]:
    """All options but output_dir."""
    values = {
        "deepspeed": "ds_configs/zero3.json",
        "max_steps": max_steps,
        "model.name_or_path": folder / "model",
        "model.dtype": "float32",
        "data.train": folder / "train.jsonl",
        "data.eval": f"{{held_out: {folder / 'test.jsonl'}}}",
        "data.max_length": 120,
        "batch.global_batch_size": 8,
        "batch.max_tokens_per_micro_batch": 300,
        "optimizer.learning_rate": 1e-3,
        "reference.store": folder / "store",
        "logging.tensorboard": "false",
    }
    return as_options(values, **changes)


def steps(run: Path) -> int:
    """Of the last row that a run has written."""
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def show_equal(run: Path, straight: Path) -> None:
    """Rows of metrics and final weights, bit for bit."""
    rows, expected_rows = compared_rows(run), compared_rows(straight)
    assert rows == expected_rows, f"{run} and {straight} differ in the rows of metrics.jsonl"
    weights, expected = final_weights(run), final_weights(straight)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected), f"{run} and {straight}: weights differ"
    say(f"{run.name} equals {straight.name}: {len(rows)} rows of metrics, {len(weights)} tensors, bit for bit")
