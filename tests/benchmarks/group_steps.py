"""A step over groups of answers: as groups, and as the pairs that their comparisons make.

    python -m tests.benchmarks.group_steps --config FILE.yaml [--section.key value ...] [--rounds N]

One process, no DeepSpeed. A step is forward and backward of the joint loss over batch.global_batch_size groups, in
micro-batches of batch.max_tokens_per_micro_batch tokens as in training:

groups: each group as it is, its answers behind one prompt. pairs of the groups: every comparison as a pair, all of them
    in the step. pairs in random order: the comparisons of the whole set shuffled, of which a step takes as many.

So all see as many comparisons. Contenders alternate; medians. Peak memory is that of a process of its own, which makes
the first step (beyond what it holds before).
"""

import os
import statistics
import subprocess
import sys
from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from hafrm_ds.config import TrainConfig
from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.lengths import GroupLengths, starts_of
from hafrm_ds.data.micro_batches import MicroBatch, make_micro_batch
from hafrm_ds.data.packing import padded_rows
from hafrm_ds.data.pairs import OF_A_PAIR
from hafrm_ds.data.planning import BatchPlan, partition_into_micro_batches
from hafrm_ds.data.preparation import PreparedGroups, prepare_groups
from hafrm_ds.data.tokenization import TokenizedGroup
from hafrm_ds.engine.deepspeed_config import load_config
from hafrm_ds.hardware.measurement import peak_growth_bytes
from hafrm_ds.model.loading import load_hybrid_model, load_tokenizer
from tests.benchmarks.roofline import joint_step, seconds

CONTENDERS = ("groups", "pairs of the groups", "pairs in random order")


class Options(TrainConfig):
    """What is measured."""

    rounds: Annotated[int, Field(ge=1)] = 2
    """Steps of each contender that are timed."""
    only: str | None = None
    """Measure the memory of one contender alone."""


def as_pairs(groups: PreparedGroups, index: np.ndarray) -> list[TokenizedGroup]:
    """Every comparison of some groups as a pair."""
    return [
        TokenizedGroup(
            group.prompt_ids, (group.responses[each.better], group.responses[each.worse]), OF_A_PAIR, "", group.id
        )
        for group in (groups[int(place)] for place in index)
        for each in group.comparisons
    ]


def micro_batches(items: list[TokenizedGroup], config: TrainConfig, layout: str) -> list[MicroBatch]:
    sizes = np.array([len(item.responses) for item in items])
    lengths = GroupLengths(
        np.array([len(item.prompt_ids) for item in items]),
        np.array([len(response) for item in items for response in item.responses]),
        starts_of(sizes),
    )
    budget, rows = config.batch.token_budget, padded_rows(layout, len(items), sizes)
    (parts,) = partition_into_micro_batches(lengths.costs(layout), 1, budget, rows)
    return [make_micro_batch(items, part, layout) for part in parts]


def main() -> None:
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    config = load_config(sys.argv[1:], Options, about=__doc__)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    formatter = ChatFormatter.create(load_tokenizer(config.model), config.data.chat_template, config.data.template_date)
    groups = prepare_groups(
        config.data.train, formatter=formatter, options=config.data.preparation, role="train", seed=config.seed
    )
    plan, layout = BatchPlan(len(groups), config.batch.global_batch_size, config.seed), "shared_prefix"
    model = load_hybrid_model(config.model, layout=layout, seed=config.seed, device=device).to(device)
    generator = np.random.default_rng(config.seed)
    every = as_pairs(groups, np.arange(len(groups)))
    shuffled = generator.permutation(len(every))

    def step(contender: str, number: int) -> list[MicroBatch]:
        index = plan.global_batch(number)
        if contender == "groups":
            items = [groups[int(place)] for place in index]
        else:
            items = as_pairs(groups, index)
            if contender != "pairs of the groups":
                start = number * len(every) // (1 + config.rounds)
                items = [every[place] for place in np.take(shuffled, range(start, start + len(items)), mode="wrap")]
        return micro_batches(items, config, layout)

    def compute(batches: list[MicroBatch]) -> None:
        for each in batches:
            joint_step(config, model, each, device)

    if config.only is not None:
        batches = step(config.only, 0)
        compute(batches[:1])  # gradients and what else is allocated once
        print(peak_growth_bytes(device, lambda: compute(batches)))
        return
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    tokens: dict[str, list[int]] = {name: [] for name in CONTENDERS}
    compared = []
    for number in range(1 + config.rounds):
        for name in CONTENDERS:
            batches = step(name, number)
            took = sum(seconds(device, joint_step, config, model, each, device) for each in batches)
            if number:
                times[name].append(took)
                tokens[name].append(sum(each.batch.num_positions for each in batches))
                compared.append(sum(len(each.comparisons.better) for each in batches))
    print(
        f"{config.rounds} steps of {plan.global_batch_size} groups, {statistics.median(compared):.0f} comparisons each",
        end="\n\n",
    )
    print("| | tokens | seconds | times groups | peak of a step, GiB |\n|---|---|---|---|---|")
    ours = statistics.median(times["groups"])
    for name in CONTENDERS:
        command = [sys.executable, "-m", "tests.benchmarks.group_steps", *sys.argv[1:], "--only", name]
        memory = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
        median = statistics.median(times[name])
        print(
            f"| {name} | {statistics.median(tokens[name]):,.0f} | {median:.1f} | {median / ours:.2f} | "
            f"{memory / 2**30:.2f} |"
        )


if __name__ == "__main__":
    main()
