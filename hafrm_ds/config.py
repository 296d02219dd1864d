"""The configuration of a run: one typed tree, and the rules between its options.

The docstring under a field is its help text. `hafrm_ds.options` reads the tree from files and the command line.
"""

import datetime
import difflib
import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationError, WrapValidator, model_validator

from hafrm_ds.data.sources import EvalSources, TrainSources
from hafrm_ds.options import Section, option_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hafrm_ds.data.formatting import ChatFormatter
    from hafrm_ds.data.preparation import PreparationOptions

Share = Annotated[float, Field(ge=0, le=1)]
OpenShare = Annotated[float, Field(gt=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
PositiveInt = Annotated[int, Field(ge=1)]
# YAML reads an unquoted 2024-07-26 as a date.
Day = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, datetime.date) else value)]

# And an unquoted off as false.
Fused = Annotated[
    Literal["auto", "liger", "compile", "compile_layers", "off"],
    BeforeValidator(lambda value: "off" if value is False else value),
]


def in_one_message(message: str) -> WrapValidator:
    """One message for all members of a union."""

    def validator(value, validate):
        try:
            return validate(value)
        except ValidationError as error:
            raise ValueError(message) from error

    return WrapValidator(validator)


TokenBudget = Annotated[PositiveInt | Literal["auto"], in_one_message("must be a whole number above 0, or auto")]
Recomputation = Annotated[
    bool | Literal["selective"] | Annotated[str, Field(pattern=r"^every_([2-9]|[1-9][0-9]+)$")],
    in_one_message("must be true, false, selective, or every_N with N above 1, as every_2"),
]
Resume = Annotated[Literal["auto", "none"] | Path, in_one_message("must be auto, none, or the path of a checkpoint")]
AttributeName = Annotated[str, Field(pattern=r"^\w[\w .-]*$")]
LayerNames = Annotated[
    Annotated[list[str], Field(min_length=1)] | Literal["all-linear"],
    in_one_message("must be a list of layer names as [q_proj, v_proj], or all-linear"),
]


class LoraOptions(Section):
    """Low-rank adapters (LoRA): the body and the LM head stay as they are, and a layer with the weight W computes with
    W + alpha / rank * B A, of which A and B are trained. The reward head is trained in full all the same."""

    rank: Annotated[int, Field(ge=0)] = 0
    """Rank of the adapters; 0: none, all weights are trained."""
    alpha: Positive = 16.0
    """Scale of the adapters, as a multiple of 1 / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of an adapter's inputs that is dropped in training steps, and nowhere else. The masks depend on the number
    of GPUs and on the token budget, unlike anything else in a run."""
    targets: LayerNames = "all-linear"
    """Which layers get adapters: the last parts of their names, as [q_proj, v_proj], or all-linear: all but the LM
    head."""
    quantize: Literal["none", "4bit", "8bit"] = "none"
    """Keep the frozen weights in 4 bits (NF4) or 8 bits (QLoRA; needs the package bitsandbytes): for ZeRO 0 to 2. The
    reference is then the quantised model, and so is what the saved model is merged from."""


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
    attention: Literal["auto", "fa3", "fa2", "fa4", "varlen", "segmented"] = "auto"
    """Kernel of the layouts without padding. auto: the first of these that runs here. fa3, fa2, fa4: the packages of
    FlashAttention 3, 2 and 4. varlen: the FlashAttention inside torch. segmented: torch's scaled_dot_product_attention,
    segment by segment, for CPU, float32 and soft caps."""
    log_probs: Literal["torch", "triton"] = "torch"
    """What turns blocks of the LM head's products into log-probs and their gradient. torch: its own operations. triton:
    a kernel for each, which reads and writes a logit once, on NVIDIA GPUs."""
    fused: Fused = "auto"
    """Compute the norms, rotary embeddings and gated MLPs of a layer by one kernel each. liger: the package
    liger-kernel, on NVIDIA GPUs. compile: torch.compile of each. compile_layers: torch.compile of whole layers, but
    neither under ZeRO-3 nor for mixtures of experts. auto: liger on a GPU where it is installed, else off."""
    router_aux_loss: Literal["own"] | None = None
    """own: of a mixture of experts, add the load-balancing loss of its routers by the weight in its own configuration
    (router_aux_loss_coef). It is computed for each pair. Default: it is not trained."""
    gradient_checkpointing: Recomputation = False
    """What backward recomputes of a layer, to save memory. selective: all but its matrix products and attention; half
    of the activations stay, for about a twentieth more time. true: all of it; its input alone stays, for about a third
    more compute. every_N (every_2, every_3): all of every N-th layer, and nothing of the others."""
    reward_head_bias: bool = False
    """Give the reward head a bias. It cancels in every pair, so it only moves the zero of the score."""
    reward_head_init: Literal["normal", "zero", "from_model"] = "normal"
    """normal: N(0, 1/(hidden size + 1)). zero: all rewards start at 0, as the paper's code intends. from_model: that of
    a finished reward model, the final/ folder of a training or a sequence-classification model with tied embeddings."""
    attributes: list[AttributeName] = Field(default=[])
    """Attributes of answers, as [helpfulness, correctness], that a linear head beside the reward head learns to give by
    regression on the numbers in the rows' `attributes`. It starts at the mean of each, and at the learning rate of the
    reward head."""
    lora: LoraOptions = LoraOptions()


