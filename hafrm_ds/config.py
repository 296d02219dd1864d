"""The configuration of a run: one typed tree, read from YAML and dotted overrides.

The docstring under a field is its help text (`--help`). `load_config` names every fault at once, before any model is
loaded; `contradictions` holds the rules that tie several options together.
"""

import datetime
import difflib
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from hafrm_ds.data.sources import EvalSources, TrainSources
from hafrm_ds.errors import ConfigError
from hafrm_ds.training.deepspeed_config import deepspeed_contradictions, read_deepspeed_json

Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
PositiveInt = Annotated[int, Field(ge=1)]
# YAML reads an unquoted 2024-07-26 as a date.
Day = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, datetime.date) else value)]


class Section(BaseModel):
    """One group of options. Unknown keys are refused; the docstring under a field is its help."""

    model_config = ConfigDict(
        extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )


class ModelConfig(Section):
    """The causal language model that is trained, and the reward head it is given."""

    name_or_path: str
    """A Hugging Face hub id or a local folder of a causal language model."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    """Run modelling code that comes with the checkpoint. Off unless you trust its authors."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the weights in forward and backward. DeepSpeed keeps fp32 master weights beside bfloat16 ones."""
    gradient_checkpointing: bool = False
    """Recompute each layer in backward: activations of one layer in memory instead of all, for about a third more
    compute."""
    reward_head_bias: bool = False
    """Give the reward head a bias. It cancels in every pair, so it only moves the zero of the score."""
    reward_head_init: Literal["normal", "zero"] = "normal"
    """normal: N(0, 1/(hidden size + 1)). zero: all rewards start at 0, as the paper's code intends."""


class DataConfig(Section):
    """Preference pairs: where they come from, how they are rendered and what is cut or dropped."""

    train: TrainSources
    """Training pairs: a path, hub id or preset:NAME with an optional row filter (`pairs.jsonl?split=train`), a mapping,
    or a list of these."""
    eval: EvalSources = {}
    """Named evaluation sets: one source, or a mapping from name to source or list of sources."""
    chat_template: str | None = None
    """Template for conversations: a name (chatml, phi-2, mistral-instruct, text), a .jinja file, or nothing for the
    tokenizer's own."""
    template_date: Day = "2024-07-26"
    """The day (YYYY-MM-DD) that templates which print today's date are frozen to, so that scores do not depend on the
    day."""
    max_length: Annotated[int, Field(ge=4)] = 1024
    """Longest conversation, prompt and response together, in tokens."""
    truncation: Literal["drop", "keep_prompt_end", "cut_response"] = "keep_prompt_end"
    """What happens to a pair whose longer conversation exceeds max_length. drop: the pair is dropped. keep_prompt_end:
    the start of the prompt is cut (a leading BOS is kept) until the longer response fits. cut_response: both responses
    are cut at the end."""
    max_dropped_share: Share = 0.05
    """The run stops when a larger share of the selected pairs would be dropped: empty, identical or over-long ones, and
    those without a common prompt or an answer at the end."""
    num_proc: PositiveInt | None = None
    """Processes that tokenise. Default: one per core, at most 16."""
    cache_dir: Path | None = None
    """Where prepared data is kept between runs. Default: the cache folder of Hugging Face datasets."""


class ObjectiveConfig(Section):
    """L = rm_weight * L_reward + alpha * L_policy, each a mean over the pairs of the global batch (HAF-RM)."""

    alpha: NonNegative = 0.2
    """Weight of the policy loss. 0 is the paper's baseline: no LM head and no reference log-probs are computed."""
    rm_weight: NonNegative = 1.0
    """Weight of the reward loss. 0 trains the policy alone (the paper's DPO model); the reward head stays as it was."""
    beta: Positive = 0.1
    """Strength of the implicit KL constraint in dpo, ipo and hinge; scale of the margin in simpo."""
    policy_loss: Literal["dpo", "ipo", "hinge", "simpo", "sft"] = "dpo"
    """dpo, ipo and hinge use reference log-probs; simpo (length-averaged) and sft (on the chosen answer) need none."""
    policy_label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """dpo only: assumed probability that a label is flipped."""
    simpo_gamma: NonNegative = 0.5
    """simpo only: target margin between the length-averaged log-probs, in units of the scaled margin."""
    use_margin: bool = False
    """Subtract each pair's margin, where the data has one, inside the reward loss."""
    reward_label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Assumed probability that a label is flipped, in the reward loss."""
    reward_centering: NonNegative = 0.0
    """Weight of (r_chosen + r_rejected)^2, which keeps rewards around zero. 0.01 is a usual value."""
    alternate_every: Annotated[int, Field(ge=0)] = 0
    """0: both losses at every step. k: blocks of k steps with the policy loss alone, then k with the reward loss alone,
    and so on."""

    @property
    def uses_reward(self) -> bool:
        return self.rm_weight > 0

    @property
    def uses_policy(self) -> bool:
        return self.alpha > 0

    @property
    def uses_reference(self) -> bool:
        return self.uses_policy and self.policy_loss in ("dpo", "ipo", "hinge")


class BatchConfig(Section):
    """How pairs become optimizer steps and micro-batches. The order of pairs never depends on the number of GPUs."""

    global_batch_size: PositiveInt = 64
    """Pairs in one optimizer step, over all GPUs."""
    max_tokens_per_micro_batch: PositiveInt = 8192
    """Token budget of one forward and backward on one GPU. More is faster until memory runs out."""
    layout: Literal["shared_prefix", "packed", "padded"] = "shared_prefix"
    """shared_prefix: a prompt stands once for both answers, no padding. packed: no padding, the prompt repeated.
    padded: the model's stock attention on padded rows."""


