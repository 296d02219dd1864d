"""Any DeepSpeed JSON: "auto" is filled, a contradiction with the run is one message that names both sides."""

import json
from pathlib import Path

import pytest

from hafrm_ds.config import TrainConfig
from hafrm_ds.engine.deepspeed_config import REPOSITORY, load_config, read_deepspeed_json, resolve_deepspeed_config
from hafrm_ds.errors import ConfigError

# In the spelling of the files that users of transformers bring along.
ALL_AUTO = {
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": 0},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": "auto",
}


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "ds.json"


def load(file: Path, content: dict, *arguments: str) -> TrainConfig:
    file.write_text(json.dumps(content))
    required = ["--output_dir", "o", "--model.name_or_path", "m", "--data.train", "a.jsonl"]
    return load_config([*required, "--deepspeed", str(file), *arguments])


def problems(file: Path, content: dict, *arguments: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(file, content, *arguments)
    return caught.value.problems


# ---- filling -------------------------------------------------------------------------------------------------------


def test_auto_is_filled_from_the_run_or_left_to_deepspeed(file):
    config = load(
        file, ALL_AUTO,
        "--optimizer.learning_rate", "3e-5", "--optimizer.betas", "[0.8, 0.9]", "--optimizer.epsilon", "1e-7",
        "--optimizer.weight_decay", "0.1", "--optimizer.max_gradient_norm", "0.5",
    )  # fmt: skip
    assert resolve_deepspeed_config(config, world_size=8) == {
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "fp16": {"enabled": False, "loss_scale": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-5, "betas": [0.8, 0.9], "eps": 1e-7, "weight_decay": 0.1}},
        "zero_optimization": {"stage": 3, "overlap_comm": True},
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.5,
        "steps_per_print": 10**9,
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 1,
    }


def test_what_an_almost_empty_file_leaves_out_comes_from_the_run(file):
    config = load(file, {"steps_per_print": 5}, "--model.dtype", "float32")
    assert resolve_deepspeed_config(config, world_size=2) == {
        "bf16": {"enabled": False},
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "steps_per_print": 5,
        "train_batch_size": 2,
        "train_micro_batch_size_per_gpu": 1,
    }


@pytest.mark.parametrize(("stage", "expected"), [(0, None), (1, "fp32"), (2, "fp32"), (3, "fp32")])
def test_gradients_of_bfloat16_are_summed_in_fp32_where_deepspeed_can(file, stage, expected):
    zero = {"zero_optimization": {"stage": stage}}
    resolved = resolve_deepspeed_config(load(file, zero), world_size=1)
    assert resolved.get("data_types", {}).get("grad_accum_dtype") == expected
    chosen = resolve_deepspeed_config(load(file, zero | {"data_types": {"grad_accum_dtype": "bf16"}}), world_size=1)
    assert chosen["data_types"] == {"grad_accum_dtype": "bf16"}
    assert "data_types" not in resolve_deepspeed_config(load(file, zero, "--model.dtype", "float32"), world_size=1)


def test_a_scheduler_section_of_autos_is_left_out(file):
    config = load(file, {"scheduler": {"params": {"warmup_num_steps": "auto"}}})
    assert "scheduler" not in resolve_deepspeed_config(config, world_size=1)


def test_what_the_run_does_not_decide_is_passed_on(file):
    content = {
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}},
        "communication_data_type": "fp32",
    }
    resolved = resolve_deepspeed_config(load(file, content), world_size=1)
    assert content.items() <= resolved.items()


REDUCE = ("--optimizer.reduce_in_fp32", "true")


@pytest.mark.parametrize("content", [{}, {"communication_data_type": "auto"}, {"communication_data_type": "fp32"}])
def test_gradients_are_reduced_in_fp32_on_demand(file, content):
    assert resolve_deepspeed_config(load(file, content, *REDUCE), world_size=1)["communication_data_type"] == "fp32"
    left = resolve_deepspeed_config(load(file, content), world_size=1).get("communication_data_type")
    assert left == (None if content.get("communication_data_type") in (None, "auto") else "fp32")


