"""How well a model gives the attributes of answers: against the values that a set has for them.

Legend: G groups, R responses of all of them, A attributes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hafrm_ds.data.lengths import places_of
from hafrm_ds.data.prepared import PreparedGroups
from hafrm_ds.data.tables import Table, count, number
from hafrm_ds.objective import attribute_heads, attribute_loss

MEASURES = {"r2": "R2", "spearman": "Spearman"}
"""What is measured of each attribute, and what people call it."""


def measure_attributes(
    groups: PreparedGroups, index: np.ndarray, scores: Mapping[str, np.ndarray], names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """What evaluation.json says of the attributes of a set: of each that some answer has a value of, the answers,
    `r2` and `spearman` over these, or None where all values are the same.

    Args:
        index: [G] which groups are scored. scores: by `objective.attribute_heads`, each [R] of the responses of these.
    """
    found = {}
    values = groups.attributes_of(names, places_of(groups.lengths.first, index))
    for name, head, of_name in zip(names, attribute_heads(names), values.T):
        known = ~np.isnan(of_name)
        if known.any():
            predicted, expected = (each[known].astype(np.float64) for each in (scores[head], of_name))
            measured = {"r2": r_squared(predicted, expected), "spearman": rank_correlation(predicted, expected)}
            found[name] = {"answers": int(known.sum())} | measured
    return found


def attribute_metrics(
    groups: PreparedGroups, index: np.ndarray, scores: Mapping[str, np.ndarray], names: Sequence[str]
) -> dict[str, float]:
    """The same in the names of metrics.jsonl, with loss/attributes as training has it. Arguments as there."""
    measured = measure_attributes(groups, index, scores, names)
    if not measured:
        return {}
    values = torch.from_numpy(groups.attributes_of(names, places_of(groups.lengths.first, index)))
    predicted = torch.from_numpy(np.stack([scores[head] for head in attribute_heads(names)], axis=1))
    owner = np.repeat(np.arange(len(index)), groups.lengths.num_responses[index])
    loss = attribute_loss(predicted, values, torch.from_numpy(owner), len(index)).mean().item()
    each = {f"{kind}/{name}": of_name[kind] for name, of_name in measured.items() for kind in MEASURES}
    return {"loss/attributes": loss} | {name: value for name, value in each.items() if value is not None}


def r_squared(predicted: np.ndarray, expected: np.ndarray) -> float | None:
    """1 - (squared errors / squared deviations from the mean); below 0 where the mean would be the better guess."""
    total = np.square(expected - expected.mean()).sum()
    return float(1 - np.square(expected - predicted).sum() / total) if total else None


def rank_correlation(predicted: np.ndarray, expected: np.ndarray) -> float | None:
    """Spearman's: the correlation of the ranks, equal values at the mean of their ranks. 0 where all predictions are
    the same."""
    ranks = [mean_ranks(each) for each in (predicted, expected)]
    one, other = (each - each.mean() for each in ranks)
    if not other.any():
        return None
    return float(one @ other / np.sqrt((one @ one) * (other @ other))) if one.any() else 0.0


def mean_ranks(values: np.ndarray) -> np.ndarray:
    _, place, numbers = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(numbers) - (numbers - 1) / 2)[place]


def attribute_table(measured: Mapping[str, Mapping[str, Any]]) -> Table:
    """What `measure_attributes` says, for people."""
    rows = [
        (name, [count(each["answers"]), *(number(each[kind]) for kind in MEASURES)]) for name, each in measured.items()
    ]
    return Table(rows, ("attribute", "answers", *MEASURES.values()))