class DataConfig(Section):
    """Preference pairs: where they come from, how they are rendered and what is truncated or dropped."""

    train: TrainSources
    """Training pairs: a path, hub id or preset:NAME with an optional row filter (`pairs.jsonl?split=train`), a mapping,
    or a list of these."""
    eval: EvalSources = Field(default={})
    """Named evaluation sets: one source, or a mapping from name to source or list of sources."""
    chat_template: str | None = None
    """Template for conversations: a name (chatml, phi-2, mistral-instruct, text), a .jinja file, or nothing for the
    tokenizer's own."""
    template_date: Day = "2024-07-26"
    """The day (YYYY-MM-DD) that templates which print today's date are frozen to, so that scores do not depend on the
    day."""
    reasoning: Literal["drop"] | None = None
    """drop: what stands before </think> in an answer is no part of it, and is taken out before the template sees it, in
    training and by whatever renders with the saved tokenizer. Default: it is part of the answer, and a template that
    leaves it out is refused."""
    max_length: Annotated[int, Field(ge=4)] = 1024
    """Longest conversation, prompt and response together, in tokens."""
    truncation: Literal["drop", "keep_prompt_end", "cut_response"] = "keep_prompt_end"
    """What happens to a pair whose longer conversation exceeds max_length. drop: the pair is dropped. keep_prompt_end:
    the start of the prompt is truncated (a leading BOS is kept) until the longer response fits. cut_response: both
    responses are truncated at the end."""
    max_dropped_share: Share = 0.05
    """The run stops when a larger share of the selected pairs would be dropped: empty, identical or over-long ones, and
    those without a common prompt or an answer at the end."""
    num_proc: PositiveInt | None = None
    """Processes that tokenise. Default: one per core, at most 16."""
    cache_dir: Path | None = None
    """Where prepared data is kept between runs. Default: the cache folder of Hugging Face datasets."""

    @property
    def preparation(self) -> "PreparationOptions":
        """The options that preparing pairs takes."""
        from hafrm_ds.data.preparation import PreparationOptions  # takes seconds to import, and --help needs none of it

        names = [field.name for field in fields(PreparationOptions)]
        return PreparationOptions(**{name: getattr(self, name) for name in names})

    def formatter(self, tokenizer: "PreTrainedTokenizerBase") -> "ChatFormatter":
        """How conversations are rendered and encoded."""
        from hafrm_ds.data.formatting import ChatFormatter

        return ChatFormatter.create(tokenizer, self.chat_template, self.template_date, self.reasoning)