def test_what_contradicts_reducing_in_fp32_is_named(file):
    (problem,) = problems(file, {"communication_data_type": "bf16"}, *REDUCE)
    assert 'communication_data_type = "bf16", but optimizer.reduce_in_fp32 says "fp32"' in problem
    (problem,) = problems(file, {"communication_data_type": "fp16"})
    assert 'communication_data_type = "fp16"; gradients are averaged in bf16 or fp32' in problem


@pytest.mark.parametrize("name", sorted(path.name for path in (REPOSITORY / "ds_configs").glob("*.json")))
def test_the_files_that_come_along_suit_the_defaults(name, file, tmp_path, monkeypatch):
    """Their relative paths are found from any working directory."""
    monkeypatch.chdir(tmp_path)
    config = load(file, {}, "--deepspeed", f"ds_configs/{name}")
    assert resolve_deepspeed_config(config, world_size=1)["bf16"] == {"enabled": True}


@pytest.mark.parametrize("name", sorted(path.name for path in (REPOSITORY / "ds_configs").glob("*.json")))
def test_deepspeed_takes_the_files_that_come_along(name, file):
    """By its own classes, which refuse unknown keys and wrong types; a secondary copy is split over one machine."""
    from deepspeed.runtime.zero.config import get_zero_config

    resolved = resolve_deepspeed_config(load(file, {}, "--deepspeed", f"ds_configs/{name}"), 16, machine_size=8)
    zero = get_zero_config(resolved)
    assert zero.zero_hpz_partition_size == (8 if "hpz" in name else 1)
    offload = [section and section.device for section in (zero.offload_optimizer, zero.offload_param)]
    assert offload == [
        "cpu" if "offload" in name else None,
        "cpu" if name == "zero3_offload.json" else None,
    ]
    assert not (zero.zero_quantized_weights or zero.zero_quantized_gradients)
    assert name.startswith(f"zero{int(zero.stage)}")


# ---- contradictions ------------------------------------------------------------------------------------------------


def nested(dotted: str, value) -> dict:
    for key in reversed(dotted.split(".")):
        value = {key: value}
    return value


@pytest.mark.parametrize(
    ("key", "value", "run_says", "remedy"),
    [
        ("gradient_clipping", 0.5, "optimizer.max_gradient_norm says 1.0", "1.0"),
        ("bf16.enabled", False, "model.dtype is bfloat16", "true"),
        ("fp16.enabled", True, "model.dtype is bfloat16", "false"),
        ("optimizer.params.lr", 1e-4, "optimizer.learning_rate says 1e-05", "1e-05"),
        ("optimizer.params.betas", [0.9, 0.999], "optimizer.betas says [0.9, 0.95]", "[0.9, 0.95]"),
        ("optimizer.params.eps", 1e-6, "optimizer.epsilon says 1e-08", "1e-08"),
        ("optimizer.params.weight_decay", 0.1, "optimizer.weight_decay says 0.0", "0.0"),
        ("gradient_accumulation_steps", 4, "batch.max_tokens_per_micro_batch", "1"),
        ("train_batch_size", 32, "batch.global_batch_size says 64", "64"),
        ("zero_optimization.compute_grad_norm", False, "every step checks and logs its gradient norm", "true"),
    ],
)
def test_a_contradiction_is_one_message_naming_both_sides(file, key, value, run_says, remedy):
    (problem,) = problems(file, nested(key, value))
    assert problem.startswith(f"deepspeed: {file} says {key} = {json.dumps(value)}, but ")
    assert run_says in problem
    assert problem.endswith(f'set it to "auto" or to {remedy}')


@pytest.mark.parametrize(
    ("section", "stage", "remedy"),
    [
        ("offload_optimizer", 0, "take stage 1 to 3 or remove offload_optimizer"),
        ("offload_param", 2, "take stage 3 or remove offload_param"),
    ],
)
def test_offload_needs_a_stage_that_has_it(file, section, stage, remedy):
    (problem,) = problems(file, {"zero_optimization": {"stage": stage, section: {"device": "cpu"}}})
    assert f"({section}) under ZeRO stage {stage}" in problem
    assert problem.endswith(remedy)
    load(file, {"zero_optimization": {"stage": stage, section: {"device": "none"}}})
    load(file, {"zero_optimization": {"stage": 3, section: {"device": "cpu"}}})


