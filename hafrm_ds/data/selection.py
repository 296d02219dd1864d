"""Selection and mixing: which rows of a source its portion, its cap and its weight leave.

All functions work on one list for each source: for each row the reason why it is left out, "" for a row that is
selected. A row that turned out to be unusable is selected like any other: the share of unusable rows is then that of
the rows that were asked for, not of all that were read.
"""

import random
from fractions import Fraction

from hafrm_ds.data.portions import portion_range
from hafrm_ds.data.sources import Source
from hafrm_ds.errors import DataError

SELECTION_FIELDS = ("portion", "max_pairs", "weight")
"""Fields of a `Source` that are applied here, to rows that have been read."""


def select(reasons: list[str], source: Source, seed: int) -> list[str]:
    """Apply a source's portion, then its max_pairs."""
    if source.portion is not None:
        reasons = take_portion(reasons, source.portion)
    if source.max_pairs is not None:
        reasons = take_random(reasons, source.max_pairs, "over max_pairs", f"max_pairs {seed}")
    return reasons


def mix(reasons: list[list[str]], sources: list[Source], seed: int) -> list[list[str]]:
    """Apply the weights, if there are any: no pair is used twice. Raises DataError if a source would get no pair."""
    weights = [source.weight for source in sources if source.weight is not None]
    if len(weights) < len(sources):
        return reasons
    available = [len(selected(of_source)) for of_source in reasons]
    counts = mixed_counts(available, weights)
    if 0 in counts:
        raise DataError(
            "the weights leave a source without pairs: "
            + ", ".join(
                f"{source.label_in_reports} (weight {source.weight:g}) gets {count:,} of {total:,}"
                for source, count, total in zip(sources, counts, available)
            )
        )
    return [
        take_random(of_source, count, "over mixing weight", f"mix {seed} {n}")
        for n, (of_source, count) in enumerate(zip(reasons, counts))
    ]


def mixed_counts(available: list[int], weights: list[float]) -> list[int]:
    """Pairs to take of each source so that their shares are the weights' and the scarcest source is used in full."""
    scarcest = min(range(len(weights)), key=lambda n: available[n] / weights[n])
    unit = Fraction(available[scarcest]) / Fraction(weights[scarcest])
    return [min(count, round(Fraction(weight) * unit)) for count, weight in zip(available, weights)]


def take_portion(reasons: list[str], portion: str) -> list[str]:
    positions = selected(reasons)
    chosen = portion_range(portion, len(positions))
    return keep_only(reasons, set(positions[chosen.start : chosen.stop]), "outside portion")


def take_random(reasons: list[str], count: int, reason: str, seed: str) -> list[str]:
    """A random choice of `count` selected rows that depends on `seed` alone."""
    positions = selected(reasons)
    return keep_only(reasons, set(random.Random(seed).sample(positions, min(count, len(positions)))), reason)


def selected(reasons: list[str]) -> list[int]:
    """Positions of the rows that are selected so far."""
    return [position for position, reason in enumerate(reasons) if not reason]


def keep_only(reasons: list[str], kept: set[int], reason: str) -> list[str]:
    """The list in which the selected rows that are not in `kept` have `reason`."""
    return [earlier or ("" if n in kept else reason) for n, earlier in enumerate(reasons)]