class ObjectiveConfig(Section):
    """L = rm_weight * L_reward + alpha * L_policy, each a mean over the groups of the global batch, pairs among them
    (HAF-RM)."""

    alpha: NonNegative | None = 0.2
    """Weight of the policy loss. 0 is the paper's baseline: no LM head and no reference log-probs are computed. null
    where policy_share finds it."""
    policy_share: OpenShare | None = None
    """Instead of alpha: the share |a g_p| / (|g_r| + |a g_p|) of the pull on the body that the policy loss is given, by
    the norms of both losses' gradients. alpha is found from the first global batches before the first step."""
    policy_share_every: PositiveInt | None = None
    """Keep the share: measure it every N steps and move alpha towards it. Default: alpha stays as it was found."""
    rm_weight: NonNegative = 1.0
    """Weight of the reward loss. 0 trains the policy alone (the paper's DPO model); the reward head stays as it was."""
    beta: Positive = 0.1
    """Strength of the implicit KL constraint in dpo, ipo and hinge; scale of the margin in simpo."""
    policy_loss: Literal["dpo", "ipo", "hinge", "simpo", "sft"] = "dpo"
    """dpo, ipo and hinge use reference log-probs; simpo (length-averaged) and sft (on the chosen answer) need none."""
    ranking_loss: Literal["pairwise", "plackett_luce", "best"] = "pairwise"
    """The loss of a group of answers, for both heads. pairwise: the mean over its comparisons. plackett_luce: the
    probability of its whole order. best: the probability of its best answer among all. The last two know no margins, no
    label smoothing and no soft labels, and of the policy losses dpo alone; of a pair they are the loss of pairwise."""
    normalize_by: Literal["group", "comparison"] = "group"
    """The unit that counts alike in a step: each group, whatever it holds, or each comparison."""
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
    attributes_weight: Positive = 1.0
    """Weight of the regression of model.attributes: the mean squared error over the known values of a group."""
    alternate_every: Annotated[int, Field(ge=0)] = 0
    """0: both losses at every step. k: blocks of k steps with the policy loss alone, then k with the reward loss alone,
    and so on."""

    @model_validator(mode="before")
    @classmethod
    def _alpha_or_its_share(cls, given: Any) -> Any:
        """With policy_share there is no alpha, and one that is given beside it contradicts it."""
        if isinstance(given, dict) and given.get("policy_share") is not None:
            if given.get("alpha") is not None:
                raise ValueError(
                    f"alpha is {given['alpha']} and policy_share {given['policy_share']}, but the share finds its own "
                    "alpha: leave one of the two out (--objective.alpha null takes back that of a file)"
                )
            given = {**given, "alpha": None}
        return given

    @property
    def uses_reward(self) -> bool:
        return self.rm_weight > 0

    @property
    def heads(self) -> tuple[str, ...]:
        """The heads that an evaluation in training runs, of "reward" and "logprob"."""
        return ("reward",) * self.uses_reward + ("logprob",) * self.uses_policy

    @property
    def uses_policy(self) -> bool:
        return self.policy_share is not None or bool(self.alpha)

    @property
    def uses_reference(self) -> bool:
        return self.uses_policy and self.policy_loss in ("dpo", "ipo", "hinge")

    @property
    def has_combined_judge(self) -> bool:
        """Whether both heads give a reward, so that they can judge as one."""
        return self.uses_reward and self.uses_reference

    @property
    def measures(self) -> list[str]:
        """Metrics of an evaluation by which steps can be told better from worse. The first is the usual one."""
        judges = {
            "reward": self.uses_reward,
            "implicit": self.uses_reference,
            "logprob": self.uses_policy,
            "combined": self.has_combined_judge,
        }
        losses = {"reward": self.uses_reward, "policy": self.uses_policy}
        return [
            f"{kind}/{name}"
            for kind, names in (("accuracy", judges), ("margin", judges), ("loss", losses))
            for name, is_there in names.items()
            if is_there
        ]


class BatchConfig(Section):
    """How groups, mostly pairs, become optimizer steps and micro-batches. Their order never depends on the number of
    GPUs."""

    global_batch_size: PositiveInt = 64
    """Pairs, or groups of answers, in one optimizer step, over all GPUs."""
    max_tokens_per_micro_batch: TokenBudget = 8192
    """Token budget of one forward and backward on one GPU. More is faster until memory runs out. auto: found at the
    start from what two micro-batches need, the same on all GPUs, and written into the run's config.yaml; a resumed run
    keeps it."""
    layout: Literal["auto", "shared_prefix", "packed", "padded"] = "auto"
    """shared_prefix: a prompt stands once for both answers, no padding. packed: no padding, the prompt repeated.
    padded: the model's stock attention on padded rows. auto: shared_prefix, or padded, with a warning, for a model that
    cannot keep packed answers apart."""

    @property
    def token_budget(self) -> int:
        """max_tokens_per_micro_batch, once "auto" has been settled (`hafrm_ds.training.preflight`)."""
        assert self.max_tokens_per_micro_batch != "auto"
        return self.max_tokens_per_micro_batch


