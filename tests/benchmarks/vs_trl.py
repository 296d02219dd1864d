"""A training step of hafrm_ds against TRL's trainers and against the way of the official recipe, on the same pairs.

    python tests/benchmarks/vs_trl.py MODEL DATA [--steps N] [--pairs N] [--threads N] [--only NAME ...] [--fused KIND]

Trains one model (a folder or hub id) on the same preference pairs (a source with prompt, chosen and rejected, for
example 'pairs.jsonl?split=train') with each contender, all in one process and in turns: every contender makes one
optimizer step on the first batch, then every one on the second, and so on. What else the machine does then meets all
alike. Laying out or collating the batch, forward, backward, clipping and the update are timed. Contenders:

trl_dpo_*: TRL's DPOTrainer with precomputed references. trl_reward_*: TRL's RewardTrainer. Both by their own data
    loader, training_step and optimizer, under TRL's default bf16 autocast and without gradient checkpointing; _fp32
    with fp32 weights, TRL's default, _bf16 with bf16 weights. The faster of the two stands in the ratios.
recipe: both heads on one padded forward of the stock model, log-probs by an fp32 log-softmax of the logits of all
    tokens, the reference a second model run at every step; bf16 weights and AdamW on these.
ours: the model, layout, micro-batches and objective of training. No launcher and no DeepSpeed, so that the ratio
    compares the computation; what DeepSpeed's bf16 optimizer adds is kept: fp32 master weights and gradients.

All have the same AdamW, learning rate, clipping, number of threads and conversations, none of them truncated, and
torch's allocations on huge pages (THP_MEM_ALLOC_ENABLE=1), as training has them. That TRL's trainers see the same
tokens is asserted before anything is timed. Tokens a second count the tokens of prompts once and of both answers. Peak
memory is that of a process of its own, which makes two steps on the batch that is largest in the contender's layout.
"""

import os

os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # torch reads it at its first allocation

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import median

import datasets
import numpy as np
import torch
import transformers
import trl
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerBase

from hafrm_ds.config import BatchConfig, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.lengths import GroupLengths
from hafrm_ds.data.micro_batches import MicroBatch, make_micro_batch
from hafrm_ds.data.packing import lay_out
from hafrm_ds.data.planning import BatchPlan, partition_into_micro_batches
from hafrm_ds.data.preparation import prepare_groups
from hafrm_ds.data.reading import read_groups
from hafrm_ds.data.tokenization import TokenizedGroup
from hafrm_ds.engine.engine import make_optimizer, parameter_groups
from hafrm_ds.model.hybrid import HybridModel, disable_dropout, make_reward_head, model_inputs, sum_by_response
from hafrm_ds.model.loading import load_hybrid_model, load_tokenizer
from hafrm_ds.objective import ResponseScores, joint_loss, weights_at

MAX_LENGTH = 512
"""Longer pairs are left out: 16 padded rows of 1,024 tokens do not fit into 24 GB beside the models."""


# ---- the pairs -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batches:
    """The batches of all steps: tokenised for us, and the same rows as messages for TRL."""

    pairs: list[list[TokenizedGroup]]
    rows: list[list[dict]]
    tokenizer: PreTrainedTokenizerBase

    @property
    def dataset(self) -> datasets.Dataset:
        return datasets.Dataset.from_list(list(chain.from_iterable(self.rows)))

    def tokens(self, step: int) -> int:
        """Prompts once and both answers."""
        return int(sum(len(pair.prompt_ids) + sum(map(len, pair.responses)) for pair in self.pairs[step]))

    def largest(self, layout: str) -> "Batches":
        """The batch with the most tokens, padding included, twice."""
        groups = [[pair.ids for pair in pairs] for pairs in self.pairs]
        step = max(range(len(groups)), key=lambda step: lay_out(groups[step], layout).input_ids.numel())
        return Batches([self.pairs[step]] * 2, [self.rows[step]] * 2, self.tokenizer)


