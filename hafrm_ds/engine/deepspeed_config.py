"""The DeepSpeed JSON of a run: "auto" values filled from the configuration, contradictions named.

Pure functions on dictionaries; nothing here imports DeepSpeed.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

from hafrm_ds.config import TrainConfig
from hafrm_ds.errors import ConfigError
from hafrm_ds.options import read

Config = TypeVar("Config", bound=TrainConfig)

REPOSITORY = Path(__file__).resolve().parents[2]


@overload
def load_config(arguments: Sequence[str], *, about: str = "") -> TrainConfig: ...
@overload
def load_config(
    arguments: Sequence[str], schema: type[Config], *, about: str = "", short: Mapping[str, str] | None = None
) -> Config: ...
def load_config(
    arguments: Sequence[str],
    schema: type[TrainConfig] = TrainConfig,
    *,
    about: str = "",
    short: Mapping[str, str] | None = None,
) -> TrainConfig:
    """Read the configuration of a run (`options.read`), and check it against its DeepSpeed JSON.

    Args:
        schema: TrainConfig, or with the options that an entry file adds.
    """
    return read(schema, arguments, about=about, short=short, rules=deepspeed_problems)


def deepspeed_problems(config: TrainConfig) -> list[str]:
    """What is wrong with the JSON of a run: one message for each fault."""
    content, problems = read_deepspeed_json(config.deepspeed)
    return problems if content is None else deepspeed_contradictions(content, config)


def read_deepspeed_json(path: Path) -> tuple[dict | None, list[str]]:
    """Read the JSON file: (content or None, problems). A relative path is also looked for beside the package."""
    file = path if path.exists() or path.is_absolute() else REPOSITORY / path
    try:
        content = json.loads(file.read_text())
    except OSError as error:
        return None, [f"deepspeed: {path} cannot be read: {error.strerror}"]
    except ValueError as error:
        return None, [f"deepspeed: {path} is not valid JSON: {error}"]
    if not isinstance(content, dict):
        return None, [f"deepspeed: {path} holds a {type(content).__name__}, not an object"]
    return content, []


def run_values(config: TrainConfig) -> dict[str, tuple[Any, str]]:
    """What a run decides itself: dotted DeepSpeed key -> (value, the option that decides it)."""
    optimizer = config.optimizer
    is_bf16 = config.model.dtype == "bfloat16"
    reduction = {"communication_data_type": ("fp32", "optimizer.reduce_in_fp32")} if optimizer.reduce_in_fp32 else {}
    return reduction | {
        "bf16.enabled": (is_bf16, f"model.dtype is {config.model.dtype}"),
        "fp16.enabled": (False, f"model.dtype is {config.model.dtype}"),
        "gradient_clipping": (optimizer.max_gradient_norm, "optimizer.max_gradient_norm"),
        "gradient_accumulation_steps": (
            1,
            "the loop partitions each global batch into micro-batches itself (batch.max_tokens_per_micro_batch)",
        ),
        "train_batch_size": (config.batch.global_batch_size, "batch.global_batch_size"),
        "zero_optimization.compute_grad_norm": (True, "every step checks and logs its gradient norm (grad_norm)"),
        "optimizer.params.lr": (optimizer.learning_rate, "optimizer.learning_rate"),
        "optimizer.params.betas": (list(optimizer.betas), "optimizer.betas"),
        "optimizer.params.eps": (optimizer.epsilon, "optimizer.epsilon"),
        "optimizer.params.weight_decay": (optimizer.weight_decay, "optimizer.weight_decay"),
    }


# "auto" here means: left out, so that DeepSpeed's own default counts (sizes that transformers would derive).
LEFT_TO_DEEPSPEED = (
    "communication_data_type",
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold",
    "train_micro_batch_size_per_gpu",
    "steps_per_print",
    "wall_clock_breakdown",
)

SECONDARY_SHARDS = "zero_optimization.zero_hpz_partition_size"

# Sections that are read here, so they must be objects.
SECTIONS = ("zero_optimization", "bf16", "fp16", "optimizer", "scheduler")


def walk(tree: dict, prefix: str = ""):
    """Yield (dotted key, value) of every leaf."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from walk(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def deepspeed_contradictions(content: dict, config: TrainConfig) -> list[str]:
    """One message for each value of the JSON that contradicts the run, naming both."""
    decided, problems, file = run_values(config), [], config.deepspeed
    for name in SECTIONS:
        if not isinstance(content.get(name, {}), dict):
            problems.append(f"deepspeed: {file} gives {name} as {json.dumps(content[name])}; it must be an object")
    content = {key: value for key, value in content.items() if key not in SECTIONS or isinstance(value, dict)}
    for key, value in walk(content):
        if key in decided:
            expected, option = decided[key]
            if value != "auto" and value != expected:
                problems.append(
                    f"deepspeed: {file} says {key} = {json.dumps(value)}, but {option}"
                    + (f" says {json.dumps(expected)}" if " " not in option else "")
                    + f'; set it to "auto" or to {json.dumps(expected)}'
                )
        elif key.startswith("scheduler.") or key == "zero_optimization.stage":
            pass  # each has its own message below
        elif value == "auto" and key not in (SECONDARY_SHARDS, *LEFT_TO_DEEPSPEED):
            known = ", ".join([*decided, SECONDARY_SHARDS, *LEFT_TO_DEEPSPEED])
            problems.append(f'deepspeed: {file} leaves {key} "auto", which nothing in a run decides (known: {known})')
    if any(value != "auto" for _, value in walk(content.get("scheduler", {}))):
        problems.append(
            f"deepspeed: {file} has a scheduler section, but optimizer.schedule and optimizer.warmup_share "
            "make the schedule of a run; remove it"
        )
    stage = zero_stage(content)
    if stage not in (0, 1, 2, 3):
        problems.append(f"deepspeed: {file} names ZeRO stage {stage}; it is 0, 1, 2 or 3")
    if stage == 3 and config.model.lora.quantize != "none":
        problems.append(
            f"deepspeed: {file} names ZeRO stage 3, which cannot split quantised weights, but model.lora.quantize is "
            f"{config.model.lora.quantize}; take a file of stage 0, 1 or 2"
        )
    if stage == 3 and config.model.fused == "compile_layers":
        problems.append(
            f"deepspeed: {file} names ZeRO stage 3, which fetches weights inside of each layer, but model.fused is "
            "compile_layers, which compiles layers whole; set model.fused to compile, or take a file of stage 0, 1 or 2"
        )
    measures = config.objective.policy_share is not None or config.logging.gradient_shares_every > 0
    if stage in (1, 2) and measures and content["zero_optimization"].get("round_robin_gradients"):
        problems.append(
            f"deepspeed: {file} says zero_optimization.round_robin_gradients = true, under which DeepSpeed notes wrong "
            "places of gradients; objective.policy_share or logging.gradient_shares_every measure them: remove it"
        )
    for section, lowest, what in (("offload_optimizer", 1, "the optimizer"), ("offload_param", 3, "parameters")):
        if is_offloaded(content, section) and stage in range(lowest):
            problems.append(
                f"deepspeed: {file} offloads {what} ({section}) under ZeRO stage {stage}, where DeepSpeed cannot; take "
                f"stage {lowest if lowest == 3 else f'{lowest} to 3'} or remove {section}"
            )
    if (reduced := content.get("communication_data_type", "auto")) not in ("auto", "bf16", "fp32"):
        problems.append(
            f"deepspeed: {file} says communication_data_type = {json.dumps(reduced)}; gradients are averaged in "
            "bf16 or fp32"
        )
    micro = content.get("train_micro_batch_size_per_gpu", "auto")
    if micro not in ("auto", 1):
        problems.append(
            f"deepspeed: {file} says train_micro_batch_size_per_gpu = {micro}, but batches are partitioned by tokens "
            '(batch.max_tokens_per_micro_batch); set it to "auto"'
        )
    return problems


