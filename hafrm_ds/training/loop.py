"""The training loop: global batches in planned order, one joint loss, one optimizer step each."""

import itertools
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from statistics import fmean

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hafrm_ds.config import TrainConfig
from hafrm_ds.data.micro_batches import MicroBatch, make_micro_batch
from hafrm_ds.data.packing import move_tensor, padded_rows
from hafrm_ds.data.planning import DUMMY, BatchPlan, imbalance, partition_into_micro_batches
from hafrm_ds.data.prepared import PreparedGroups
from hafrm_ds.data.splitting import TrainingItems
from hafrm_ds.engine.engine import TrainingEngine
from hafrm_ds.engine.scoring import score_groups
from hafrm_ds.engine.shapes import full_shape
from hafrm_ds.errors import UserError
from hafrm_ds.evaluation.accuracy import set_metrics
from hafrm_ds.evaluation.attributes import attribute_metrics
from hafrm_ds.evaluation.combined import CombinedJudge
from hafrm_ds.evaluation.pair_scores import SCORES_FOLDER, PairScores, fixed_choice
from hafrm_ds.hardware.devices import published_peak
from hafrm_ds.hardware.flops import ForwardCost
from hafrm_ds.hardware.measurement import measure_matmul_peak, peak_memory_bytes, synchronize
from hafrm_ds.model.experts import expert_layers, gives_router_logits, router_loss_coefficient
from hafrm_ds.objective import (
    JointLoss,
    LossWeights,
    attribute_heads,
    attribute_loss,
    joint_loss,
    preference_metrics,
    weights_at,
)
from hafrm_ds.reference.offline_pass import GroupSet
from hafrm_ds.reference.provide import ReferenceSource, provide_reference
from hafrm_ds.training.logging import RunLog
from hafrm_ds.training.policy_share import FIRST_BATCHES, Pull, alpha_for, readjusted
from hafrm_ds.training.saver import CheckpointSaver
from hafrm_ds.training.schedule import learning_rate_factor