def load_batches(config: TrainConfig, num_steps: int) -> Batches:
    formatter = ChatFormatter.create(load_tokenizer(config.model), config.data.chat_template, config.data.template_date)
    prepared = prepare_groups(
        config.data.train, formatter=formatter, options=config.data.preparation, role="train", seed=config.seed
    )
    messages = read_groups(config.data.train, role="train", seed=config.seed, cache_dir=config.data.cache_dir)
    place = {name: row for row, name in enumerate(messages["id"])}
    plan = BatchPlan(len(prepared), config.batch.global_batch_size, config.seed)
    pairs = [[prepared[index] for index in plan.global_batch(step)] for step in range(num_steps)]
    rows = [[messages[place[pair.id]] for pair in batch] for batch in pairs]
    names = ("prompt", "chosen", "rejected")
    rows = [[dict(zip(names, (row["prompt"], *row["answers"]), strict=True)) for row in batch] for batch in rows]
    return Batches(pairs, rows, formatter.tokenizer)


# ---- contenders ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """step: makes the optimizer step of a number, from 0, and returns its loss. reference_seconds: what log-probs of
    the reference took beforehand, for all pairs; reference: they themselves, [pairs, 2]."""

    step: Callable[[int], float]
    reference_seconds: float | None = None
    reference: np.ndarray | None = None


class TimedDPOTrainer(trl.DPOTrainer):
    """TRL's trainer, which computes the references when it is made; adds up what they take."""

    reference_seconds = 0.0

    def compute_ref_log_probs(self, model, inputs):
        started = time.perf_counter()
        result = super().compute_ref_log_probs(model, inputs)
        self.reference_seconds += time.perf_counter() - started
        return result


def trl_options(config: TrainConfig, folder: str) -> dict:
    """Of both trainers: their defaults but for what must be the same everywhere, and checkpointing."""
    optimizer = config.optimizer
    return {
        "output_dir": folder,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "max_length": MAX_LENGTH,
        "per_device_train_batch_size": config.batch.global_batch_size,
        "train_sampling_strategy": "sequential",
        "optim": "adamw_torch_fused",
        "learning_rate": optimizer.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": optimizer.weight_decay,
        "adam_beta1": optimizer.betas[0],
        "adam_beta2": optimizer.betas[1],
        "adam_epsilon": optimizer.epsilon,
        "max_grad_norm": optimizer.max_gradient_norm,
    }


def check_same_tokens(trainer, batches: Batches) -> None:
    """The trainer's batches hold our token ids in our order and, for DPO, begin the answers at the same tokens."""

    def rows(batch: dict, mask: str) -> list[list[int]]:
        return [ids[kept.bool()].tolist() for ids, kept in zip(batch["input_ids"], batch[mask])]

    for number, (pairs, batch) in enumerate(zip(batches.pairs, trainer.get_train_dataloader(), strict=True)):
        prompts = [list(pair.prompt_ids) for pair in pairs] * 2
        answers = [list(pair.responses[side]) for side in (0, 1) for pair in pairs]
        whole = [prompt + answer for prompt, answer in zip(prompts, answers)]
        assert rows(batch, "attention_mask") == whole, (
            f"{type(trainer).__name__} sees other tokens in step {number + 1}"
        )
        if "completion_mask" in batch:
            assert rows(batch, "completion_mask") == answers, f"TRL's answers begin elsewhere in step {number + 1}"


def step_of_trl(trainer, num_steps: int) -> Callable[[int], float]:
    """What the trainer's own loop does for each batch, one batch a call."""
    trainer.create_optimizer_and_scheduler(num_training_steps=num_steps)
    model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.optimizer, trainer.current_gradient_accumulation_steps = optimizer, 1
    batches = iter(trainer.get_train_dataloader())

    def step(number: int) -> float:
        loss = trainer.training_step(model, next(batches))
        trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        optimizer.step()
        model.zero_grad()
        return loss.item()

    return step


