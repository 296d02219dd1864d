"""The plan of a run, from shapes alone."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from hafrm_ds.capacity.plan import Machines, Plan
from hafrm_ds.capacity.planner import lengths_of_sets, uniform_sets, workload_of
from hafrm_ds.capacity.shapes import count_parameters, model_of_shapes
from hafrm_ds.capacity.workload import counts
from hafrm_ds.data.lengths import GroupLengths, starts_of
from hafrm_ds.data.packing import lay_out
from hafrm_ds.engine.deepspeed_config import load_config
from hafrm_ds.errors import ConfigError, ModelError, run_alone
from hafrm_ds.hardware.devices import DEVICES, Device, find_device
from hafrm_ds.hardware.flops import ForwardCost
from tests.distributed.launching import write_pairs
from tests.tiny_models import random_items, save_tiny_model, tiny_hybrid

sys.path.append(str(Path(__file__).parents[2] / "launch"))
import plan as command  # launch/plan.py

LLAMA_405B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
LLAMA_8B = LLAMA_405B | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}


def folder_of(tmp_path: Path, shape: dict) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(shape))
    return tmp_path


def planned(
    folder: Path, *options: str, device: str = "h100", gpus: int = 8, nodes: int = 1, pairs: int = 10_000
) -> Plan:
    arguments = ["--output_dir", "o", "--model.name_or_path", str(folder), "--data.train", "none", *options]
    config = load_config(arguments)
    model = model_of_shapes(config)
    machines = Machines(DEVICES[device], gpus, nodes, mfu=0.35, price=2.0)
    return Plan(config, model, workload_of(config, model, *uniform_sets(pairs, 300, 200)), machines)


def test_405_billion_parameters_are_planned_in_seconds(tmp_path):
    started = time.process_time()
    plan = planned(folder_of(tmp_path, LLAMA_405B), "--batch.global_batch_size", "512", gpus=8, nodes=64)
    assert plan.parameters.all == pytest.approx(405.85e9, rel=1e-4)
    best = plan.recommended
    assert best.zero.stage == 3
    assert best.fits
    # 16 bytes a parameter over 512 GPUs, and 2 for what is not split by then.
    held = best.states.weights + best.states.gradients + best.states.optimizer
    assert held == pytest.approx((2 + 4 + 12) * 405.85e9 / 512, rel=1e-3)
    assert time.process_time() - started < 30


def test_what_fits_and_what_is_recommended(tmp_path):
    plan = planned(folder_of(tmp_path, LLAMA_8B))
    fits = {(option.deepspeed.stem, option.recomputation): option.largest_budget > 0 for option in plan.options}
    # 14 bytes a parameter and more on each of 8 GPUs under stage 0: 128 GB.
    assert not fits["zero0", True]
    assert fits["zero3", False]
    assert plan.recommended.deepspeed.stem in ("zero2", "zero3", "zero3_hpz")
    assert not plan.recommended.zero.offloads_optimizer
    alone = planned(tmp_path, gpus=1)
    assert alone.recommended.zero.offloads_optimizer, "160 GB of states do not fit on one GPU"
    assert alone.recommended.states.host > 12 * 8.03e9
    tiny = planned(tmp_path, "--model.lora.rank", "8", "--model.lora.targets", "[q_proj]", device="rtx4090", gpus=1)
    assert tiny.recommended is not None
    assert tiny.parameters.trained < 0.01 * tiny.parameters.all


def test_operations_time_and_money_by_hand(tmp_path):
    plan = planned(folder_of(tmp_path, LLAMA_8B), "--batch.global_batch_size", "100", pairs=1000)
    # Products of the body: all parameters but embedding, head, norms and reward head; 300 + 2 * 200 tokens a pair.
    body, head = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336), 128256 * 4096
    visible = 2 * (500 * 501 / 2) - 300 * 301 / 2
    pair = 2 * body * 700 + 2 * head * 400 + 4 * 32 * 4096 * visible
    assert plan.operations.training == pytest.approx(3000 * pair)
    assert plan.operations.recomputed == pytest.approx(1000 * (pair - 2 * head * 400))
    assert plan.reference_operations == pytest.approx(1000 * pair)
    assert plan.reference_seconds == pytest.approx(1000 * pair / (8 * 989.5e12 * 0.35))
    assert plan.machines.cost(3600) == 16
    assert plan.workload.num_steps == 10
    option = plan.configured
    assert option.compute_seconds == pytest.approx(
        plan.operations.training / 10 / plan.machines.flops / (1 - option.partition.waiting)
    )
    assert plan.checkpoint_bytes == pytest.approx(14 * 8.03e9, rel=1e-3)
    assert plan.final_bytes == pytest.approx(16.06e9, rel=1e-3)
    assert plan.store_bytes == 1000 * 2 * 24


SMOLLM2_135M = LLAMA_405B | {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


def test_under_stage_3_a_small_model_waits_for_the_host(tmp_path):
    plan = planned(folder_of(tmp_path, SMOLLM2_135M), "--batch.global_batch_size", "64")
    found = {stage: plan.option(Path(f"ds_configs/zero{stage}.json"), False, 8192) for stage in (0, 1, 2, 3)}
    milliseconds = {
        stage: 1e3 * option.launch_seconds / option.partition.micro_batches / 30 for stage, option in found.items()
    }
    assert milliseconds == pytest.approx({0: 1.5, 1: 1.5, 2: 2.0, 3: 6.5})
    assert found[3].step_seconds >= found[3].launch_seconds > found[3].compute_seconds
    assert found[3].step_seconds > 2 * found[1].step_seconds
    assert plan.recommended.zero.stage in (1, 2)
    for kind, more in ((True, 3.7), ("selective", 3.7 + 2 * 1.1)):
        again = plan.option(Path("ds_configs/zero3.json"), kind, 8192)
        assert again.launch_seconds == pytest.approx(found[3].launch_seconds * (6.5 + more) / 6.5)
    on_cpus = replace(plan, machines=replace(plan.machines, device_type="cpu"))
    assert on_cpus.option(Path("ds_configs/zero3.json"), False, 8192).launch_seconds == 0.0


def test_each_kind_of_recomputation_has_its_bytes_and_its_time(tmp_path):
    plan = planned(folder_of(tmp_path, LLAMA_8B), "--model.gradient_checkpointing", "every_4")
    zero3 = Path("ds_configs/zero3.json")
    found = {kind: plan.option(zero3, kind, 8192) for kind in plan.kinds}
    assert list(found) == [False, "selective", "every_4", True]
    per_token = {kind: plan.working_memory[kind].per_token for kind in found}
    assert per_token[False] > per_token["every_4"] > per_token["selective"] > per_token[True]
    # In bfloat16: the input, query, key and value, the output of attention with a number a head, what is projected
    # back, gate, up and down. What is larger in a micro-batch is less than a layer.
    kept = 2 * (4096 + (2 * 4096 + 2 * 1024) + 4096 + 2 * 14336 + 4096) + 4 * 32
    assert 32 * kept < per_token["selective"] < 34 * kept
    work, more = plan.operations.training, plan.operations.recomputed
    peak = plan.machines.flops * plan.workload.num_steps
    assert plan.compute_seconds(True) == pytest.approx((work + more) / peak)
    assert plan.compute_seconds("every_4") == pytest.approx((work + more / 4) / peak)
    assert plan.compute_seconds(False) == pytest.approx(work / peak)
    assert 1.02 < plan.compute_seconds("selective") / plan.compute_seconds(False) < 1.1
    assert plan.recipe(found["selective"]).model.gradient_checkpointing == "selective"


def test_selective_recomputation_is_recommended_where_pairs_are_too_long_without(tmp_path):
    folder = str(folder_of(tmp_path, LLAMA_8B))
    config = load_config(
        ["--output_dir", "o", "--model.name_or_path", folder, "--data.train", "none", "--data.max_length", "6000"]
    )
    model = model_of_shapes(config)
    workload = workload_of(config, model, *uniform_sets(640, 3000, 3000))
    plan = Plan(config, model, workload, Machines(DEVICES["h100"], 8, 1, mfu=0.35))
    usual = [option for option in plan.options if not plan.is_last_resort(option)]
    fits = {kind: max(o.largest_budget for o in usual if o.recomputation == kind) for kind in plan.kinds}
    assert fits[False] == 0 < 9000 <= fits["selective"] < fits[True]
    assert (plan.recommended.zero.stage, plan.recommended.recomputation) == (3, "selective")


def test_a_kind_of_recomputation_that_a_model_cannot_is_left_out(tmp_path):
    """transformers adds the bias of gpt-oss's experts to their products in place."""
    shape = {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 1000,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }
    plan = planned(folder_of(tmp_path, shape), "--batch.layout", "padded", pairs=640)
    assert plan.kinds == [False, True]
    asked = planned(tmp_path, "--batch.layout", "padded", "--model.gradient_checkpointing", "selective")
    with pytest.raises(ModelError, match="gradient_checkpointing is selective, but a layer"):
        list(asked.kinds)


