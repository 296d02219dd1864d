"""A policy trained by TRL's GRPO or RLOO under a DeepSpeed JSON of ours, with a reward of ours in a process beside each
rank. The algorithm, its options and its loop are TRL's.

OUTPUT/config.yaml, environment.json, metrics.jsonl     as of a training
OUTPUT/checkpoint-N/                                    of TRL, from which the same command resumes
OUTPUT/final/                                           the policy
"""

import dataclasses
import json
import re
import shutil
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import torch.distributed as dist
from pydantic import Field

from hafrm_ds.clients.for_trl import beside
from hafrm_ds.config import NonNegative, Positive, PositiveInt
from hafrm_ds.data.sources import suggestion
from hafrm_ds.durability import write_whole
from hafrm_ds.engine.deepspeed_config import read_deepspeed_json
from hafrm_ds.engine.engine import check_build_tools, start_collectives
from hafrm_ds.errors import ConfigError, DataError, ModelError
from hafrm_ds.evaluation.report.reading import METRICS_FILE
from hafrm_ds.options import Section
from hafrm_ds.processes.agreement import environment
from hafrm_ds.processes.console import Console
from hafrm_ds.processes.parts import claim_folder, stamp
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.rewards.composition import open_reward
from hafrm_ds.saved.opening import Judge, Saved, identity_of_model, open_model
from hafrm_ds.scoring.prompts import read_prompts
from hafrm_ds.training.logging import truncate_rows

FINAL_FOLDER = "final"
CHECKPOINT = re.compile(r"checkpoint-\d+")
"""The form of the folder names that transformers takes for its checkpoints."""
WHOLE_FILE = "whole"
"""In a checkpoint that all ranks have written."""
LOGGED = {
    "reward": "reward",
    "reward_std": "reward/std",
    "kl": "kl",
    "completions/mean_length": "tokens",
    "completions/clipped_ratio": "truncated",
    "frac_reward_zero_std": "prompts/rewarded_alike",
    "entropy": "entropy",
    "loss": "loss",
    "grad_norm": "grad_norm",
}
"""What TRL calls a number -> its name in metrics.jsonl."""
OURS = {
    "output_dir": "output_dir",
    "deepspeed": "deepspeed",
    "max_steps": "max_steps",
    "num_generations": "num_generations",
    "max_completion_length": "max_new_tokens",
    "temperature": "temperature",
    "beta": "beta",
    "learning_rate": "learning_rate",
    "seed": "seed",
    "save_steps": "checkpoint_every",
    "trust_remote_code": "trust_remote_code",
    "gradient_accumulation_steps": "prompts_per_step",
}
"""What TRL calls an option -> the option of `PolicyOptions` that it follows from."""


class PolicyOptions(Section):
    """The options of launch/policy.py."""

    policy: str
    """Where the policy starts: a causal LM, or the final/ folder of a training."""
    reward: str
    """What is maximised: a model, a function FILE.py:NAME, or FILE.yaml, which composes rewards."""
    judge: Judge | None = None
    """Of a model, what scores: reward, implicit or combined. Default: the reward head."""
    prompts: Path
    """A file with the prompts."""
    output_dir: Path
    """The run folder."""
    method: Literal["grpo", "rloo"] = "grpo"
    """TRL's trainer."""
    chat_template: str | None = None
    """Name or file of a template, for a policy without one."""
    trust_remote_code: bool = False
    """Run modelling code that comes with the policy."""
    deepspeed: Path = Path("ds_configs/zero2.json")
    """A DeepSpeed JSON."""
    max_steps: PositiveInt = 500
    """Optimizer steps."""
    prompts_per_step: PositiveInt = 8
    """Prompts of a step, over all ranks."""
    num_generations: Annotated[int, Field(ge=2)] = 8
    """Answers to each prompt."""
    max_new_tokens: PositiveInt = 256
    """Longest answer in tokens."""
    temperature: Positive = 1.0
    """Of the answers."""
    beta: NonNegative = 0.04
    """Weight of the KL divergence from the start."""
    learning_rate: Positive = 1e-6
    """Of AdamW."""
    checkpoint_every: PositiveInt = 100
    """Save a checkpoint every N steps."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the draws and of the order of prompts."""
    trl: dict[str, Any] = Field(default={})
    """Further options of TRL's GRPOConfig or RLOOConfig: {loss_type: dr_grpo, top_p: 0.95}. Of these,
    per_device_train_batch_size says how many answers go through a GPU at once; the number of answers in a step stays
    the same."""


