"""What a run checks and decides between loading its model and its first step."""

import math
from collections.abc import Iterable

import numpy as np
import torch.distributed as dist

from hafrm_ds.config import TrainConfig
from hafrm_ds.data.packing import lay_out
from hafrm_ds.data.planning import BatchPlan, check_budget
from hafrm_ds.data.prepared import PreparedGroups
from hafrm_ds.data.tokenization import PromptWithResponses
from hafrm_ds.engine.engine import Engine, TrainingEngine
from hafrm_ds.engine.scoring import over_all_ranks
from hafrm_ds.errors import ModelError
from hafrm_ds.model.attention import UnsupportedAttention, stock_attention
from hafrm_ds.model.hybrid import fused_difference, layout_difference, lm_head_difference, tolerance_of
from hafrm_ds.training.logging import RunLog
from hafrm_ds.training.token_budget import find_token_budget

CHECKED_GROUPS = 2
CHECKED_EAGER_TOKENS = 8192
"""Of a group's padded rows, at most, under eager attention: it holds the scores of every two tokens of a row."""
PLANNED_STEPS = 1000
"""Steps of the plan that are looked at for the largest global batch."""
SCORING_BATCHES = 32
"""A pass without gradients has at least about as many micro-batches on each rank: it shows progress, and is stored, by
micro-batches."""


def check_budgets(sets: Iterable[PreparedGroups], config: TrainConfig) -> None:
    """Raise DataError for groups above the token budget, as far as budget and layout are known: the layout that "auto"
    hopes for takes the fewest tokens."""
    batch = config.batch
    if batch.max_tokens_per_micro_batch == "auto":
        return
    layout = "shared_prefix" if batch.layout == "auto" else batch.layout
    for groups in sets:
        needed = groups.needed_tokens(layout, whole=config.objective.ranking_loss != "pairwise")
        check_budget(needed, batch.max_tokens_per_micro_batch, groups.rows["id"], groups.unit)


def settle_batch(engine: Engine, sets: list[PreparedGroups], config: TrainConfig, log: RunLog) -> TrainConfig:
    """The configuration with batch.layout and batch.max_tokens_per_micro_batch decided, after the freshly loaded model
    has shown that it can run so.

    Args:
        sets: training groups first.

    Raises:
        ModelError: the scores are not finite, or the layout that was asked for changes them.
        DataError: a pair, or another comparison, does not fit into a micro-batch.
    """
    objective, groups, model = config.objective, sets[0], engine.model
    log.print(f"layout {model.layout}, attention {model.causal_lm.config._attn_implementation}")
    check_layout(engine, groups, config, log)
    check_fused_layers(engine, groups, config, log)
    if objective.uses_policy:
        check_lm_head(engine, groups, log)
    budget, whole = config.batch.max_tokens_per_micro_batch, objective.ranking_loss != "pairwise"
    if budget == "auto":
        budget = find_token_budget(
            engine,
            groups,
            model.layout,
            longest=max(int(each.needed_tokens(model.layout, whole).max()) for each in sets if len(each)),
            largest_useful=largest_useful_budget(engine, sets, config),
            with_reward=objective.uses_reward,
            with_logprob=objective.uses_policy,
        )
        log.print(f"token budget of a micro-batch, from memory: {budget:,}")
    batch = config.batch.model_copy(update={"layout": model.layout, "max_tokens_per_micro_batch": budget})
    config = config.model_copy(update={"batch": batch})
    check_budgets(sets, config)
    return config


def largest_useful_budget(engine: Engine, sets: list[PreparedGroups], config: TrainConfig) -> int:
    """Tokens of the largest part of a global batch that one rank gets, or of a part of all where that is more."""
    costs = [groups.lengths.costs(engine.model.layout) for groups in sets]
    whole = sum(int(each.sum()) for each in costs) // SCORING_BATCHES
    if isinstance(engine, TrainingEngine):
        plan = BatchPlan(len(sets[0]), config.batch.global_batch_size, config.seed)
        steps = min(PLANNED_STEPS, math.ceil(len(sets[0]) / plan.global_batch_size))
        whole = max(whole, *(int(costs[0][plan.global_batch(step)].sum()) for step in range(steps)))
    # Groups are hardly divisible: a rank may get a little more than its part.
    return math.ceil(whole / dist.get_world_size()) + max(int(each.max()) for each in costs if len(each))


