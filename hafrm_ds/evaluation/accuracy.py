"""Losses, accuracies and margins of a model on a set of pairs."""

import numpy as np
import torch

from hafrm_ds.config import ObjectiveConfig
from hafrm_ds.objective import ResponseScores, bradley_terry_loss, preference_metrics
from hafrm_ds.training.losses import configured_policy_loss


def set_metrics(
    scores: dict[str, np.ndarray], num_tokens: np.ndarray, reference: np.ndarray | None, objective: ObjectiveConfig
) -> dict[str, float]:
    """Means over the pairs of a set, in the names of metrics.jsonl.

    Args:
        scores: "reward" and "logprob" where known, each [P, 2] (chosen, rejected).
        num_tokens: [P, 2] response tokens.
        reference: [P, 2] reference log-probs or None.

    Returns:
        pairs, ties/JUDGE (a tie counts half in accuracy/JUDGE), accuracy/JUDGE, margin/JUDGE, loss/policy, loss/reward
        (the plain Bradley-Terry loss without margin, label smoothing and centering), and reward/mean and reward/std
        over all responses.
    """
    tensors = {name: torch.from_numpy(values).reshape(-1) for name, values in scores.items()}
    responses = ResponseScores(
        reward=tensors.get("reward"),
        logprob=tensors.get("logprob"),
        num_tokens=torch.from_numpy(num_tokens).reshape(-1),
    )
    reference_values = None if reference is None else torch.from_numpy(reference).reshape(-1)
    per_pair = preference_metrics(responses, reference_values, objective.beta)
    metrics: dict[str, float] = {"pairs": len(num_tokens)}
    if responses.reward is not None:
        metrics["loss/reward"] = bradley_terry_loss(responses.reward).mean().item()
        metrics["reward/mean"] = responses.reward.mean().item()
        metrics["reward/std"] = responses.reward.std().item()
    if responses.logprob is not None and objective.uses_policy:
        loss = configured_policy_loss(objective, responses, reference_values)
        metrics["loss/policy"] = loss.mean().item()
    for name, values in per_pair.items():
        metrics[name] = values.mean().item()
        if name.startswith("accuracy/"):
            metrics[name.replace("accuracy", "ties")] = int((values == 0.5).sum())
    return metrics