def train_policy(options: PolicyOptions, processes: Processes) -> None:
    """Train a policy, or resume it. All processes call this together.

    Raises:
        ConfigError, DataError, ModelError: options, prompts, policy or reward cannot be used.
    """
    try:
        import trl
    except ImportError as error:
        raise ModelError(f"launch/policy.py needs TRL: pip install -e '.[rl]' ({error})") from error
    log, folder = Console(processes), options.output_dir
    answers = options.prompts_per_step * options.num_generations
    if answers % processes.world_size:
        raise ConfigError(
            [
                f"--prompts_per_step {options.prompts_per_step} x --num_generations {options.num_generations} answers "
                f"cannot be shared by {processes.world_size} processes"
            ]
        )
    prompts = [each.messages for each in read_prompts("--prompts", options.prompts)]
    if len(prompts) < options.prompts_per_step:
        raise DataError(
            f"--prompts {options.prompts} has {len(prompts):,} prompts, fewer than a step takes "
            f"(--prompts_per_step {options.prompts_per_step:,})"
        )
    kind, config = {"grpo": (trl.GRPOTrainer, trl.GRPOConfig), "rloo": (trl.RLOOTrainer, trl.RLOOConfig)}[
        options.method
    ]
    refuse_options_of_trl(config, options)
    policy = open_policy(options)
    processes.from_first("claim", lambda: claim(options, processes))
    if (folder / FINAL_FOLDER).exists():
        log.print(f"{folder / FINAL_FOLDER} is there already")
        return
    check_build_tools(processes.device)
    processes.start_group()
    start_collectives()
    trainer = kind(
        model=options.policy,
        reward_funcs=beside(options.reward, judge=options.judge),
        args=arguments_of(config, options, processes),
        train_dataset=dataset_of(prompts),
        callbacks=[writer(folder, processes)],
        processing_class=policy.formatter().tokenizer if options.chat_template else None,
    )
    checkpoint = processes.from_first("checkpoint", lambda: newest_checkpoint(folder))
    if checkpoint is not None:
        log.print(f"resuming from {checkpoint}")
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.state.global_step < options.max_steps:
        raise ModelError(
            f"TRL has stopped after step {trainer.state.global_step:,} of --max_steps {options.max_steps:,}; what is "
            f"there is in {folder}, and no policy was saved"
        )
    trainer.save_model(str(folder / f"{FINAL_FOLDER}.part"))
    if processes.is_first:
        # Raises ModelError if it has not become a model.
        open_model(folder / f"{FINAL_FOLDER}.part", trust_remote_code=options.trust_remote_code)
        (folder / f"{FINAL_FOLDER}.part").rename(folder / FINAL_FOLDER)
        log.print(f"the policy, after step {trainer.state.global_step}, is in {folder / FINAL_FOLDER}")


def dataset_of(prompts: list[list[dict[str, Any]]]) -> Any:
    from datasets import Dataset

    return Dataset.from_list([{"prompt": prompt} for prompt in prompts])


def open_policy(options: PolicyOptions) -> Saved:
    """Raises ModelError if it cannot answer, or has no chat template."""
    saved = open_model(options.policy, chat_template=options.chat_template, trust_remote_code=options.trust_remote_code)
    if "logprob" not in saved.heads:
        raise ModelError(f"--policy {options.policy} has no LM head: it cannot answer")
    saved.formatter()
    return saved


def claim(options: PolicyOptions, processes: Processes) -> None:
    """Claim the run folder. Raises DataError if it holds a run with other options, prompts, policy or reward, and
    ModelError if one of these cannot be used."""
    content = {
        "policy": identity_of_model(open_policy(options)),
        "reward": open_reward(options.reward, judge=options.judge).identity(),
        "prompts": stamp(options.prompts),
    }
    how = {"output_dir", "checkpoint_every", "trust_remote_code"}
    how |= set() if options.chat_template else {"chat_template"}  # runs from before there was one resume
    asked = options.model_dump(mode="json", exclude=how)
    made = [options.output_dir / name for name in ("config.yaml", "environment.json", METRICS_FILE, FINAL_FOLDER)]
    claim_folder(options.output_dir, content | {"options": asked}, makes=made)
    write_whole(options.output_dir / "config.yaml", options.to_yaml().encode())
    facts = environment(processes.world_size, processes.device)
    write_whole(options.output_dir / "environment.json", json.dumps(facts, indent=2).encode())


