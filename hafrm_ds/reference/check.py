"""Whether stored reference log-probs are what the freshly loaded policy gives: a seeded sample is computed again."""

from collections.abc import Callable

import numpy as np

from hafrm_ds.config import BatchConfig, TrainConfig
from hafrm_ds.data.lengths import places_of
from hafrm_ds.engine.engine import Engine
from hafrm_ds.engine.scoring import score_groups
from hafrm_ds.errors import UserError
from hafrm_ds.processes.console import Console
from hafrm_ds.reference.offline_pass import GroupSet

CHECKED_GROUPS = 16
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.02}
"""Largest mean difference of stored and fresh log-probs, in nats a token."""


def check_sample(
    config: TrainConfig,
    batch: BatchConfig,
    engine: Engine,
    group_set: GroupSet,
    candidates: np.ndarray,
    log: Console,
    record: Callable[[dict[str, float]], None],
) -> None:
    """Compare stored values with what the freshly loaded policy gives in training mode, on a seeded sample.

    Args:
        candidates: positions of groups whose values came from the store.
        record: is told the figures, also of a sample that does not agree.

    Raises:
        UserError: the mean difference a token is larger than TOLERANCE allows.
    """
    groups, reference = group_set.groups, group_set.reference
    if reference is None or not len(candidates):
        return
    chosen = np.random.default_rng(config.seed).choice(candidates, min(CHECKED_GROUPS, len(candidates)), replace=False)
    fresh = score_groups(
        engine,
        groups,
        chosen,
        ("logprob",),
        layout=batch.layout,
        max_tokens=batch.token_budget,
    )
    assert fresh is not None  # nothing interrupts it
    responses = places_of(groups.lengths.first, chosen)
    difference = np.abs(fresh["logprob"] - reference.values[responses])
    num_tokens = groups.lengths.response[responses]
    per_token, tolerance = float((difference / num_tokens).mean()), TOLERANCE[config.model.dtype]
    figures = {
        "reference/largest_difference": float(difference.max()),
        "reference/mean_difference": float(difference.mean()),
        "reference/mean_difference_per_token": per_token,
        "reference/pairs_checked": len(chosen),
    }
    record(figures)
    log.print(
        f"policy against stored reference on {len(chosen)} {groups.unit}: largest difference {difference.max():.3g} "
        f"nats a response, mean {difference.mean():.3g}, {per_token:.2g} a token (tolerance {tolerance:g})"
    )
    if not per_token <= tolerance:
        owner = np.repeat(chosen, groups.lengths.num_responses[chosen])
        worst = groups[int(owner[difference.argmax()])].id
        raise UserError(
            f"the policy does not agree with the stored reference log-probs: {per_token:.3g} nats a token on "
            f"{len(chosen)} {groups.unit}, tolerance {tolerance:g} ({config.model.dtype}); worst {worst}. The token "
            "ids and the weight files are those of the store, so the forward pass differs: another kernel or version "
            "of transformers that changed this model, adapters or weights altered after loading, or values of a faulty "
            f"run. Compare the versions, or give another --reference.store than {config.reference.store}"
        )
