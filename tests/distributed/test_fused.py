"""Fused functions and compiled layers through the launcher: the numbers of a run without them."""

from pathlib import Path

import pytest

from tests.distributed.forked_ranks import run_cases
from tests.distributed.launching import as_options, rows, write_pairs, write_stages
from tests.distributed.test_training import final_weights, largest_difference
from tests.tiny_models import save_tiny_model

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

LORA = {"model.lora.rank": 4}
CHECKPOINTING = {"model.gradient_checkpointing": True}
# Name -> (model.fused, ZeRO stage, options, the run that it must equal).
FUSED = {
    "functions-zero3": ("compile", 3, {}, "stock"),
    "functions-zero3-lora": ("compile", 3, LORA | CHECKPOINTING, "stock-lora"),
    "layers-zero2": ("compile_layers", 2, CHECKPOINTING, "stock"),
    "layers-zero1-lora": ("compile_layers", 1, LORA, "stock-lora"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, str]:
    """The folder of all runs, and what they printed."""
    folder = tmp_path_factory.mktemp("fused")
    model = save_tiny_model(folder / "model")
    train_file, test_file = write_pairs(folder / "train.jsonl", 30), write_pairs(folder / "test.jsonl", 8, seed=1)
    write_stages(folder)

    def job(name: str, fused: str, stage: int, changes: dict) -> list:
        chosen = {
            "output_dir": folder / name,
            "deepspeed": folder / f"zero{stage}.json",
            "max_steps": 3,
            "model.name_or_path": model,
            "model.dtype": "float32",
            "model.fused": fused,
            "data.train": train_file,
            "data.eval": f"{{held_out: {test_file}}}",
            "data.max_length": 120,
            "batch.global_batch_size": 8,
            "batch.max_tokens_per_micro_batch": 150,
            "optimizer.learning_rate": 1e-2,
            "reference.store": folder / "store",
            "logging.tensorboard": "false",
            "logging.report": "false",
        }
        return [as_options(chosen | changes), None]

    stock = [job("stock", "auto", 0, {}), job("stock-lora", "off", 0, LORA)]
    return folder, run_cases(2, stock + [job(name, *how[:3]) for name, how in FUSED.items()])


@pytest.mark.parametrize("name", FUSED)
def test_a_run_has_the_numbers_of_one_without(runs, name):
    folder, _ = runs
    stock = folder / FUSED[name][3]
    assert largest_difference(final_weights(folder / name), final_weights(stock)) < 1e-3
    for kind in ("train", "eval"):
        losses = [
            [value for row in rows(run, kind) for key, value in row.items() if key.endswith("loss/reward")]
            for run in (folder / name, stock)
        ]
        assert len(losses[0]) >= 2
        assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_what_is_fused_is_told_and_compared(runs):
    _, printed = runs
    assert "fused layers: none" in printed
    assert "fused layers: RMSNorm, gated MLP, rotary embedding by compile" in printed
    assert "fused layers: LlamaDecoderLayer by compile_layers" in printed
    assert printed.count("fused against LlamaForCausalLM's own layers") == len(FUSED)