def test_of_a_mixture_of_experts_all_are_held_and_sent_and_a_few_computed(tmp_path):
    shape = {
        "model_type": "olmoe",
        "architectures": ["OlmoeForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": 50304,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "tie_word_embeddings": False,
    }
    plan = planned(folder_of(tmp_path, shape))
    layer = 64 * 2048 + 64 * 3 * 2048 * 1024
    assert plan.parameters.all == 6_919_161_856 + 2048  # and the reward head
    assert plan.parameters.largest == layer, "fetched as one under ZeRO-3"
    assert plan.cost.per_token == 2 * 16 * (4 * 2048**2 + 64 * 2048 + 8 * 3 * 2048 * 1024)
    option = plan.option(Path("ds_configs/zero3.json"), False, 8192)
    sent = 2 * plan.parameters.all * 7 / 8 * option.partition.micro_batches
    assert 2 * sent <= option.traffic.among_all <= 3 * sent
    # Kept for each of the 8 experts: states in, out and weighted; gate, up, their product and its activation.
    assert plan.working_memory[False].per_token == pytest.approx(16 * 8 * 2 * (3 * 2048 + 4 * 1024), rel=0.35)


@pytest.mark.parametrize("layout", ["shared_prefix", "packed", "padded"])
def test_counts_of_lengths_are_those_of_laid_out_batches(layout):
    items = [*random_items(1), *random_items(2, num_items=2, num_responses=5), *random_items(3, num_responses=3)]
    lengths = GroupLengths(
        np.array([len(item.prompt) for item in items]),
        np.array([len(response) for item in items for response in item.responses]),
        starts_of(np.array([len(item.responses) for item in items])),
    )
    cost = ForwardCost.of(tiny_hybrid("llama").causal_lm)
    expected = cost.parts(lay_out(items, layout), with_logprob=True)
    assert cost.parts_of(*counts(lengths, layout, with_logprob=True)) == pytest.approx(expected)


def test_quantised_weights_take_fewer_bytes_and_no_stage_3(tmp_path):
    options = ("--model.lora.rank", "8", "--model.lora.quantize", "4bit", "--deepspeed", "ds_configs/zero2.json")
    config = load_config(
        [
            "--output_dir",
            "o",
            "--model.name_or_path",
            str(folder_of(tmp_path, LLAMA_8B)),
            "--data.train",
            "none",
            *options,
        ]
    )
    from hafrm_ds.model import lora

    with pytest.MonkeyPatch.context() as patch:  # bitsandbytes is not needed for shapes
        patch.setattr(lora, "import_problem", lambda package: None)
        model = model_of_shapes(config)
    parameters = count_parameters(model, "4bit")
    embeddings = 2 * 128256 * 4096
    assert parameters.frozen_bytes == pytest.approx(2 * embeddings + 0.5625 * (8.03e9 - embeddings), rel=1e-3)
    machines = Machines(DEVICES["h100"], 8, 1, 0.35)
    plan = Plan(config, model, workload_of(config, model, *uniform_sets(1000, 300, 200)), machines)
    assert {zero.stage for zero in plan.settings.values()} == {0, 1, 2}


# ---- the command ---------------------------------------------------------------------------------------------------


def test_fused_layers_keep_fewer_activations_and_compiled_ones_take_no_stage_3(tmp_path):
    folder = folder_of(tmp_path, LLAMA_8B | {"num_hidden_layers": 4})
    kept = {kind: planned(folder, "--model.fused", kind).working_memory[False].per_token for kind in ("off", "liger")}
    assert 0.6 * kept["off"] < kept["liger"] < 0.75 * kept["off"]
    plan = planned(folder, "--model.fused", "compile_layers", "--deepspeed", "ds_configs/zero2.json")
    assert max(zero.stage for zero in plan.settings.values()) == 2


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["plan.py", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "140")
    with pytest.raises(SystemExit) as left:
        run_alone(command.main)
    return left.value.code, *capsys.readouterr()


def test_a_recipe_is_written_that_training_takes(tmp_path, monkeypatch, capsys):
    model, data = save_tiny_model(tmp_path / "model"), write_pairs(tmp_path / "pairs.jsonl", 40)
    recipe = tmp_path / "planned.yaml"
    status, printed, _ = run(
        monkeypatch, capsys, "--model", model, "--data", data, "--gpus", 2, "--device", "l40s", "--price", 1,
        "--batch.global_batch_size", 8, "--data.max_length", 120, "--batch.max_tokens_per_micro_batch", "auto",
        "--data.cache_dir", tmp_path / "cache", "--write", recipe,
    )  # fmt: skip
    assert status == 0
    assert "Recommended: --deepspeed ds_configs/" in printed
    written = load_config(["--config", str(recipe)])
    assert isinstance(written.batch.max_tokens_per_micro_batch, int)
    assert yaml.safe_load(recipe.read_text())["model"]["name_or_path"] == str(model)
    lengths, no_lengths = lengths_of_sets(written)
    assert len(lengths) == 40
    assert len(no_lengths) == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vocab_size": 50}, "train: token id "),
        ({"max_position_embeddings": 16}, "the longest pair has "),
    ],
)
def test_data_that_the_model_has_no_room_for_is_not_planned(tmp_path, monkeypatch, capsys, changes, said):
    model, data = save_tiny_model(tmp_path / "model"), write_pairs(tmp_path / "pairs.jsonl", 8)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))
    status, _, error = run(
        monkeypatch, capsys, "--model", model, "--data", data, "--gpus", 2, "--batch.global_batch_size", 8,
        "--data.max_length", 120, "--data.cache_dir", tmp_path / "cache",
    )  # fmt: skip
    assert status == 1 and said in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--pairs", 10), "--pairs and --mean_tokens belong together"),
        (("--gpus", 0, "--mfu", 40), "3 problems"),
        (("--pairs", 100, "--mean_tokens", 30, 20, "--device", "tpu"), "--device tpu is not known (a100-40, "),
        (("--pairs", 100, "--mean_tokens", 30, 20, "--nodes", 100), "fewer than the 800 GPUs"),
        (("--pairs", 100, "--mean_tokens", 30, 20, "--write", "x.yaml"), "--write needs the data of the run"),
        (("--pairs", 100, "--mean_tokens", 30, 20, "--model.name_or_path", "/nowhere"), "/nowhere"),
    ],
)
def test_faults_are_named(tmp_path, monkeypatch, capsys, arguments, said):
    folder = folder_of(tmp_path, LLAMA_8B)
    model = () if "--model.name_or_path" in arguments else ("--model", folder)
    status, _, error = run(monkeypatch, capsys, *model, *arguments)
    assert status == 1
    assert said in error


def test_a_device_may_be_given_by_numbers():
    numbers = dict(zip(command.DEVICE_NUMBERS, (100, 64, 1000, 50, 20, 10), strict=True))
    assert find_device("mine", numbers) == Device("mine", 100e12, 64, 1000e9, 50e9, 20e9, 10e9)
    assert find_device("h200", {"network_gbs": 25}) == replace(DEVICES["h200"], network_bandwidth=25e9)
    with pytest.raises(ConfigError, match=r"so it needs --link_gbs$"):
        find_device("mine", numbers | {"link_gbs": None})