class OptimizerConfig(Section):
    """AdamW and its learning-rate schedule."""

    learning_rate: Positive = 1e-5
    """Peak learning rate of the body and the LM head."""
    reward_head_learning_rate: Positive | None = None
    """Peak learning rate of the reward head. Default: learning_rate."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay of matrices; never applied to biases, norms and the reward head."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """Decay rates of the running averages of the gradient and of its square."""
    epsilon: Positive = 1e-8
    """Added to the root of the second moment."""
    max_gradient_norm: NonNegative = 1.0
    """Global norm that gradients are clipped to; 0 turns clipping off."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay after the warm-up, towards min_learning_rate_share of the peak, which it would reach one step after the
    last."""
    warmup_share: Share = 0.03
    """Share of all steps over which the learning rate rises to its peak; the first of them already learns."""
    min_learning_rate_share: Share = 0.0
    """Where the decay leads, as a share of the peak learning rate."""


class ReferenceConfig(Section):
    """Log-probs of the reference policy, the weights a run starts from: computed once and kept in a store."""

    store: Path = Path("runs/reference_store")
    """Folder of the store. Any number of runs and jobs may share it; all nodes of a run must see it."""
    on_missing: Literal["compute", "stop"] = "compute"
    """When the store lacks values. compute: the training engine computes and stores them before the first step. stop:
    the run stops and says how many are missing."""
    flush_seconds: Positive = 60.0
    """Each rank writes what it has computed at least this often: the most that a killed pass loses."""
    per_token: bool = False
    """Also store the log-prob of each response token, for uses outside training."""


class EvaluationConfig(Section):
    """Evaluation during training, on every set of data.eval."""

    every_steps: Annotated[int, Field(ge=0)] = 0
    """Evaluate every N steps; 0: only before the first step and after the last."""
    at_start: bool = True
    """Evaluate before the first step, so that every later figure has its starting point."""
    max_pairs: PositiveInt | None = None
    """Use at most this many pairs of each set: a fixed random choice."""
    best_metric: str | None = None
    """SET/METRIC whose best step is remembered, for example hh/accuracy/reward. Default: the first set's accuracy of
    the reward head, or the implicit reward's when rm_weight is 0."""


class LoggingConfig(Section):
    """What a run writes and shows. metrics.jsonl is always written."""

    every_steps: PositiveInt = 1
    """Write training metrics every N steps."""
    tensorboard: bool = True
    """Write TensorBoard files into OUTPUT_DIR/tensorboard."""
    wandb_project: str | None = None
    """Also log to this Weights & Biases project (pip install hafrm_ds[wandb])."""