def zero_stage(deepspeed_config: dict) -> int:
    return deepspeed_config.get("zero_optimization", {}).get("stage", 0)


def is_offloaded(deepspeed_config: dict, section: str) -> bool:
    """Whether a DeepSpeed configuration moves the optimizer ("offload_optimizer") or the parameters ("offload_param")
    out of the GPU."""
    offload = (deepspeed_config.get("zero_optimization") or {}).get(section)
    return isinstance(offload, dict) and offload.get("device", "none") != "none"


def resolve_deepspeed_config(config: TrainConfig, world_size: int, machine_size: int = 1) -> dict:
    """The dictionary that DeepSpeed gets: the JSON with "auto" filled. `config` has passed `deepspeed_contradictions`.

    DeepSpeed's own batch sizes count calls of its engine, not pairs: one call a rank and step boundary.

    Args:
        machine_size: processes of one machine, which a secondary copy of the weights (hpZ) is split over.
    """
    content, problems = read_deepspeed_json(config.deepspeed)
    if content is None:
        raise ConfigError(problems)

    def filled(tree: dict, prefix: str) -> dict:
        result: dict[str, Any] = {}
        for key, value in tree.items():
            name = prefix + key
            if isinstance(value, dict):
                result[key] = filled(value, f"{name}.")
            elif value != "auto":
                result[key] = value
            elif name in decided:
                result[key] = decided[name][0]
            elif name == SECONDARY_SHARDS:
                result[key] = machine_size
        return result

    decided = run_values(config)
    resolved = filled({key: value for key, value in content.items() if key != "scheduler"}, "")
    resolved |= {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimizer.max_gradient_norm,
        "bf16": resolved.get("bf16", {}) | {"enabled": config.model.dtype == "bfloat16"},
    }
    if config.optimizer.reduce_in_fp32:
        resolved["communication_data_type"] = "fp32"
    # By default DeepSpeed sums the gradients of micro-batches in bfloat16, where late ones vanish beside the sum. Under
    # stage 0 it knows no other way.
    if config.model.dtype == "bfloat16" and zero_stage(resolved) > 0:
        resolved.setdefault("data_types", {"grad_accum_dtype": "fp32"})
    resolved.setdefault("steps_per_print", 10**9)
    return resolved