def refuse_options_of_trl(config: Any, options: PolicyOptions) -> None:
    """Raises ConfigError for an option in --trl that TRL does not know, or that has one of ours."""
    known = {field.name for field in dataclasses.fields(config)}
    problems = [
        f"--trl: {config.__name__} has no option {name}{suggestion(name, known)}"
        for name in options.trl
        if name not in known
    ]
    problems += [f"--trl {name}: give --{OURS[name]} instead" for name in options.trl if name in OURS]
    if problems:
        raise ConfigError(problems)


def arguments_of(config: Any, options: PolicyOptions, processes: Processes) -> Any:
    """The arguments of TRL's trainer. Raises ConfigError if TRL refuses them."""
    on_gpu = processes.device.type == "cuda"
    of_rank = options.prompts_per_step * options.num_generations // processes.world_size
    at_once = options.trl.get("per_device_train_batch_size", of_rank)
    if not isinstance(at_once, int) or at_once < 1 or of_rank % at_once:
        raise ConfigError(
            [f"--trl per_device_train_batch_size {at_once} does not divide the {of_rank} answers of a process and step"]
        )
    given = {
        "output_dir": str(options.output_dir),
        "deepspeed": json_for_transformers(options.deepspeed),
        "use_cpu": not on_gpu,
        "bf16": True,
        "max_steps": options.max_steps,
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": of_rank // at_once,
        "num_generations": options.num_generations,
        "max_completion_length": options.max_new_tokens,
        "temperature": options.temperature,
        "beta": options.beta,
        "learning_rate": options.learning_rate,
        "seed": options.seed,
        "trust_remote_code": options.trust_remote_code,
        "save_steps": options.checkpoint_every,
        "save_total_limit": 2,
        "gradient_checkpointing": on_gpu,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
    }
    try:
        return config(**given | options.trl)
    except (TypeError, ValueError) as error:
        raise ConfigError([f"TRL refuses the options: {error}"]) from error


def json_for_transformers(file: Path) -> dict[str, Any]:
    """A DeepSpeed JSON of ours with the sizes of batches, which transformers fills in, and whole weights in what it
    saves. Raises ConfigError if it cannot be read."""
    content, problems = read_deepspeed_json(file)
    if content is None:
        raise ConfigError(problems)
    sizes = {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"}
    zero = content.get("zero_optimization", {}) | {"stage3_gather_16bit_weights_on_model_save": True}
    return sizes | content | {"zero_optimization": zero}


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def newest_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that all ranks have written whole, None without one; metrics.jsonl is left with the rows of
    its steps. Others are removed: transformers takes any folder of this name for one, also what a kill has left."""
    named = (each for each in folder.iterdir() if CHECKPOINT.fullmatch(each.name))
    found = sorted(filter(Path.is_dir, named), key=step_of)
    whole = [each for each in found if (each / WHOLE_FILE).exists()]
    for each in set(found) - set(whole):
        shutil.rmtree(each)
    truncate_rows(folder / METRICS_FILE, step_of(whole[-1]) if whole else 0, False)
    return str(whole[-1]) if whole else None


def writer(folder: Path, processes: Processes) -> Any:
    """A callback that marks whole checkpoints, and appends a row to metrics.jsonl for each step, with its seconds."""
    from transformers import TrainerCallback

    class Writer(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            dist.barrier()  # each rank writes its part
            if processes.is_first:
                (folder / f"checkpoint-{state.global_step}" / WHOLE_FILE).touch()

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.monotonic()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            found = {name: float(logs[theirs]) for theirs, name in LOGGED.items() if logs and theirs in logs}
            if "reward" in found and processes.is_first:
                row = {"step": state.global_step, "kind": "policy", **found, "seconds": time.monotonic() - self.started}
                with (folder / METRICS_FILE).open("a") as lines:
                    lines.write(json.dumps(row) + "\n")

    return Writer()