def trl_dpo(config: TrainConfig, batches: Batches, dtype: torch.dtype) -> Contender:
    with tempfile.TemporaryDirectory() as folder:
        trainer = TimedDPOTrainer(
            AutoModelForCausalLM.from_pretrained(config.model.name_or_path, dtype=dtype),
            args=trl.DPOConfig(
                **trl_options(config, folder), beta=config.objective.beta, precompute_ref_log_probs=True
            ),
            train_dataset=batches.dataset,
            processing_class=batches.tokenizer,
        )
    check_same_tokens(trainer, batches)
    reference = np.array([trainer.train_dataset[f"ref_{side}_logps"] for side in ("chosen", "rejected")]).T
    return Contender(step_of_trl(trainer, len(batches.rows)), trainer.reference_seconds, reference)


def trl_reward(config: TrainConfig, batches: Batches, dtype: torch.dtype) -> Contender:
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.RewardTrainer(
            AutoModelForSequenceClassification.from_pretrained(config.model.name_or_path, num_labels=1, dtype=dtype),
            args=trl.RewardConfig(**trl_options(config, folder)),
            train_dataset=batches.dataset,
            processing_class=batches.tokenizer,
        )
    check_same_tokens(trainer, batches)
    return Contender(step_of_trl(trainer, len(batches.rows)))


def recipe(config: TrainConfig, batches: Batches) -> Contender:
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(config.model.name_or_path, dtype=torch.bfloat16) for _ in range(2)
    )
    reference.requires_grad_(False)
    disable_dropout(policy)
    head = make_reward_head(
        policy.config.hidden_size, bias=False, init="normal", dtype=torch.bfloat16, seed=config.seed
    )
    model = HybridModel(policy, head)
    _, optimizer = make_optimizer(parameter_groups(model, config.optimizer), config.optimizer, {})
    assert optimizer is not None

    def scores(causal_lm: nn.Module, batch) -> tuple[Tensor, Tensor]:
        """Hidden states [rows, width, H] and summed log-probs [N]."""
        output = causal_lm(**model_inputs(batch), output_hidden_states=True)
        every_token = output.logits.float().log_softmax(-1).flatten(0, 1)
        return output.hidden_states[-1], sum_by_response(every_token[batch.predict_index, batch.target_ids], batch)

    def step(number: int) -> float:
        pairs = batches.pairs[number]
        micro_batch = make_micro_batch(pairs, range(len(pairs)), "padded")
        batch = micro_batch.batch
        with torch.no_grad():
            _, reference_logprob = scores(reference, batch)
        states, logprob = scores(policy, batch)
        reward = head(states.flatten(0, 1)[batch.readout_index])
        result = ResponseScores(reward, logprob, batch.num_tokens)
        loss = joint_loss(
            config.objective, weights_at(config.objective, number), result, reference_logprob, micro_batch.comparisons
        ).total.mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return Contender(step)


