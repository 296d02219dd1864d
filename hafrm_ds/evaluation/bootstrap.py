"""Confidence intervals of means over pairs, by the percentile bootstrap (Efron & Tibshirani 1993, ch. 13).

Pairs with the same prompt are not independent, so prompts are resampled, each with all of its pairs.

Legend: P pairs, C different prompts, S seeds, B resamples.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

NUM_RESAMPLES = 2000
LEVEL = 0.95
CHUNK = 2**24
"""Numbers of one chunk of resamples: bounds the memory."""


@dataclass(frozen=True)
class Estimate:
    """A mean with the ends of its 95% interval. clusters: different prompts behind it."""

    value: float
    low: float
    high: float
    clusters: int

    def to_json(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


def estimate(values: np.ndarray, prompts: Sequence[str], seed: int = 0) -> Estimate:
    """Mean of `values` with its 95% interval.

    The difference of two models on the same pairs is the estimate of their differences pair by pair: a paired
    bootstrap.

    Args:
        values: [P], or [S, P] for S models that differ in their seed alone. Seeds are then resampled too, independently
            of the prompts. Few seeds say little of their spread: it is underestimated by about the factor
            sqrt((S - 1) / S).
        prompts: [P] the prompt of each pair, by any name.
        seed: of the resamples.

    Raises:
        ValueError: there is no pair.
    """
    return estimates({"": values}, prompts, seed)[""]


def estimates(columns: dict[str, np.ndarray], prompts: Sequence[str], seed: int = 0) -> dict[str, Estimate]:
    """`estimate` of several values of the same pairs, of equal shapes, from the same resamples."""
    if not len(prompts):
        raise ValueError("a mean over no pairs")
    if not columns:
        return {}
    values = np.stack([np.atleast_2d(np.asarray(column, dtype=np.float64)) for column in columns.values()])
    num_columns, num_seeds, _ = values.shape
    _, cluster = np.unique(np.asarray(prompts), return_inverse=True)
    sizes = np.bincount(cluster)
    sums = np.stack([np.bincount(cluster, weights=row) for row in values.reshape(num_columns * num_seeds, -1)], axis=1)
    generator = np.random.default_rng(seed)
    means = []
    for counts in resampled_counts(len(sizes), generator):
        per_seed = ((counts @ sums) / (counts @ sizes)[:, None]).reshape(len(counts), num_columns, num_seeds)
        seeds = generator.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=len(counts))
        # b resamples, k columns, s seeds
        means.append(np.einsum("bks,bs->bk", per_seed, seeds) / num_seeds)
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    center = values.mean(axis=(1, 2))
    return {
        name: Estimate(float(center[k]), float(low[k]), float(high[k]), len(sizes)) for k, name in enumerate(columns)
    }


def exact_at_the_ends(share: Estimate) -> Estimate:
    """A share of 0 or 1 with the exact interval of Clopper & Pearson (1934): resampling equal values says nothing.

    All pairs of a prompt being right, the prompts are the trials.
    """
    reach = 1 - ((1 - LEVEL) / 2) ** (1 / share.clusters)
    if share.value == 0:
        return replace(share, high=reach)
    if share.value == 1:
        return replace(share, low=1 - reach)
    return share


def resampled_counts(num_clusters: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """How often each cluster is drawn in each resample: [chunk, C] float64, NUM_RESAMPLES in all."""
    left = NUM_RESAMPLES
    while left:
        chunk = min(left, max(1, CHUNK // num_clusters))
        draws = generator.integers(num_clusters, size=(chunk, num_clusters))
        draws += np.arange(chunk)[:, None] * num_clusters
        yield np.bincount(draws.reshape(-1), minlength=chunk * num_clusters).reshape(chunk, -1).astype(np.float64)
        left -= chunk