def check_layout(engine: Engine, groups: PreparedGroups, config: TrainConfig, log: RunLog) -> None:
    """Compare the scores of the shortest groups and of a long one, which a window or a chunk cuts, in the model's
    layout with those of padded, separate sequences under its own attention.

    With batch.layout "auto" a model whose scores differ continues in the padded layout.

    Raises:
        ModelError: the scores are not finite, or the layout that was asked for changes them.
    """
    model, name, tolerance = engine.model, type(engine.model.causal_lm).__name__, tolerance_of(engine.model)
    samples = [shortest_items(groups, model.layout)]
    if model.layout != "padded":
        budget = config.batch.max_tokens_per_micro_batch
        most_tokens = math.inf if budget == "auto" else budget
        if stock_attention(model.causal_lm) == "eager":
            most_tokens = min(most_tokens, CHECKED_EAGER_TOKENS)
        if long := longest_items(groups, most_tokens):
            samples.append(long)
    try:
        own = max(
            layout_difference(model, engine, items, model.layout, config.objective.uses_policy) for items in samples
        )
    except UnsupportedAttention as error:
        if config.batch.layout != "auto":
            raise
        log.warn(f"{error}. The layout is padded")
        model.use_layout("padded", config.model.attention, engine.device)
        return
    difference = over_all_ranks(dist.ReduceOp.MAX, engine.device, own)
    log.print(f"{model.layout} against padded, separate sequences: {difference:.2g} in a reward or a token's log-prob")
    if difference <= tolerance:
        if config.batch.layout == "auto" and model.layout == "padded":
            log.warn(f"{name} does not take its attention from transformers' AttentionInterface: the layout is padded")
        return
    finding = (
        f"the scores of {name} change by {difference:.3g} in the layout {model.layout} (tolerance {tolerance:g}): it "
        "does not keep packed answers apart"
    )
    if config.batch.layout != "auto":
        raise ModelError(f"{finding}. Set --batch.layout padded")
    log.warn(f"{finding}. The layout is padded")
    model.use_layout("padded", config.model.attention, engine.device)


def check_fused_layers(engine: Engine, groups: PreparedGroups, config: TrainConfig, log: RunLog) -> None:
    """Say what is fused in the model's layers, and compare the scores of the shortest groups with those of its own
    code. What model.fused "auto" has chosen is left out where they differ.

    Raises:
        ModelError: what was asked for changes the scores.
    """
    model, name = engine.model, type(engine.model.causal_lm).__name__
    log.print(f"fused layers: {model.fused or 'none'}")
    if model.fused is None:
        return
    items, with_logprob = shortest_items(groups, model.layout), config.objective.uses_policy
    difference = over_all_ranks(dist.ReduceOp.MAX, engine.device, fused_difference(model, engine, items, with_logprob))
    log.print(f"fused against {name}'s own layers: {difference:.2g} in a reward or a token's log-prob")
    if difference <= tolerance_of(model):
        return
    finding = f"the scores of {name} change by {difference:.3g} when {model.fused}"
    if config.model.fused != "auto":
        raise ModelError(f"{finding} (tolerance {tolerance_of(model):g}). Set --model.fused off")
    log.warn(f"{finding}. Nothing is fused")
    model.fused.take_away()
    model.fused = None


def check_lm_head(engine: Engine, groups: PreparedGroups, log: RunLog) -> None:
    """Compare the fused log-probs of the shortest groups with those of the model's own logits; where they differ, the
    latter are used."""
    model, name = engine.model, type(engine.model.causal_lm).__name__
    batch = lay_out(shortest_items(groups, model.layout), model.layout).to(engine.device)
    difference = over_all_ranks(dist.ReduceOp.MAX, engine.device, lm_head_difference(model, engine, batch))
    log.print(f"log-probs against {name}'s own logits: {difference:.2g} nats a token")
    if not difference <= tolerance_of(model):
        model.uses_stock_logits = True
        log.warn(
            f"the LM head of {name} does something that hafrm_ds does not know: its own logits are used instead of "
            "the fused log-probs, which holds the logits of all tokens in memory"
        )


def shortest_items(groups: PreparedGroups, layout: str) -> list[PromptWithResponses]:
    """A few groups that every model can take at once."""
    shortest = np.argsort(groups.lengths.costs(layout))[:CHECKED_GROUPS]
    return [groups[int(index)].ids for index in shortest]


def longest_items(groups: PreparedGroups, most_tokens: float) -> list[PromptWithResponses]:
    """The longest group that takes at most `most_tokens` in the padded layout; nothing if none is that short."""
    costs = groups.lengths.costs("padded")
    fitting = np.flatnonzero(costs <= most_tokens)
    return [groups[int(fitting[costs[fitting].argmax()])].ids] if len(fitting) else []