class MasterWeights:
    """AdamW on fp32 copies of the weights, with gradients summed in fp32, as DeepSpeed's bf16 optimizer has them."""

    def __init__(self, model: HybridModel, config: OptimizerConfig):
        groups = parameter_groups(model, config)
        self.weights = [weight for group in groups for weight in group["params"]]
        for group in groups:
            group["params"] = [nn.Parameter(weight.detach().float()) for weight in group["params"]]
        self.masters = [master for group in groups for master in group["params"]]
        self.max_gradient_norm = config.max_gradient_norm
        _, optimizer = make_optimizer(groups, config, {})
        assert optimizer is not None
        self.optimizer = optimizer

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        for weight, master in zip(self.weights, self.masters, strict=True):
            gradient, weight.grad = weight.grad.float(), None
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)

    def step(self) -> None:
        nn.utils.clip_grad_norm_(self.masters, self.max_gradient_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for weight, master in zip(self.weights, self.masters, strict=True):
                weight.copy_(master)


def ours(config: TrainConfig, batches: Batches) -> Contender:
    max_tokens = config.batch.token_budget
    model = load_hybrid_model(config.model, layout="shared_prefix", seed=config.seed, device=torch.device("cpu"))
    model.use_fused(config.model.fused, torch.device("cpu"))
    layout = model.layout
    optimizer = MasterWeights(model, config.optimizer)

    def micro_batches(number: int) -> list[MicroBatch]:
        pairs = batches.pairs[number]
        columns = zip(*([len(pair.prompt_ids), *map(len, pair.responses)] for pair in pairs), strict=True)
        lengths = GroupLengths.of_pairs(*map(np.array, columns))
        (parts,) = partition_into_micro_batches(lengths.costs(layout), 1, max_tokens)
        return [make_micro_batch(pairs, part, layout) for part in parts]

    started = time.perf_counter()
    reference = torch.empty(len(batches.pairs), config.batch.global_batch_size, 2)
    with torch.no_grad():
        for number in range(len(batches.pairs)):
            for part in micro_batches(number):
                reference[number, part.index] = model(part.batch, with_reward=False).logprob.view(-1, 2)
    reference_seconds = time.perf_counter() - started

    def step(number: int) -> float:
        total = 0.0
        for part in micro_batches(number):
            known = reference[number, part.index].flatten()
            scores = model(part.batch)
            losses = joint_loss(config.objective, weights_at(config.objective, number), scores, known, part.comparisons)
            loss = losses.total.sum() / config.batch.global_batch_size
            optimizer.backward(loss)
            total += loss.item()
        optimizer.step()
        return total

    return Contender(step, reference_seconds, reference.flatten(0, 1).numpy())


@dataclass(frozen=True)
class Entry:
    """A line of the table and how its contender is made. layout: how many tokens its batches hold."""

    title: str
    make: Callable[[TrainConfig, Batches], Contender]
    layout: str = "padded"


CONTENDERS = {
    "trl_dpo_fp32": Entry("TRL DPO, fp32 weights", partial(trl_dpo, dtype=torch.float32)),
    "trl_dpo_bf16": Entry("TRL DPO, bf16 weights", partial(trl_dpo, dtype=torch.bfloat16)),
    "trl_reward_fp32": Entry("TRL reward, fp32 weights", partial(trl_reward, dtype=torch.float32)),
    "trl_reward_bf16": Entry("TRL reward, bf16 weights", partial(trl_reward, dtype=torch.bfloat16)),
    "recipe": Entry("the recipe's way", recipe),
    "ours": Entry("ours", ours, "shared_prefix"),
}


# ---- measuring -----------------------------------------------------------------------------------------------------


def peak_gib_of_this_process() -> float:
    """Most resident memory since the start. Not by getrusage, whose figure a child begins with its parent's."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def peak_gib_alone(name: str, arguments: list[str]) -> float:
    """Peak memory of a contender in a process of its own."""
    command = [sys.executable, __file__, *arguments, "--only", name, "--measure-memory"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_in_turns(contenders: dict[str, Contender], num_steps: int) -> dict[str, np.ndarray]:
    """Seconds of each step of each contender: name -> [steps]."""
    seconds = {name: np.empty(num_steps) for name in contenders}
    for step in range(num_steps):
        for name, contender in contenders.items():
            started = time.perf_counter()
            loss = contender.step(step)
            seconds[name][step] = time.perf_counter() - started
            print(f"step {step + 1}  {name}: {seconds[name][step]:.2f} s, loss {loss:.4f}", file=sys.stderr, flush=True)
    return seconds


def speed_table(
    contenders: dict[str, Contender], batches: Batches, seconds: dict[str, np.ndarray], peak_gib: dict[str, float]
) -> str:
    num_pairs = len(batches.pairs[0])
    tokens = np.array([batches.tokens(step) for step in range(len(batches.pairs))])
    lines = [
        "| contender | seconds a step | pairs/s | tokens/s | peak memory, GiB | references beforehand, s |",
        "|---|---|---|---|---|---|",
    ]
    for name, taken in seconds.items():
        beforehand = contenders[name].reference_seconds
        lines.append(
            f"| {CONTENDERS[name].title} | {median(taken):.2f} | {median(num_pairs / taken):.2f} "
            f"| {median(tokens / taken):.0f} | {peak_gib[name]:.2f} "
            f"| {'none' if beforehand is None else f'{beforehand:.1f}'} |"
        )
    return "\n".join(lines)


def ratio_table(seconds: dict[str, np.ndarray]) -> str:
    """Against the faster variant of each trainer of TRL, against one of each together, and against the recipe."""
    dpo, reward, recipe = (
        sorted((name for name in seconds if name.startswith(kind)), key=lambda name: median(seconds[name]))[:1]
        for kind in ("trl_dpo", "trl_reward", "recipe")
    )
    lines = ["| contender | time of ours, in a step | least, most |", "|---|---|---|"]
    for rivals in (dpo, reward, dpo + reward if dpo and reward else [], recipe):
        if rivals:
            ratios = sum(seconds[name] for name in rivals) / seconds["ours"]
            title = " + ".join(CONTENDERS[name].title for name in rivals)
            lines.append(f"| {title} | {median(ratios):.2f} times | {ratios.min():.2f}, {ratios.max():.2f} |")
    return "\n".join(lines)


def report(
    contenders: dict[str, Contender], batches: Batches, seconds: dict[str, np.ndarray], peak_gib: dict[str, float]
) -> None:
    tokens = sum(batches.tokens(step) for step in range(len(batches.pairs)))
    padded = sum(lay_out([pair.ids for pair in pairs], "padded").input_ids.numel() for pairs in batches.pairs)
    print(
        f"\n{len(batches.pairs)} steps of {len(batches.pairs[0])} pairs: {tokens:,} tokens, {padded:,} in padded rows; "
        f"{torch.get_num_threads()} threads; medians over the steps\n"
    )
    print(speed_table(contenders, batches, seconds, peak_gib))
    if "ours" not in contenders:
        return
    if len(contenders) > 1:
        print(f"\n{ratio_table(seconds)}")
    for name, contender in contenders.items():
        if name != "ours" and contender.reference is not None:
            largest = np.abs(contender.reference - contenders["ours"].reference).max()
            title = CONTENDERS[name].title
            print(f"\nlargest difference of a reference log-prob, ours and {title}: {largest:.2g} nats")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("data", metavar="DATA")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps of each contender (default 5)")
    parser.add_argument("--pairs", type=int, default=8, help="pairs a step (default 8)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch (default: all cores)")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--fused", default="off", help="model.fused of ours (default off)")
    parser.add_argument(
        "--measure-memory", action="store_true", help="print the peak memory, in GiB, of two steps of one contender"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    config = TrainConfig(
        output_dir=Path("unused"),
        model=ModelConfig(name_or_path=options.model, fused=options.fused),
        data=DataConfig(train=options.data, max_length=MAX_LENGTH, truncation="drop", max_dropped_share=1),
        batch=BatchConfig(global_batch_size=options.pairs),
    )
    batches = load_batches(config, options.steps)
    if options.measure_memory:
        (name,) = options.only
        batches = batches.largest(CONTENDERS[name].layout)
        run_in_turns({name: CONTENDERS[name].make(config, batches)}, 2)
        print(peak_gib_of_this_process())
        return
    arguments = [options.model, options.data, "--steps", str(options.steps), "--pairs", str(options.pairs)]
    arguments += ["--threads", str(options.threads), "--fused", options.fused]
    peak_gib = {name: peak_gib_alone(name, arguments) for name in options.only}
    contenders = {name: CONTENDERS[name].make(config, batches) for name in options.only}
    report(contenders, batches, run_in_turns(contenders, options.steps), peak_gib)


if __name__ == "__main__":
    main()