class TrainConfig(Section):
    """A training run."""

    output_dir: Path
    """Folder of the run: config, metrics, TensorBoard files and the final model."""
    deepspeed: Path = Path("ds_configs/zero3.json")
    """A DeepSpeed JSON file. Its "auto" values are filled from this configuration; a value that contradicts it is an
    error."""
    seed: int = 0
    """Seed of the data order, of the mixing of sources and of the reward head."""
    epochs: Positive = 1.0
    """Passes over the training pairs. Ignored when max_steps is given."""
    max_steps: PositiveInt | None = None
    """Optimizer steps."""
    model: ModelConfig
    data: DataConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    reference: ReferenceConfig = ReferenceConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def contradictions(config: TrainConfig) -> list[str]:
    """Rules between options: one message for each that is broken."""
    objective, problems = config.objective, []
    if not objective.uses_reward and not objective.uses_policy:
        problems.append("objective.rm_weight and objective.alpha are both 0: there is nothing to train")
    if objective.alternate_every and not (objective.uses_reward and objective.uses_policy):
        problems.append(
            f"objective.alternate_every is {objective.alternate_every}, but alternating needs both losses: "
            f"rm_weight is {objective.rm_weight}, alpha is {objective.alpha}"
        )
    if objective.policy_label_smoothing and objective.policy_loss != "dpo":
        problems.append(
            f"objective.policy_label_smoothing is defined for policy_loss dpo, not for {objective.policy_loss}"
        )
    if not objective.uses_reward and objective.use_margin:
        problems.append("objective.use_margin belongs to the reward loss, but objective.rm_weight is 0")
    if config.evaluation.every_steps and not config.data.eval:
        problems.append(
            f"evaluation.every_steps is {config.evaluation.every_steps}, but data.eval names no evaluation set"
        )
    best = config.evaluation.best_metric
    if best is not None and best.split("/")[0] not in config.data.eval:
        known = ", ".join(config.data.eval) or "none"
        problems.append(f"evaluation.best_metric {best!r} names no set of data.eval (known: {known})")
    if config.data.max_length > config.batch.max_tokens_per_micro_batch:
        problems.append(
            f"data.max_length {config.data.max_length} exceeds batch.max_tokens_per_micro_batch "
            f"{config.batch.max_tokens_per_micro_batch}: one conversation may not fit in a micro-batch"
        )
    return problems


# ---- reading -------------------------------------------------------------------------------------------------------


def load_config(arguments: list[str], schema: type[TrainConfig] = TrainConfig) -> TrainConfig:
    """Build the configuration from command-line arguments.

    Arguments: `--config FILE` (YAML, may be left out), then any number of `--section.key value` or
    `--section.key=value`, values in YAML notation. `--help` and `--print_config` print and leave.

    Raises:
        ConfigError: with all faults: unknown keys (and the nearest valid one), wrong types, contradictions between
            options or with the DeepSpeed JSON.
    """
    speaks = os.environ.get("RANK", "0") == "0"  # under a launcher every rank reads the same options
    if "--help" in arguments or "-h" in arguments:
        if speaks:
            print(help_text(schema))
        sys.exit(0)
    tree, print_only = read_arguments(arguments)
    config = validate(tree, schema)
    if print_only:
        if speaks:
            print(config.to_yaml(), end="")
        sys.exit(0)
    return config


def read_arguments(arguments: list[str]) -> tuple[dict, bool]:
    """Arguments -> (nested mapping of raw values, whether --print_config was given)."""
    print_only, files, overrides, problems = False, [], [], []
    words = list(reversed(arguments))
    while words:
        word = words.pop()
        if not word.startswith("--"):
            problems.append(f"{word!r} stands alone: options look like --section.key value")
            continue
        name, equals, value = word[2:].partition("=")
        if name == "print_config":
            print_only = True
            continue
        if not equals:
            value = words.pop() if words and not words[-1].startswith("--") else None
        if value is None:
            problems.append(f"--{name} has no value")
        elif name == "config":
            files.append(Path(value))
        elif name not in ("local_rank", "local-rank"):  # appended by the deepspeed launcher
            overrides.append((name, value))

    tree: dict[str, Any] = {}
    for file in files:
        try:
            content = yaml.safe_load(file.read_text())
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"--config {file}: cannot be read: {getattr(error, 'strerror', None) or error}")
            continue
        except yaml.YAMLError as error:
            problems.append(f"--config {file}: is not valid YAML: {' '.join(str(error).split())}")
            continue
        if not isinstance(content or {}, dict):
            problems.append(f"--config {file}: holds a {type(content).__name__}, not a mapping of options")
            continue
        merge(tree, content or {})
    for name, value in overrides:
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            parsed = value
        *sections, key = name.split(".")
        node = {key: parsed}
        for section in reversed(sections):
            node = {section: node}
        merge(tree, node)
    if problems:
        raise ConfigError(problems)
    return tree, print_only


def merge(tree: dict, update: dict) -> None:
    """Lay `update` over `tree` in place: mappings are merged key by key, anything else replaces what was there.

    Data sources are values, not sections: a source given later replaces the whole earlier one.
    """
    for key, value in update.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict) and key not in ("train", "eval"):
            merge(tree[key], value)
        else:
            tree[key] = value


