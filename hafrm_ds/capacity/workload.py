"""What a run computes: groups, tokens and floating-point operations of its data, as the batch plan partitions it.

Legend: G groups.
"""

import math
from dataclasses import dataclass

import numpy as np

from hafrm_ds.data.lengths import GroupLengths
from hafrm_ds.data.packing import padded_rows
from hafrm_ds.data.planning import BatchPlan, imbalance, occupied, partition_into_micro_batches
from hafrm_ds.hardware.flops import ForwardCost

SAMPLED_STEPS = 32
"""Steps of the plan that are really partitioned into micro-batches; the others are like them."""


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of all training steps.

    training: forward and backward, counted as `ForwardCost` does.
    recomputed: what gradient checkpointing adds, the forward pass of the body.
    """

    training: float
    recomputed: float


@dataclass(frozen=True)
class Workload:
    """The groups of a run, mostly pairs, and how often it goes through them.

    lengths: of the training groups.
    num_steps, global_batch_size, seed, layout: as in the run.
    eval_lengths: of all evaluation groups, whose reference is computed too.
    """

    lengths: GroupLengths
    eval_lengths: GroupLengths
    num_steps: int
    global_batch_size: int
    seed: int
    layout: str

    @property
    def num_groups(self) -> int:
        return len(self.lengths)

    @property
    def unit(self) -> str:
        """What the groups are called."""
        return "pairs" if (self.lengths.num_responses == 2).all() else "groups"

    @property
    def costs(self) -> np.ndarray:
        """[G] tokens that each group occupies."""
        return self.lengths.costs(self.layout)

    @property
    def longest(self) -> int:
        """Tokens that a micro-batch must hold."""
        evaluated = self.eval_lengths.costs(self.layout)
        return int(max(self.costs.max(), evaluated.max(initial=0)))

    @property
    def batch_plan(self) -> BatchPlan:
        return BatchPlan(self.num_groups, self.global_batch_size, self.seed)

    @property
    def tokens(self) -> float:
        """Tokens that the body computes in training, prompts that answers share once."""
        return float(self.costs.mean() * self.global_batch_size * self.num_steps)

    @property
    def separate_tokens(self) -> float:
        """Tokens that the body would compute if no prompt were shared."""
        return float(self.lengths.costs("packed").mean() * self.global_batch_size * self.num_steps)

    def operations(self, cost: ForwardCost, with_logprob: bool) -> Operations:
        """Operations of all training steps: those of a group on average, for each group of each step."""
        body, head, attention = cost.parts_of(*counts(self.lengths, self.layout, with_logprob))
        times = self.global_batch_size * self.num_steps / self.num_groups
        return Operations(
            training=times * cost.training(body, head, attention),
            recomputed=times * (body + attention),
        )

    def reference_operations(self, cost: ForwardCost) -> float:
        """Operations of one forward pass over every training group that a step uses, and over all evaluation
        groups."""
        used = self.batch_plan.groups_until(self.num_steps)
        sets = (self.lengths.take(used), self.eval_lengths)
        return sum(sum(cost.parts_of(*counts(lengths, self.layout, with_logprob=True))) for lengths in sets)

    def largest_useful_budget(self, num_processes: int) -> int:
        """Tokens of a micro-batch above which no step has fewer of them."""
        costs, plan = self.costs, self.batch_plan
        largest = max(int(costs[plan.global_batch(step)].sum()) for step in self.sampled_steps)
        return math.ceil(largest / num_processes) + self.longest

    @property
    def sampled_steps(self) -> range:
        return range(min(self.num_steps, SAMPLED_STEPS))

    def partition(self, num_processes: int, budget: int) -> "Partition":
        """How a step is partitioned under a token budget, on average over a sample of the steps."""
        costs, plan = self.costs, self.batch_plan
        numbers, waiting, heaviest = [], [], 0
        for step in self.sampled_steps:
            of_step = costs[plan.global_batch(step)]
            rows = padded_rows(self.layout, len(of_step), self.lengths.num_responses[plan.global_batch(step)])
            ranks = partition_into_micro_batches(of_step, num_processes, budget, rows)
            numbers.append(len(ranks[0]))
            waiting.append(imbalance(of_step, ranks, rows))
            heaviest = max(heaviest, int(occupied(of_step, [part for own in ranks for part in own], rows).max()))
        return Partition(float(np.mean(numbers)), float(np.mean(waiting)), heaviest)


@dataclass(frozen=True)
class Partition:
    """The micro-batches of a step.

    micro_batches: number of them on each process.
    waiting: share of the time for which processes wait for the slowest.
    heaviest: tokens of the largest micro-batch.
    """

    micro_batches: float
    waiting: float
    heaviest: int


def counts(lengths: GroupLengths, layout: str, with_logprob: bool) -> tuple[float, float, float]:
    """(tokens of the body without padding, predicted tokens, visible keys) of one pass over groups."""
    answers = float(lengths.response.sum())
    tokens = float(lengths.costs("packed" if layout == "padded" else layout).sum())
    return tokens, answers if with_logprob else 0.0, float(lengths.visible_keys(layout).sum())


def uniform_lengths(num_pairs: int, prompt: int, answer: int) -> GroupLengths:
    """Pairs of one length, for data that is not there yet."""
    return GroupLengths.of_pairs(*(np.full(num_pairs, length) for length in (prompt, answer, answer)))