class OptimizerConfig(Section):
    """AdamW and its learning-rate schedule."""

    learning_rate: Positive = 1e-5
    """Peak learning rate of the body and the LM head, or of their adapters."""
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
    reduce_in_fp32: bool = False
    """Average gradients over GPUs in fp32, not in the type of the weights: twice the bytes, and no rounding for each
    GPU. Worth it from about 16 GPUs on (ds_configs/README.md)."""
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

    @model_validator(mode="before")
    @classmethod
    def _without_per_token(cls, given: Any) -> Any:
        """Accept the config.yaml of an older run, which has an option that is gone, unless it was in use."""
        if isinstance(given, dict) and "per_token" in given:
            if given["per_token"] is not False:
                raise ValueError("per_token is gone, as nothing read what it stored; leave it out")
            given = {name: value for name, value in given.items() if name != "per_token"}
        return given


class EvaluationConfig(Section):
    """Evaluation during training, on every set of data.eval."""

    every_steps: Annotated[int, Field(ge=0)] = 0
    """Evaluate every N steps; 0: only before the first step and after the last."""
    at_start: bool = True
    """Evaluate before the first step, so that every later figure has its starting point."""
    max_pairs: PositiveInt | None = None
    """Use at most this many pairs of each set: a fixed random choice."""
    best_metric: str | None = None
    """SET/METRIC whose best step is remembered, for example hh/accuracy/reward; a loss (hh/loss/reward) is better when
    it is smaller. Default: the first set's accuracy of the reward head, or the implicit reward's when rm_weight is 0.
    """
    patience: PositiveInt | None = None
    """End the run early when best_metric has not improved in this many evaluations, one after another."""


class CheckpointConfig(Section):
    """Checkpoints in OUTPUT_DIR/checkpoints, from which a run is resumed. A signal to stop always saves one."""

    every_steps: Annotated[int, Field(ge=0)] = 0
    """Save every N steps; 0: not by steps."""
    every_minutes: NonNegative = 30.0
    """Save when this many minutes have passed since the last save; 0: not by time."""
    keep_last: PositiveInt = 2
    """Keep this many of the newest checkpoints. Of those that were evaluated the best is kept besides."""
    final: Literal["last", "best"] = "last"
    """Which weights final/ gets. last: those after the last step. best: those after the best evaluation by
    evaluation.best_metric; each evaluation that is the best so far is then followed by a save."""
    allow_changed: list[str] = Field(default=[])
    """Options that may differ from the run that is resumed, for example [optimizer.learning_rate]. model.name_or_path,
    data.train and data.eval stand for the content of these."""


class LoggingConfig(Section):
    """What a run writes and shows. metrics.jsonl is always written."""

    every_steps: PositiveInt = 1
    """Write training metrics every N steps."""
    gradient_shares_every: Annotated[int, Field(ge=0)] = 0
    """Every N steps measure how strongly each loss pulls the body, and write a row of kind gradients; 0: never. Such a
    step takes one more forward and backward of the reward loss, and nothing that is trained changes."""
    tensorboard: bool = True
    """Write TensorBoard files into OUTPUT_DIR/tensorboard."""
    report: bool = True
    """Draw OUTPUT_DIR/report.html at the end and when the run is stopped; takes about a second."""
    wandb_project: str | None = None
    """Also log to this Weights & Biases project (needs the package wandb)."""


class ScoringSection(Section):
    """How a saved model is opened to score with it."""

    max_tokens_per_micro_batch: PositiveInt = 8192
    """Token budget of one forward pass."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Type of the weights. Default: that of the saved weights."""
    reasoning: Literal["drop"] | None = None
    """drop: of a model that was not trained here, what stands before </think> in an answer is taken out before it is
    rendered. Default: a conversation that loses it by the model's template is not scored."""
    trust_remote_code: bool = False
    """Run modelling code that comes with a model."""
    trust_pickle: bool = False
    """Read weights that are not in safetensors."""

    @property
    def loading(self) -> dict[str, Any]:
        """The options that `saved.opening.open_model` takes."""
        names = ("dtype", "chat_template", "reasoning", "trust_remote_code", "trust_pickle")
        return {name: getattr(self, name) for name in names if name in type(self).model_fields}


