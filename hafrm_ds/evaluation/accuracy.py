"""Losses, accuracies and margins of a model on a set of pairs."""

import numpy as np
import torch
from torch import Tensor

from hafrm_ds.config import ObjectiveConfig
from hafrm_ds.evaluation.pair_scores import PairScores
from hafrm_ds.objective import ResponseScores, bradley_terry_loss, policy_loss, preference_metrics


def set_metrics(scores: PairScores, objective: ObjectiveConfig) -> dict[str, float]:
    """Means over the pairs of a set, in the names of metrics.jsonl.

    Returns:
        pairs, ties/JUDGE (a tie counts half in accuracy/JUDGE), accuracy/JUDGE, margin/JUDGE, loss/policy, loss/reward
        (the plain Bradley-Terry loss without margin, label smoothing and centering), and reward/mean and reward/std
        over all responses.
    """
    responses = ResponseScores(
        as_responses(scores.reward), as_responses(scores.logprob), as_responses(scores.num_tokens)
    )
    reference = as_responses(scores.reference)
    per_pair = preference_metrics(responses, reference, scores.beta)
    metrics: dict[str, float] = {"pairs": len(scores)}
    if responses.reward is not None:
        metrics["loss/reward"] = bradley_terry_loss(responses.reward).mean().item()
        metrics["reward/mean"] = responses.reward.mean().item()
        metrics["reward/std"] = responses.reward.std().item()
    if responses.logprob is not None and objective.uses_policy:
        metrics["loss/policy"] = policy_loss(objective, responses, reference).mean().item()
    for name, values in per_pair.items():
        metrics[name] = values.mean().item()
        if name.startswith("accuracy/"):
            metrics[name.replace("accuracy", "ties")] = int((values == 0.5).sum())
    return metrics


def as_responses(values: np.ndarray | None) -> Tensor | None:
    """[P, 2] -> [N], chosen and rejected in turns."""
    return None if values is None else torch.from_numpy(values).reshape(-1)
