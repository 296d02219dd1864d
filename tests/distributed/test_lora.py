"""LoRA through the launcher: every ZeRO stage, stopped and resumed, on the reference of full training."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hafrm_ds.saved.adapters import ADAPTER_WEIGHTS, PEFT_PREFIX, merged
from hafrm_ds.training.final import export_checkpoint
from tests.distributed.forked_ranks import run_cases
from tests.distributed.launching import TINY_RUN, as_options, rows, write_pairs, write_stages
from tests.distributed.test_resume import assert_same_run
from tests.distributed.test_training import final_weights, largest_difference
from tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.distributed

STEPS, STOP = 6, 4
RANK, ALPHA = 4, 32.0
LORA = {"model.lora.rank": RANK, "model.lora.alpha": ALPHA}
DROPOUT = {"model.lora.dropout": 0.3, "model.dtype": "bfloat16"}
BASELINE = {"objective.alpha": 0, "model.lora.targets": "[q_proj, up_proj]", "model.gradient_checkpointing": True}
# Name -> (stage before, stage after being stopped, options).
RESUMED = {
    **{f"stage {stage}": (stage, stage, {}) for stage in range(4)},
    "stage 3 to 2": (3, 2, {}),
    **{f"dropout, stage {stage}": (stage, stage, DROPOUT) for stage in (0, 3)},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    model = save_tiny_model(folder / "model")
    train_file, test_file = write_pairs(folder / "train.jsonl", 40), write_pairs(folder / "test.jsonl", 10, seed=1)
    write_stages(folder)

    def options(name: str, stage: int, changes: dict) -> list[str]:
        chosen = TINY_RUN | {
            "output_dir": folder / name,
            "deepspeed": folder / f"zero{stage}.json",
            "max_steps": STEPS,
            "model.name_or_path": model,
            "data.train": train_file,
            "data.eval": f"{{held_out: {test_file}}}",
            "optimizer.learning_rate": 1e-2,
            "evaluation.every_steps": 3,
            "reference.store": folder / "store",
        }
        return as_options(chosen | changes)

    cases = [[options("full", 3, {}), None]]
    for name, (before, after, changes) in RESUMED.items():
        straight = options(f"straight {name}", before, LORA | changes | {"checkpoint.every_steps": STEPS})
        if before == after:
            cases.append([straight, None])
        cases.append([options(name, before, LORA | changes), [STOP, 1, "SIGTERM"]])
        cases.append([options(name, after, LORA | changes), None])
    checkpointed = {"model.gradient_checkpointing": True}
    cases.append([options("checkpointed", 3, LORA | checkpointed), None])
    selective = {"model.gradient_checkpointing": "selective"}
    cases.append([options("selective", 3, LORA | selective), None])
    cases.append([options("baseline", 3, LORA | BASELINE), None])
    run_cases(2, cases)
    return folder


def losses(run: Path) -> torch.Tensor:
    return torch.tensor([row["loss/total"] for row in rows(run, "train")])


@pytest.mark.parametrize("name", [name for name, (before, after, _) in RESUMED.items() if before == after])
def test_a_resumed_run_is_the_straight_run_bit_for_bit(runs, name):
    straight, resumed = runs / f"straight {name}", runs / name
    assert len(rows(straight, "train")) == STEPS
    assert_same_run(resumed, straight)


@pytest.mark.parametrize(
    "name", ["straight stage 0", "straight stage 1", "straight stage 2", "stage 3 to 2", "checkpointed"]
)
def test_stages_and_gradient_checkpointing_train_the_same_adapters(runs, name):
    torch.testing.assert_close(losses(runs / name), losses(runs / "straight stage 3"), rtol=1e-4, atol=0)
    assert largest_difference(final_weights(runs / name), final_weights(runs / "straight stage 3")) < 1e-4


def test_selective_recomputation_changes_no_bit(runs):
    assert torch.equal(losses(runs / "selective"), losses(runs / "straight stage 3"))
    expected, actual = final_weights(runs / "straight stage 3"), final_weights(runs / "selective")
    assert all(torch.equal(actual[tensor], expected[tensor]) for tensor in expected)


def test_the_reference_of_full_training_is_found_and_no_other_is_made(runs):
    """The first run computed it; those in bfloat16 have one of their own."""
    assert len(list((runs / "store").iterdir())) == 2
    assert "check" not in {row["kind"] for row in rows_of_all_kinds(runs / "full")}
    (check,) = rows(runs / "straight stage 3", "check")
    assert check["reference/largest_difference"] < 1e-3
    start = rows(runs / "straight stage 3", "eval")[0]
    assert (start["margin/implicit"], start["ties/implicit"]) == (0, start["pairs"])
    assert start["accuracy/reward"] == rows(runs / "full", "eval")[0]["accuracy/reward"]


@pytest.mark.parametrize("name", ["straight stage 0", "straight stage 2", "straight stage 3"])
def test_the_last_checkpoint_is_exported_as_final_bit_for_bit(runs, tmp_path, name):
    """Merged, and the adapter; the order of the layers' names in its configuration is that of a set."""
    export_checkpoint(runs / name / "checkpoints/latest", tmp_path / "export")
    for file in ("model.safetensors", "reward_head.safetensors", "hafrm.json", f"adapter/{ADAPTER_WEIGHTS}"):
        assert (tmp_path / "export" / file).read_bytes() == (runs / name / "final" / file).read_bytes(), file


def rows_of_all_kinds(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_it_learns(runs):
    values = losses(runs / "straight stage 3")
    assert values[-1] < 0.9 * values[0]


@pytest.mark.parametrize(("name", "adapted"), [("straight stage 3", 7 * 2), ("baseline", 2 * 2)])
def test_final_is_the_base_with_the_adapter_merged_in(runs, name, adapted):
    base, final = load_file(runs / "model/model.safetensors"), final_weights(runs / name)
    adapter = load_file(runs / name / "final/adapter" / ADAPTER_WEIGHTS)
    assert len(adapter) == 2 * adapted
    changed = {tensor for tensor in base if not torch.equal(base[tensor], final[tensor])}
    assert len(changed) == adapted
    for tensor in changed:
        a, b = (adapter[f"{PEFT_PREFIX}{tensor.removesuffix('weight')}lora_{side}.weight"] for side in "AB")
        assert torch.equal(final[tensor], merged(base[tensor], a, b, ALPHA / RANK)), tensor


@pytest.mark.parametrize("stage", range(4))
def test_checkpoints_hold_nothing_frozen(runs, stage):
    checkpoint = runs / f"stage {stage}/checkpoints/latest"
    states = [torch.load(file, weights_only=False) for file in checkpoint.glob("deepspeed/*model_states.pt")]
    names = {name for state in states for name in state["module"]}
    assert "reward_head.weight" in names
    assert {name.split(".")[-3] for name in names - {"reward_head.weight"}} == {"lora_A", "lora_B"}
    assert not any(state.get("frozen_param_fragments") for state in states)


def test_frozen_weights_cost_no_gradient_in_the_utilisation(runs):
    operations = []
    for name in ("full", "straight stage 3"):
        row, peak = rows(runs / name, "train")[0], json.loads((runs / name / "summary.json").read_text())
        operations.append(row["mfu"] * row["seconds"] * peak["peak_flops_per_process"])
    assert operations[1] < 0.9 * operations[0]