def validate(tree: dict, schema: type[TrainConfig]) -> TrainConfig:
    """Raw mapping -> configuration; raises ConfigError with every fault.

    After the first round of faults the faulty values are left out and the rest is checked once more, so that
    contradictions elsewhere are named in the same message.
    """
    config, problems = try_schema(tree, schema)
    if config is not None:
        deepspeed_json, more = read_deepspeed_json(config.deepspeed)
        problems = contradictions(config) + more
        if deepspeed_json is not None:
            problems += deepspeed_contradictions(deepspeed_json, config)
    if problems:
        raise ConfigError(problems)
    return config


PLACEHOLDERS = {("output_dir",): ".", ("model", "name_or_path"): ".", ("data", "train"): "."}


def try_schema(tree: dict, schema: type[TrainConfig]) -> tuple[TrainConfig | None, list[str]]:
    """Validate types and names. With faults: (None, their messages and those of contradictions in the sound rest)."""
    try:
        return schema.model_validate(tree), []
    except ValidationError as error:
        faults = error.errors()
    problems = [describe(fault, schema) for fault in faults]
    sound = yaml.safe_load(yaml.safe_dump(tree))
    for fault in faults:
        remove(sound, fault["loc"])
    for location, value in PLACEHOLDERS.items():
        node = sound
        for key in location[:-1]:
            node = node.setdefault(key, {})
        node.setdefault(location[-1], value)
    # A faulty option now has its default: a contradiction with that would be none of the user's.
    faulty = {".".join(map(str, fault["loc"][:2])) for fault in faults if fault["type"] != "extra_forbidden"}
    try:
        for problem in contradictions(schema.model_validate(sound)):
            if not any(option in problem for option in faulty):
                problems.append(problem)
    except ValidationError:
        pass  # the first round has named what can be named
    return None, problems


def remove(tree: Any, location: tuple) -> None:
    """Delete the deepest key of `location` that exists in `tree`; tags of unions in the location are passed over."""
    parent, key = None, None
    for part in location:
        if isinstance(tree, dict) and part in tree:
            parent, key, tree = tree, part, tree[part]
    if parent is not None:
        del parent[key]


def describe(fault: dict, schema: type[BaseModel]) -> str:
    """One fault of pydantic in words: the option, what is wrong, and the nearest valid name or the given value."""
    name = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"{name}: unknown option; {nearest_option(name, schema)}"
    if fault["type"] == "missing":
        return f"{name}: is required and was not given"
    message = fault["msg"].removeprefix("Value error, ")
    return f"{name}: {message[0].lower() + message[1:]} (given: {fault['input']!r})"


def nearest_option(name: str, schema: type[BaseModel]) -> str:
    """The option that an unknown name may have meant: a sibling with a like name first, then any option or section."""
    section, _, leaf = name.rpartition(".")
    # Reversed, so that of two options with the same last part the first counts.
    everywhere = {option.split(".")[-1]: option for option in reversed([*schema.model_fields, *option_names(schema)])}
    siblings = {
        option.split(".")[-1]: option for option in option_names(schema) if option.rpartition(".")[0] == section
    }
    for known, cutoff in ((siblings, 0.6), (everywhere, 0.8)):
        if near := difflib.get_close_matches(leaf, known, n=1, cutoff=cutoff):
            return f"did you mean {known[near[0]]}?"
    return f"{section} has {', '.join(siblings)}" if section and siblings else "--help lists all options"


def option_names(schema: type[BaseModel], prefix: str = "") -> list[str]:
    names = []
    for name, field in schema.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            names += option_names(field.annotation, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def help_text(schema: type[BaseModel]) -> str:
    """All options with their types, defaults and docstrings, section by section."""
    lines = [
        f"{(schema.__doc__ or '').strip()}",
        "",
        "  --config FILE.yaml  options from a file; options after it override",
        "  --print_config      print the resolved options and leave",
    ]

    def add(model: type[BaseModel], prefix: str) -> None:
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                lines.extend(["", f"{name}: {(field.annotation.__doc__ or '').strip()}"])
                add(field.annotation, f"{prefix}{name}.")
                continue
            default = "required" if field.is_required() else f"default: {field.default}"
            text = " ".join((field.description or "").split())
            lines.append(f"  --{prefix}{name} ({default})\n        {text}")

    add(schema, "")
    return "\n".join(lines)