@dataclass
class StepTotals:
    """Sums over the groups of a step on this rank, and what is needed to name a group whose loss is not finite."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    losses: list[Tensor] = field(default_factory=list)
    index: list[np.ndarray] = field(default_factory=list)
    tokens: int = 0
    padding: int = 0
    flops: float = 0.0
    weight: float = 0.0
    """Of the global batch, over all ranks."""
    expert_load: Tensor | None = None

    def add(self, micro_batch: MicroBatch, loss: JointLoss, metrics: dict[str, Tensor]) -> None:
        """Count a micro-batch, its loss and its metrics, which lie on the device."""
        batch, weight = micro_batch.batch, micro_batch.weight
        self.tokens += batch.num_positions - batch.num_padding
        self.padding += batch.num_padding
        columns = {f"loss/{each.name}": getattr(loss, each.name) for each in fields(loss)} | metrics
        for name, values in columns.items():
            if values is not None:
                total = (values.detach() * weight).sum().double()
                self.sums[name] = self.sums.get(name, 0) + total
        self.losses.append(loss.total.detach())
        self.index.append(micro_batch.index)

    def add_load(self, weight: Tensor, load: Tensor) -> None:
        """Count the tokens that each expert got, [G, L, E], of groups with a weight, [G]."""
        total = torch.einsum("g,gle->le", weight, load).double()
        self.expert_load = total if self.expert_load is None else self.expert_load + total


@dataclass(frozen=True)
class GlobalBatch:
    """What this rank computes of a global batch: items of each micro-batch, of which the first is on the device.

    imbalance: between the ranks. weight: of the whole global batch, over all ranks.
    """

    step: int
    parts: list[np.ndarray]
    imbalance: float
    weight: float
    first: MicroBatch


class Trainer:
    """A training run, from the reference pass to the last evaluation.

    Args:
        engine: the model under DeepSpeed, untouched.
        train_groups: prepared training groups, mostly pairs.
        eval_groups: prepared groups of each evaluation set.
        reference_source: where reference log-probs come from; None when the objective uses none.
        saver: knows where the run resumes, saves its state and stops it.
        tokenizer: turns the most confident mistakes of an evaluation back into text.
    """

    def __init__(
        self,
        config: TrainConfig,
        engine: TrainingEngine,
        train_groups: PreparedGroups,
        eval_groups: dict[str, PreparedGroups],
        reference_source: ReferenceSource | None,
        saver: CheckpointSaver,
        log: RunLog,
        tokenizer: PreTrainedTokenizerBase,
    ):
        self.config, self.engine, self.saver, self.log, self.tokenizer = config, engine, saver, log, tokenizer
        self.reference_source = reference_source
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.plan = BatchPlan(len(train_groups), config.batch.global_batch_size, config.seed)
        self.num_steps = config.max_steps or math.ceil(config.epochs * len(train_groups) / self.plan.global_batch_size)
        self.train_set = GroupSet(train_groups, self.plan.groups_until(self.num_steps))
        self.items = TrainingItems.of(train_groups, config.batch.layout, config.batch.token_budget)
        self.eval_sets = {
            name: GroupSet(groups, fixed_choice(len(groups), config.evaluation.max_pairs))
            for name, groups in eval_groups.items()
        }
        self.state = saver.state
        self.ahead: GlobalBatch | None = None
        """Of the next step, whose first micro-batch is laid out while a GPU computes the last of this one."""
        causal_lm = engine.model.causal_lm
        self.cost = ForwardCost.of(causal_lm, full_shape)
        self.router_coefficient = router_loss_coefficient(causal_lm, config.model.router_aux_loss, full_shape)
        self.counts_experts = bool(expert_layers(causal_lm, full_shape)) and gives_router_logits(causal_lm)
        dtype = next(engine.model.parameters()).dtype
        self.measured_peak = measure_matmul_peak(engine.device, dtype)
        # Of the data sheet, as published figures are; where that is not known, a CPU among them, the measured one.
        name = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else ""
        self.peak_flops = published_peak(name, dtype.itemsize) or self.measured_peak

    def run(self) -> None:
        """From where the saver says to the last step. Raises Stopped when a signal has ended it and all is saved."""
        # For the dropout of adapters, the one thing that draws random numbers here; each rank has its own.
        torch.manual_seed(int(np.random.SeedSequence([self.config.seed, self.rank]).generate_state(1)[0]))
        self.saver.begin()
        state, every = self.state, self.config.evaluation.every_steps
        if state.evaluation_is_due if state.step else self.config.evaluation.at_start:
            state.evaluation_is_due = not self.evaluate(state.step)
        self.saver.after_step()
        share = self.config.objective.policy_share
        if share is not None and state.alpha is None and state.step < self.num_steps:
            self.find_alpha(share)
        with self.log.progress("training", self.num_steps - state.step, "steps") as progress:
            while state.step < self.num_steps and not self.has_lost_patience:
                metrics = self.train_step(state.step)
                state.step = step = state.step + 1
                self.report(step, metrics)
                progress.advance(1, describe(metrics))
                is_due = step == self.num_steps or (every and step % every == 0)
                state.evaluation_is_due = bool(is_due and not self.evaluate(step))
                self.saver.after_step()
        if state.step < self.num_steps:
            self.log.print(
                f"ended early, after step {state.step}: {state.best.metric} has not improved in "
                f"{state.best.evaluations_since} evaluations since step {state.best.step} (evaluation.patience)"
            )

    @property
    def has_lost_patience(self) -> bool:
        patience = self.config.evaluation.patience
        return patience is not None and self.state.best.evaluations_since >= patience

    # ---- one step ----

    def train_step(self, step: int) -> dict[str, float]:
        """One optimizer step on global batch `step`; returns its metrics, the same on all ranks."""
        weights = weights_at(self.config.objective, step, self.state.alpha)
        measuring = (self.config.logging.gradient_shares_every, self.config.objective.policy_share_every)
        of_reward = self.reward_gradient(step) if any(is_turn(step, every) for every in measuring) else None
        started = time.perf_counter()
        totals = StepTotals()
        num_micro_batches, waiting_share = self.accumulate(step, weights, totals)
        metrics = self.reduce(totals)
        if not math.isfinite(metrics["loss/total"]):
            self.stop_on_non_finite_loss(step, totals)
        if of_reward is not None:
            self.note_pull(step, weights.policy, Pull.of_joint(*self.engine.inner_products(of_reward)))
        factor = learning_rate_factor(step, self.num_steps, self.config.optimizer)
        self.engine.step(factor)
        if not math.isfinite(self.engine.gradient_norm):
            raise UserError(
                f"step {step + 1}: the gradient norm is {self.engine.gradient_norm} although every loss is finite. "
                "Try model.dtype float32 or a lower optimizer.learning_rate"
            )
        synchronize(self.engine.device)
        seconds = time.perf_counter() - started
        tokens, padding, flops = (metrics.pop(name) for name in ("tokens", "padding", "flops"))
        return metrics | {
            "grad_norm": self.engine.gradient_norm,
            "learning_rate": self.config.optimizer.learning_rate * factor,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            f"{self.train_set.groups.unit}_per_second": self.plan.global_batch_size / seconds,
            "mfu": flops / seconds / (self.peak_flops * self.world_size),
            "mfu_measured": flops / seconds / (self.measured_peak * self.world_size),
            "micro_batches": num_micro_batches,
            "tokens_per_rank": tokens / self.world_size,
            "padding_share": padding / (tokens + padding),
            "imbalance": waiting_share,
        }

    def accumulate(self, step: int, weights: LossWeights, totals: StepTotals) -> tuple[int, float]:
        """The gradient of the weighted losses over global batch `step`, left in the engine, averaged over the ranks.
        Returns the number of micro-batches and the imbalance between the ranks."""
        batch = self.ahead if self.ahead is not None and self.ahead.step == step else self.begin(step)
        micro_batch = batch.first
        for part in (*batch.parts[1:], None):
            num_positions = micro_batch.batch.num_positions
            try:
                loss = self.joint_loss(weights, micro_batch, batch.weight, totals)
                # A GPU still computes that. Under stage 3 the host waits for it at the end of backward.
                if part is not None:
                    micro_batch = self.lay_out(part)
                elif step + 1 < self.num_steps:
                    self.ahead = self.begin(step + 1)
                self.engine.backward(loss, is_last=part is None)
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"step {step + 1}: {self.engine.device} has no room for a micro-batch of {num_positions} tokens. "
                    "Lower --batch.max_tokens_per_micro_batch (now "
                    f"{self.config.batch.max_tokens_per_micro_batch}), set --model.gradient_checkpointing selective or "
                    f"true, or shard more: {error}"
                ) from error
        totals.weight = batch.weight
        return len(batch.parts), batch.imbalance

    def begin(self, step: int) -> GlobalBatch:
        """Partition a global batch, and lay its first micro-batch out."""
        index = self.plan.global_batch(step)
        parts, waiting_share = self.partition(self.items.of_groups(index))
        return GlobalBatch(step, parts, waiting_share, self.weight_of(index), self.lay_out(parts[0]))

    def partition(self, items: np.ndarray) -> tuple[list[np.ndarray], float]:
        """Items of each of this rank's micro-batches in a global batch, and the imbalance between the ranks.

        What is balanced are tokens for pairs. Groups of few long answers and of many short ones differ more in what the
        head and the attention compute, so theirs are balanced by operations.
        """
        lengths, batch = self.items.lengths.take(items), self.config.batch
        costs, rows = lengths.costs(batch.layout), padded_rows(batch.layout, len(items), lengths.num_responses)
        work = None
        if rows is None and not self.train_set.groups.are_pairs:
            predicted = lengths.all_responses * self.config.objective.uses_policy
            work = self.cost.training(*self.cost.parts_of(costs, predicted, lengths.visible_keys(batch.layout)))
        ranks = partition_into_micro_batches(costs, self.world_size, batch.token_budget, rows, work)
        own = [np.array([DUMMY if place == DUMMY else items[place] for place in part]) for part in ranks[self.rank]]
        return own, imbalance(costs if work is None else work, ranks, rows)

    def weight_of(self, index: np.ndarray) -> float:
        """What the groups of a global batch weigh together, by objective.normalize_by: the divisor of its loss."""
        groups = self.train_set.groups
        if self.config.objective.normalize_by == "group":
            return float(len(index))
        return float(groups.table.weight[groups.comparisons_of(index)].sum(dtype=np.float64))

    def lay_out(self, part: np.ndarray) -> MicroBatch:
        """A micro-batch on the device, or on its way there."""
        reference, names, attributes = self.train_set.reference, self.config.model.attributes, None
        responses = self.items.responses(part)
        of_part = None if reference is None else reference.of(responses)
        if names:
            attributes = torch.from_numpy(self.train_set.groups.attributes_of(names, responses))
        normalize_by = self.config.objective.normalize_by
        micro_batch = make_micro_batch(self.items, part, self.config.batch.layout, of_part, normalize_by, attributes)
        return micro_batch.to(self.engine.device)

    def joint_loss(
        self, weights: LossWeights, micro_batch: MicroBatch, batch_weight: float, totals: StepTotals
    ) -> Tensor:
        """This rank's contribution to the mean loss over the groups of the global batch, which weigh `batch_weight`.

        DeepSpeed averages gradients over the ranks, hence the factor world_size.
        """
        objective = self.config.objective
        scores = self.engine(
            micro_batch.batch,
            with_reward=weights.reward > 0,
            with_logprob=weights.policy > 0,
            idle_heads=objective.uses_reward and objective.uses_policy,
            with_router=self.counts_experts,
        )
        weight, reference = micro_batch.weight, micro_batch.reference
        loss = joint_loss(objective, weights, scores, reference, micro_batch.comparisons, micro_batch.trains_reward)
        if scores.router is not None:
            totals.add_load(weight, scores.router.load)
            if self.router_coefficient:
                loss = loss.with_part("router", scores.router.loss, self.router_coefficient)
        if scores.attributes is not None:
            batch, values = micro_batch.batch, micro_batch.attributes
            assert values is not None
            regression = attribute_loss(scores.attributes, values, batch.group, batch.num_groups)
            loss = loss.with_part("attributes", regression, objective.attributes_weight)
        metrics = preference_metrics(scores, reference, objective.beta, micro_batch.comparisons)
        totals.add(micro_batch, loss, metrics)
        totals.flops += self.cost.training_flops(micro_batch.batch, with_logprob=weights.policy > 0)
        return (loss.total * weight).sum() / batch_weight * self.world_size

    def reduce(self, totals: StepTotals) -> dict[str, float]:
        """Means over the groups of the global batch, from the sums of all ranks: one all-reduce and one transfer to the
        host a step. What is to be a maximum over the ranks has a place of its own for each, and there is added to 0."""
        names, device = sorted(totals.sums), self.engine.device
        own = [float(peak_memory_bytes(device)), *self.saver.votes()]
        of_ranks = torch.zeros(self.world_size, len(own), dtype=torch.float64)
        of_ranks[self.rank] = torch.tensor(own, dtype=torch.float64)
        work = torch.tensor([totals.tokens, totals.padding, totals.flops], dtype=torch.float64)
        of_host = move_tensor(torch.cat([work, of_ranks.flatten()]), device)
        load = torch.empty(0, device=device) if totals.expert_load is None else totals.expert_load
        row = torch.cat([torch.stack([totals.sums[name] for name in names]), of_host, load.flatten()])
        dist.all_reduce(row)
        values = iter(row.tolist())
        means = {name: next(values) / totals.weight for name in names}
        tokens, padding, flops = itertools.islice(values, 3)
        ranks = [list(itertools.islice(values, len(own))) for _ in range(self.world_size)]
        memory, *votes = map(max, zip(*ranks, strict=True))
        self.saver.hear(votes)
        experts = {} if totals.expert_load is None else expert_metrics(np.reshape(list(values), load.shape))
        work_done = {"tokens": tokens, "padding": padding, "flops": flops}
        return means | experts | work_done | {"memory_gib": memory / 2**30}

    def stop_on_non_finite_loss(self, step: int, totals: StepTotals) -> None:
        losses, index = torch.cat(totals.losses).cpu().numpy(), np.concatenate(totals.index)
        ids = [self.items[int(i)].id for i in index[~np.isfinite(losses)] if i != DUMMY]
        gathered: list = [None] * self.world_size
        dist.all_gather_object(gathered, ids)
        named = ", ".join(list(itertools.chain(*gathered))[:10])
        raise UserError(
            f"step {step + 1}: the loss is not finite, for the {self.train_set.groups.unit} {named}. Nothing was "
            "updated by this step. Look at these rows; if they are sound, lower optimizer.learning_rate or set "
            "model.dtype float32"
        )

    # ---- the pull of either loss on the body ----

    @contextmanager
    def gradient_of(self, step: int, weights: LossWeights) -> Iterator[None]:
        """Inside, the engine holds the gradient of the weighted losses over global batch `step`. Afterwards all is as
        if it had not been computed: the dropout of adapters draws the same random numbers in a step that follows."""
        device = self.engine.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            self.accumulate(step, weights, StepTotals())
        yield
        self.engine.discard_gradients()

    def reward_gradient(self, step: int) -> list[Tensor]:
        with self.gradient_of(step, LossWeights(self.config.objective.rm_weight, 0.0)):
            return self.engine.shared_gradient()

    def find_alpha(self, share: float) -> None:
        """Set alpha to what gives the policy loss a share of the pull on the body, by the global batches that come."""
        started, state, pulls = time.perf_counter(), self.state, []
        for step in range(state.step, min(state.step + FIRST_BATCHES, self.num_steps)):
            if self.saver.must_stop():
                self.saver.after_step()
            of_reward = self.reward_gradient(step)
            with self.gradient_of(step, LossWeights(0.0, 1.0)):
                pulls.append(Pull.of(*self.engine.inner_products(of_reward)))
        state.alpha = alpha = alpha_for(share, pulls)
        rows = [pull.times(alpha).metrics(alpha) for pull in pulls]
        self.log.metrics("gradients", state.step, {name: fmean(row[name] for row in rows) for name in rows[0]})
        shares = sorted(row["policy_share"] for row in rows)
        self.log.print(
            f"alpha {alpha:.4g} gives the policy loss {share:.0%} of the pull on the body: {shares[0]:.0%} to "
            f"{shares[-1]:.0%} in {len(rows)} global batches ({time.perf_counter() - started:.1f} s)"
        )

    def note_pull(self, step: int, alpha: float, pull: Pull) -> None:
        """Log what was measured in optimizer step `step`, and move alpha for those after it where a share is kept."""
        self.log.metrics("gradients", step + 1, pull.metrics(alpha))
        objective = self.config.objective
        if objective.policy_share is not None and is_turn(step, objective.policy_share_every):
            self.state.alpha = readjusted(alpha, objective.policy_share, pull)

    # ---- around the steps ----

    def load_reference(self) -> None:
        """Give every set its reference log-probs. Before `run`: they are checked against the untouched weights."""
        if self.reference_source is None:
            return
        provide_reference(
            self.reference_source,
            self.engine,
            self.config.batch,
            [self.train_set, *self.eval_sets.values()],
            self.log,
            record=partial(self.log.metrics, "check", 0),
        )

    def evaluate(self, step: int) -> bool:
        """Score every evaluation set, log its metrics, remember the best step; False if a signal interrupts it."""
        objective, attributes = self.config.objective, self.config.model.attributes
        judge: CombinedJudge | None = None
        evaluated: list[PairScores] = []
        for place, (name, group_set) in enumerate(self.eval_sets.items()):
            groups, index = group_set.groups, group_set.index
            with self.log.progress(f"evaluating {name}", len(index), groups.unit) as progress:
                scores = score_groups(
                    self.engine,
                    groups,
                    index,
                    (*objective.heads, *attribute_heads(attributes)),
                    layout=self.config.batch.layout,
                    max_tokens=self.config.batch.token_budget,
                    on_progress=progress.advance_for_all_ranks,
                    must_stop=self.saver.must_stop,
                )
            if scores is None:
                return False
            reference = None if group_set.reference is None else group_set.reference.values[group_set.responses]
            pair_scores = PairScores.of(name, groups, index, scores, reference, beta=objective.beta, step=step)
            if place == 0:
                judge = CombinedJudge.fitted_on(pair_scores)
            if judge is not None:
                judge.judge(pair_scores)
            metrics = set_metrics(pair_scores, objective) | attribute_metrics(groups, index, scores, attributes)
            evaluated.append(pair_scores)
            self.state.last_evaluation[name] = metrics
            self.log.metrics("eval", step, metrics, set=name)
            self.log.print(f"step {step}  {name}: {describe(metrics)}")
        self.state.judge = None if judge is None else judge.fit.to_json()
        self.state.note_best(step)
        # The scores that stay are those of the weights that final/ gets.
        stay = self.config.checkpoint.final == "last" or self.state.best.step in (None, step)
        if stay and self.log.writes:
            for pair_scores, group_set in zip(evaluated, self.eval_sets.values(), strict=True):
                pair_scores.keep_texts(group_set.groups, group_set.index, self.tokenizer)
                pair_scores.save(self.config.output_dir / SCORES_FOLDER)
        return True

    def choose_final_weights(self) -> int:
        """After `run`: put the weights that checkpoint.final asks for into the engine. Returns their step."""
        best, step = self.state.best.step, self.state.step
        if self.config.checkpoint.final == "last" or best is None or best == step:
            return step
        return best if self.saver.restore_step(best) else step

    def summary(self, final_step: int) -> dict:
        """What a reader wants to know first, for summary.json.

        Args:
            final_step: final/ has the weights after it.
        """
        best = self.state.best
        return {
            "steps": self.state.step,
            self.train_set.groups.unit: int(self.state.step * self.plan.global_batch_size),
            "ended_early": self.state.step < self.num_steps,
            "best": {"metric": best.metric, "step": best.step, "value": best.value} if best.step is not None else None,
            "final_step": final_step,
            "peak_flops_per_process": self.peak_flops,
        }

    def report(self, step: int, metrics: dict[str, float]) -> None:
        if step % self.config.logging.every_steps == 0 or step == self.num_steps:
            self.log.metrics("train", step, metrics)


def expert_metrics(load: np.ndarray) -> dict[str, float]:
    """How even the experts' shares of a step are, from the tokens that each of them got: [layers, experts].

    experts/largest_load: tokens of the busiest expert of a layer, as a multiple of an even share, on average over the
    layers. experts/unused: share of the experts that got none.
    """
    return {
        "experts/largest_load": float((load.max(1) / load.mean(1)).mean()),
        "experts/unused": float((load == 0).mean()),
    }


def is_turn(step: int, every: int | None) -> bool:
    """Whether optimizer step `step` (from 0) is one of every N; of none where N is not given or 0."""
    return every is not None and every > 0 and (step + 1) % every == 0


def describe(metrics: dict[str, float]) -> str:
    """One line for people: loss, speed and memory of a training step first, as a narrow terminal cuts the end."""
    parts = [f"loss {metrics['loss/total']:.4f}"] if "loss/total" in metrics else []
    if "mfu" in metrics:
        unit = "pairs" if "pairs_per_second" in metrics else "groups"
        parts.append(
            f"{metrics['tokens_per_second']:.0f} tok/s, {metrics[f'{unit}_per_second']:.2f} {unit}/s, "
            f"MFU {metrics['mfu']:.0%}, {metrics['memory_gib']:.2f} GiB"
        )
    for title, kind, form in (("losses", "loss", "{:.4f}"), ("accuracy", "accuracy", "{:.1%}")):
        judged = ("reward", "policy", "attributes", "implicit", "logprob", "combined")
        names = [name for name in judged if f"{kind}/{name}" in metrics]
        values = " ".join(f"{name} {form.format(metrics[f'{kind}/{name}'])}" for name in names)
        parts += [f"{title}: {values}"] if values else []
    r2 = [f"{name.removeprefix('r2/')} {value:.2f}" for name, value in metrics.items() if name.startswith("r2/")]
    return "; ".join(parts + [f"R2: {' '.join(r2)}"] * bool(r2))
