"""Mixtures of experts through the launcher: families, layouts, ZeRO stages and numbers of ranks train the same model.

HAFRM_EXPERTS=all runs every family in every layout that it can, under every stage:

    HAFRM_EXPERTS=all python -m pytest tests/distributed/test_experts.py
"""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from hafrm_ds.saved.export import export_model
from hafrm_ds.training.final import export_checkpoint
from tests.distributed.forked_ranks import run_cases, run_ranks
from tests.distributed.launching import TINY_RUN, as_options, rows, write_pairs, write_stages
from tests.distributed.test_resume import assert_same_files, assert_same_run
from tests.distributed.test_training import final_weights, largest_difference
from tests.tiny_models import EXPERTS, save_tiny_model

pytestmark = pytest.mark.distributed

STEPS, STOP = 3, 2
ALL = os.environ.get("HAFRM_EXPERTS") == "all"
STAGES = range(4)
# (family, layout, stage) on two ranks; each is compared with the family on one, packed or padded, under stage 0.
USUAL = {
    *(("olmoe", "shared_prefix", stage) for stage in (0, 2, 3)),
    *(("qwen3-moe", "shared_prefix", 3), ("mixtral", "packed", 3), ("gpt-oss", "padded", 3)),
}
CASES = [
    (family, layout, stage)
    for family in EXPERTS
    for layout in ("shared_prefix", "packed", "padded")
    for stage in STAGES
    if (family != "gpt-oss" or layout == "padded") and (ALL or (family, layout, stage) in USUAL)
]
RESUMED = [(stage, stage) for stage in STAGES if ALL or stage == 3] + [(3, 2)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("experts")
    for family in EXPERTS:
        save_tiny_model(folder / family, family)
    train_file, test_file = write_pairs(folder / "train.jsonl", 40), write_pairs(folder / "test.jsonl", 6, seed=1)
    write_stages(folder)

    def options(name: str, family: str, layout: str, stage: int, **changes) -> list[str]:
        chosen = TINY_RUN | {
            "output_dir": folder / name,
            "deepspeed": folder / f"zero{stage}.json",
            "max_steps": STEPS,
            "model.name_or_path": folder / family,
            "model.router_aux_loss": "own",
            "data.train": train_file,
            "data.eval": f"{{held_out: {test_file}}}",
            "batch.max_tokens_per_micro_batch": 200,
            "batch.layout": layout,
            "optimizer.learning_rate": 3e-3,
            "reference.store": folder / "store",
        }
        return as_options(chosen, **changes)

    whole = [[options(f"{family} on one", family, "padded", 0), None] for family in EXPERTS]
    run_cases(1, [*whole, [options("without", "olmoe", "shared_prefix", 0, model__router_aux_loss="null"), None]])
    at_the_end = {"checkpoint__every_steps": STEPS}
    cases = [
        [options(f"{family} {layout} {stage}", family, layout, stage, **at_the_end), None]
        for family, layout, stage in CASES
    ]
    for before, after in RESUMED:
        name = f"resumed {before} {after}"
        cases.append([options(name, "olmoe", "shared_prefix", before), [STOP, 1, "SIGTERM"]])
        cases.append([options(name, "olmoe", "shared_prefix", after), None])
    recomputed = {"model__gradient_checkpointing": True, "model__dtype": "bfloat16"}
    cases.append([options("recomputed", "olmoe", "shared_prefix", 3, **recomputed), None])
    planted = (folder / "zero0.json", folder / "zero3.json")
    return folder, run_ranks(2, "tests/distributed/expert_cases.py", json.dumps(cases), *planted)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_what_one_trains(runs, case):
    folder, _ = runs
    family, layout, stage = case
    expected, actual = folder / f"{family} on one", folder / f"{family} {layout} {stage}"
    for name in ("loss/total", "loss/router", "grad_norm", "experts/largest_load", "experts/unused"):
        values = [[row[name] for row in rows(run, "train")] for run in (actual, expected)]
        assert len(values[0]) == STEPS
        torch.testing.assert_close(*map(torch.tensor, values), rtol=1e-4, atol=1e-6)
    assert largest_difference(final_weights(actual), final_weights(expected)) < 1e-3


def test_the_router_s_loss_is_in_the_total_by_the_model_s_own_weight(runs):
    folder, _ = runs
    first = rows(folder / "olmoe on one", "train")[0]
    without = rows(folder / "without", "train")[0]
    assert "loss/router" not in without and "experts/largest_load" in without
    assert first["loss/total"] == pytest.approx(without["loss/total"] + 0.01 * first["loss/router"], rel=1e-5)
    assert first["loss/router"] >= 2, "two experts a token: no less, where all get as many"
    assert 1 <= first["experts/largest_load"] <= 4 / 2


@pytest.mark.parametrize(("before", "after"), RESUMED)
def test_a_resumed_run_is_the_straight_run(runs, before, after):
    folder, _ = runs
    straight, resumed = folder / f"olmoe shared_prefix {before}", folder / f"resumed {before} {after}"
    if before == after:
        assert_same_run(resumed, straight)
    else:
        assert largest_difference(final_weights(resumed), final_weights(straight)) < 1e-4


@pytest.mark.parametrize("stage", [0, 3])
def test_the_last_checkpoint_is_exported_as_final_bit_for_bit(runs, tmp_path, stage):
    folder, _ = runs
    run = folder / f"olmoe shared_prefix {stage}"
    export_checkpoint(run / "checkpoints/latest", tmp_path / "export")
    assert_same_files(tmp_path / "export", run / "final")


def test_a_trained_mixture_is_exported_where_transformers_has_a_class_for_it(runs, tmp_path):
    folder, _ = runs
    final = folder / "mixtral packed 3/final"
    assert load_file(final / "model.safetensors").keys() == load_file(folder / "mixtral/model.safetensors").keys()
    exported = export_model(final, "sequence-classification", tmp_path / "classifier")
    assert exported.largest_difference < 1e-4
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")


def test_recomputed_layers_in_bfloat16_stay_near(runs):
    folder, _ = runs
    losses = [[row["loss/total"] for row in rows(folder / name, "train")] for name in ("recomputed", "olmoe on one")]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=0.05, atol=0)


def test_ranks_that_reach_other_experts_do_not_wait_for_one_another(runs):
    """Nor do experts that no rank reaches: the norms are those of whole parameters."""
    _, output = runs
    norms = [tuple(map(float, pair)) for pair in re.findall(r"^planted: ([\d.]+) ([\d.]+)$", output, re.MULTILINE)]
    assert len(norms) == 2
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