def test_quantised_weights_are_not_split_by_zero_3(file):
    quantized = ("--model.lora.rank", "8", "--model.lora.quantize", "4bit")
    (problem,) = problems(file, {"zero_optimization": {"stage": 3}}, *quantized)
    assert "ZeRO stage 3, which cannot split quantised weights, but model.lora.quantize is 4bit" in problem
    load(file, {"zero_optimization": {"stage": 2}}, *quantized)


def test_layers_that_fetch_their_weights_are_not_compiled_whole(file):
    (problem,) = problems(file, {"zero_optimization": {"stage": 3}}, "--model.fused", "compile_layers")
    assert "model.fused is compile_layers, which compiles layers whole; set model.fused to compile" in problem
    load(file, {"zero_optimization": {"stage": 2}}, "--model.fused", "compile_layers")
    load(file, {"zero_optimization": {"stage": 3}}, "--model.fused", "compile")


def test_gradients_that_lie_elsewhere_than_noted_are_not_measured(file):
    content = {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}
    for measuring in (
        ("--objective.policy_share", "0.5", "--objective.alpha", "null"),
        ("--logging.gradient_shares_every", "5"),
    ):
        (problem,) = problems(file, content, *measuring)
        assert "round_robin_gradients = true" in problem and "measure them" in problem
    load(file, content)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            {"train_micro_batch_size_per_gpu": 4},
            ["train_micro_batch_size_per_gpu = 4", "batch.max_tokens_per_micro_batch"],
        ),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_num_steps": 10}}},
            ["scheduler", "optimizer.schedule", "optimizer.warmup_share", "remove it"],
        ),
        ({"zero_optimization": {"stage": 4}}, ["ZeRO stage 4", "0, 1, 2 or 3"]),
        ({"zero_optimization": {"stage": "auto"}}, ["ZeRO stage auto", "0, 1, 2 or 3"]),
        (
            {"zero_optimization": {"stage3_max_live_parameters": "auto"}},
            ['zero_optimization.stage3_max_live_parameters "auto"', "gradient_clipping", "steps_per_print"],
        ),
        ({"bf16": "auto"}, ['bf16 as "auto"', "must be an object"]),
        ({"zero_optimization": True}, ["zero_optimization as true", "must be an object"]),
        ({"optimizer": None}, ["optimizer as null", "must be an object"]),
    ],
)
def test_what_no_run_can_follow_is_one_message(file, content, said):
    (problem,) = problems(file, content)
    assert str(file) in problem
    assert all(part in problem for part in said)


def test_contradictions_are_named_together(file):
    content = {"gradient_clipping": 0.5, "bf16": {"enabled": False}, "zero_optimization": {"stage": 5}}
    assert len(problems(file, content)) == 3


def test_explicit_values_that_agree_are_accepted(file):
    content = {
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "gradient_clipping": 2,
        "gradient_accumulation_steps": 1,
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"params": {"lr": 1e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0}},
        "zero_optimization": {"stage": 1},
    }
    config = load(
        file, content,
        "--model.dtype", "float32", "--optimizer.max_gradient_norm", "2", "--batch.global_batch_size", "16",
        "--optimizer.learning_rate", "1e-4",
    )  # fmt: skip
    resolved = resolve_deepspeed_config(config, world_size=4)
    assert resolved["optimizer"] == content["optimizer"]
    assert resolved["gradient_clipping"] == 2
    assert resolved["train_batch_size"] == 4  # calls of the engine, not pairs


# ---- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"bf16": }', "is not valid JSON: Expecting value: line 1 column 10"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"[1, 2]", "holds a list, not an object"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_unusable_files(file, content, said):
    if content is not None:
        file.write_bytes(content)
    found, (problem,) = read_deepspeed_json(file)
    assert found is None
    assert problem.startswith(f"deepspeed: {file} {said}")


def test_an_unusable_file_is_named_with_the_other_faults(file):
    file.write_text("{")
    required = ["--output_dir", "o", "--model.name_or_path", "m", "--data.train", "a.jsonl"]
    with pytest.raises(ConfigError) as caught:
        load_config([*required, "--deepspeed", str(file), "--evaluation.every_steps", "5"])
    assert len(caught.value.problems) == 2
