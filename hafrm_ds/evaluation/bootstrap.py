"""Confidence intervals of means over pairs, by the percentile bootstrap (Efron & Tibshirani 1993, ch. 13).

Pairs with the same prompt are not independent, so prompts are resampled, each with all of its pairs.

Legend: P pairs, C different prompts, S trainings, B resamples, K kinds of values.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np

from hafrm_ds.data.tables import Estimate

K = TypeVar("K", bound=Hashable)

NUM_RESAMPLES = 2000
LEVEL = 0.95
TRAININGS_SEED = 1_000_003
CHUNK = 2**24
"""Most numbers in a chunk of resamples, which bounds the memory."""


def estimate(values: np.ndarray, prompts: Sequence[str], are_shares: bool = False) -> Estimate:
    """Mean of `values` with its 95% interval.

    The difference of two models on the same pairs is the estimate of their differences pair by pair: a paired
    bootstrap.

    Args:
        values: [P], or [S, P] for S trainings that differ in their seed alone. The trainings are then resampled too,
            independently of the prompts. Few of them say little of their spread: it is underestimated by about the
            factor sqrt((S - 1) / S).
        prompts: [P] the prompt of each pair, by any name.
        are_shares: as for `with_interval`.

    Raises:
        ValueError: there is no pair.
    """
    return estimates({"": values}, prompts, are_shares)[""]


def estimates(columns: Mapping[K, np.ndarray], prompts: Sequence[str], are_shares: bool = False) -> dict[K, Estimate]:
    """`estimate` of several values of the same pairs, of equal shapes, from the same resamples."""
    if not columns:
        return {}
    if not len(prompts):
        raise ValueError("a mean over no pairs")
    values = np.stack([np.atleast_2d(np.asarray(column, dtype=np.float64)) for column in columns.values()])
    center, means = values.mean(axis=(1, 2)), resampled_means(values, prompts)
    num_prompts = len(set(prompts))
    return {name: with_interval(center[k], means[:, k], num_prompts, are_shares) for k, name in enumerate(columns)}


def means_of_sets(columns: Mapping[K, Sequence[np.ndarray]], prompts: Sequence[Sequence[str]]) -> dict[K, Estimate]:
    """Means over several sets, each of which counts alike, of the means of their pairs, from the same resamples.
    A prompt that several sets have is drawn for all of them together.

    Args:
        columns: for each set [S, P]; the same S trainings, which are resampled alike in all of them.
        prompts: for each set [P].
    """
    if not columns:
        return {}
    of_sets = [np.stack(each) for each in zip(*columns.values(), strict=True)]
    center = np.mean([each.mean(axis=(1, 2)) for each in of_sets], axis=0)
    sets_with: dict[str, tuple[int, ...]] = defaultdict(tuple)
    for place, names in enumerate(prompts):
        for name in dict.fromkeys(names):
            sets_with[name] += (place,)
    means = [resampled_means(each, names, sets_with) for each, names in zip(of_sets, prompts, strict=True)]
    mean, num_prompts = np.mean(means, axis=0), len(sets_with)
    return {name: with_interval(center[k], mean[:, k], num_prompts) for k, name in enumerate(columns)}


def with_interval(center: float, means: np.ndarray, num_prompts: int, are_shares: bool = False) -> Estimate:
    """A mean with the percentiles of its resampled means [B]; without these for a single prompt.

    Args:
        are_shares: a mean of 0 or 1 has the exact interval of Clopper & Pearson (1934), as resampling equal values says
            nothing. All pairs of a prompt being right, the prompts are the trials.
    """
    value = float(center)
    if are_shares and value in (0, 1):
        reach = 1 - ((1 - LEVEL) / 2) ** (1 / num_prompts)
        low, high = (1 - reach, 1.0) if value else (0.0, reach)
        return {"value": value, "low": low, "high": high}
    if num_prompts == 1:
        return {"value": value, "low": None, "high": None}
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"value": value, "low": float(low), "high": float(high)}


def resampled_means(
    values: np.ndarray, prompts: Sequence[str], sets_with: Mapping[str, tuple[int, ...]] | None = None
) -> np.ndarray:
    """Means of values [K, S, P] in each resample of prompts and trainings: [B, K].

    Args:
        sets_with: the sets that have each prompt. Prompts of the same sets are drawn among themselves, and alike for
            each of these. None: there is one set.
    """
    num_columns, num_trainings, num_pairs = values.shape
    rows, names = values.reshape(num_columns * num_trainings, num_pairs), np.asarray(prompts)
    places: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for place, prompt in enumerate(prompts):
        places[(0,) if sets_with is None else sets_with[prompt]].append(place)
    totals, drawn = np.zeros((NUM_RESAMPLES, len(rows))), np.zeros((NUM_RESAMPLES, 1))
    for sets, mine in places.items():
        _, cluster = np.unique(names[mine], return_inverse=True)
        sizes = np.bincount(cluster)
        sums = np.stack([np.bincount(cluster, weights=row[mine]) for row in rows], axis=1)  # [C, K * S]
        counts = resampled_counts(len(sizes), np.random.default_rng(sets if len(sets) > 1 else sets[0]))
        weighed = np.concatenate([chunk @ np.column_stack([sums, sizes]) for chunk in counts])
        totals, drawn = totals + weighed[:, :-1], drawn + weighed[:, -1:]
    means = totals / drawn
    # The same for every set, as a training is drawn with all of its results.
    trainings = np.random.default_rng(TRAININGS_SEED).multinomial(
        num_trainings, np.full(num_trainings, 1 / num_trainings), size=NUM_RESAMPLES
    )
    means = means.reshape(NUM_RESAMPLES, num_columns, num_trainings)
    return np.einsum("bks,bs->bk", means, trainings) / num_trainings


def resampled_counts(num_clusters: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """How often each cluster is drawn in each resample: [chunk, C] float64, NUM_RESAMPLES in all."""
    left = NUM_RESAMPLES
    while left:
        chunk = min(left, max(1, CHUNK // num_clusters))
        draws = generator.integers(num_clusters, size=(chunk, num_clusters))
        draws += np.arange(chunk)[:, None] * num_clusters
        yield np.bincount(draws.reshape(-1), minlength=chunk * num_clusters).reshape(chunk, -1).astype(np.float64)
        left -= chunk