class TrainConfig(Section):
    """A training run."""

    output_dir: Path
    """Folder of the run: config, metrics, TensorBoard files, checkpoints and the final model."""
    deepspeed: Path = Path("ds_configs/zero3.json")
    """A DeepSpeed JSON file. Its "auto" values are filled from this configuration; a value that contradicts it is an
    error."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    """Seed of the data order, of the mixing of sources, of the reward head and of adapters."""
    deterministic: bool = False
    """Only algorithms that give equal bits in equal runs on equal GPUs: in torch, in attention's backward pass and in
    NCCL. They are slower. What has none is refused by name. On CPUs every run is so."""
    epochs: Positive = 1.0
    """Passes over the training pairs. Ignored when max_steps is given."""
    max_steps: PositiveInt | None = None
    """Optimizer steps."""
    resume: Resume = "none"
    """auto: resume from the newest whole checkpoint in output_dir, or start if there is none. PATH: resume from this
    checkpoint. none: start; a folder that holds a run is refused."""
    model: ModelConfig
    data: DataConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    reference: ReferenceConfig = ReferenceConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.run.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    @property
    def run(self) -> "TrainConfig":
        """The options of the training alone: without those that an entry file adds of its own."""
        if type(self) is TrainConfig:
            return self
        return TrainConfig.model_construct(**{name: getattr(self, name) for name in TrainConfig.model_fields})

    def contradictions(self) -> list[str]:
        objective, problems = self.objective, []
        if objective.alpha is None and objective.policy_share is None:
            problems.append("objective.alpha is null: give it a value, or give objective.policy_share, which finds one")
        elif not objective.uses_reward and not objective.uses_policy:
            problems.append("objective.rm_weight and objective.alpha are both 0: there is nothing to train")
        if objective.alternate_every and not (objective.uses_reward and objective.uses_policy):
            problems.append(
                f"objective.alternate_every is {objective.alternate_every}, but alternating needs both losses: "
                f"rm_weight is {objective.rm_weight}, alpha is {objective.alpha}"
            )
        problems += share_problems(self)
        problems += attribute_problems(self)
        problems += reward_loss_problems(self)
        if objective.policy_label_smoothing and objective.policy_loss != "dpo":
            problems.append(
                f"objective.policy_label_smoothing is defined for policy_loss dpo, not for {objective.policy_loss}"
            )
        if objective.ranking_loss != "pairwise":
            undefined = {
                f"policy_loss {objective.policy_loss}": objective.uses_policy and objective.policy_loss != "dpo",
                "policy_label_smoothing": objective.policy_label_smoothing > 0,
                "reward_label_smoothing": objective.reward_label_smoothing > 0,
                "use_margin": objective.use_margin,
            }
            problems += [
                f"objective.ranking_loss {objective.ranking_loss} is not defined with objective.{name}: leave one out"
                for name, is_there in undefined.items()
                if is_there
            ]
        if not objective.uses_reward and objective.use_margin:
            problems.append("objective.use_margin belongs to the reward loss, but objective.rm_weight is 0")
        if self.evaluation.every_steps and not self.data.eval:
            problems.append(
                f"evaluation.every_steps is {self.evaluation.every_steps}, but data.eval names no evaluation set; "
                "give data.eval, or set evaluation.every_steps to 0"
            )
        for name, needs in (
            ("evaluation.patience", self.evaluation.patience is not None),
            ("checkpoint.final best", self.checkpoint.final == "best"),
        ):
            if needs and not (self.evaluation.every_steps and self.data.eval):
                problems.append(f"{name} needs evaluations during training: set evaluation.every_steps and data.eval")
        if unknown := unknown_best_metric(self):
            problems.append(unknown)
        lora = self.model.lora
        if lora.quantize != "none" and not lora.rank:
            problems.append(
                f"model.lora.quantize is {lora.quantize}, but model.lora.rank is 0: quantised weights cannot be trained"
            )
        known = option_names(TrainConfig)
        for name in self.checkpoint.allow_changed:
            if name not in known:
                near = "".join(f"; did you mean {option}?" for option in difflib.get_close_matches(name, known, n=1))
                problems.append(f"checkpoint.allow_changed names the unknown option {name!r}{near}")
        budget = self.batch.max_tokens_per_micro_batch
        if budget != "auto" and self.data.max_length > budget:
            problems.append(
                f"data.max_length {self.data.max_length} exceeds batch.max_tokens_per_micro_batch "
                f"{budget}: one conversation may not fit in a micro-batch"
            )
        return problems


def options_of(tree: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Dotted option name -> value, for the options of all sections; data sources are values, whatever they hold."""
    for name, value in tree.items():
        if isinstance(value, dict) and prefix != "data.":
            yield from options_of(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def defaults_of(section: type[Section], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Dotted option name -> its default in JSON's types, for all options that have one."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from defaults_of(field.annotation, f"{prefix}{name}.")
        elif not field.is_required():
            yield prefix + name, json.loads(json.dumps(field.get_default(call_default_factory=True), default=str))


def share_problems(config: TrainConfig) -> Iterator[str]:
    """Contradictions among the options that weigh the two losses by their gradients, one message each."""
    objective = config.objective
    asked = {
        "objective.policy_share": objective.policy_share is not None,
        "logging.gradient_shares_every": config.logging.gradient_shares_every > 0,
    }
    faults = {
        "objective.rm_weight is 0": not objective.uses_reward,
        "objective.alpha is 0": not objective.uses_policy,
        f"objective.alternate_every is {objective.alternate_every}": objective.alternate_every > 0,
    }
    wrong = " and ".join(fault for fault, is_there in faults.items() if is_there)
    if wrong and (name := next((name for name, is_asked in asked.items() if is_asked), None)):
        yield f"{name} needs both losses in every step, but {wrong}"
    has_attributes = bool(config.model.attributes)
    measured = next((name for name, is_asked in asked.items() if is_asked), None)
    third = {"model.router_aux_loss": config.model.router_aux_loss is not None, "model.attributes": has_attributes}
    for name in (name for name, is_there in third.items() if measured and is_there):
        yield f"{measured} measures two losses, but {name} adds a third: leave one of the two out"
    if objective.policy_share is not None and config.model.reward_head_init == "zero":
        yield (
            "objective.policy_share cannot begin with model.reward_head_init zero: through a head of zeros the reward "
            "loss gives the body no gradient, so there is nothing to share"
        )
    if objective.policy_share_every is not None and objective.policy_share is None:
        yield "objective.policy_share_every keeps a share, but objective.policy_share is not given"


def attribute_problems(config: TrainConfig) -> Iterator[str]:
    """Contradictions between the attributes of the model and what it is trained for, one message each."""
    names, objective = config.model.attributes, config.objective
    if len(set(names)) < len(names) or "reward" in names:
        yield f"model.attributes {names} must be different names, and none of them reward"
    if names and not objective.uses_reward:
        yield "model.attributes stand beside the reward, but objective.rm_weight is 0: leave one of the two out"
    if not names and objective.attributes_weight != 1:
        yield (
            f"objective.attributes_weight is {objective.attributes_weight}, but model.attributes names no attribute: "
            "leave it out, or name some"
        )


def reward_loss_problems(config: TrainConfig) -> Iterator[str]:
    """Contradictions between what is trained and the sources that train the policy loss alone, one message each."""
    objective, apart = config.objective, [source for source in config.data.train if not source.reward_loss]
    for name, sources in config.data.eval.items():
        if not all(source.reward_loss for source in sources):
            yield f"data.eval {name}: reward_loss is of training sources; leave it out"
    if not apart:
        return
    named = f"data.train: reward_loss is false for {', '.join(source.label_in_reports for source in apart)}, but"
    if not objective.uses_policy:
        yield f"{named} objective.alpha is 0: these pairs would train nothing"
    elif not objective.uses_reward:
        yield f"{named} objective.rm_weight is 0: no pair trains the reward loss; leave it out"
    elif len(apart) == len(config.data.train):
        yield f"{named} there is no other source: the reward head would get no gradient, while its body is trained"


def unknown_best_metric(config: TrainConfig) -> str | None:
    """What is wrong with evaluation.best_metric, if it is given and no evaluation has it."""
    best, sets, measures = config.evaluation.best_metric, config.data.eval, config.objective.measures
    known = [f"{name}/{measure}" for name in sets for measure in measures]
    if best is None or best in known:
        return None
    near = "".join(f"; did you mean {name}?" for name in difflib.get_close_matches(best, known, n=1))
    return (
        f"evaluation.best_metric {best!r} is not measured in this run{near} (SET/METRIC, with a set of data.eval, "
        f"known: {', '.join(sets) or 'none'}, and one of {', '.join(measures)})"
    )
