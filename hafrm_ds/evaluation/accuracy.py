"""Losses, accuracies and margins of a model on a set of pairs."""

import numpy as np
import torch
from torch import Tensor

from hafrm_ds.config import ObjectiveConfig
from hafrm_ds.evaluation.pair_scores import PairScores
from hafrm_ds.objective import ResponseScores, metrics_of, policy_loss, preference_metrics, reward_loss


def set_metrics(scores: PairScores, objective: ObjectiveConfig, margin: np.ndarray | None = None) -> dict[str, float]:
    """Means over the pairs of a set, in the names of metrics.jsonl.

    Args:
        margin: [P] of the pairs, where objective.use_margin asks for it; None: 0.

    Returns:
        pairs, ties/JUDGE (a tie counts half in accuracy/JUDGE), accuracy/JUDGE, margin/JUDGE, loss/reward and
        loss/policy as `JointLoss` has them, and reward/mean and reward/std over all responses.
    """
    responses = ResponseScores(
        as_responses(scores.reward), as_responses(scores.logprob), torch.from_numpy(scores.num_tokens).reshape(-1)
    )
    reference = as_responses(scores.reference)
    per_pair = preference_metrics(responses, reference, scores.beta)
    if (combined := as_responses(scores.combined)) is not None:
        per_pair |= metrics_of({"combined": combined})
    metrics: dict[str, float] = {"pairs": len(scores)}
    if responses.reward is not None:
        margins = torch.zeros(len(scores)) if margin is None else torch.from_numpy(margin)
        metrics["loss/reward"] = reward_loss(objective, responses.reward, margins).mean().item()
        metrics["reward/mean"] = responses.reward.mean().item()
        metrics["reward/std"] = responses.reward.std().item()
    if responses.logprob is not None and objective.uses_policy:
        loss = policy_loss(objective, responses.logprob, reference, responses.num_tokens)
        metrics["loss/policy"] = loss.mean().item()
    for name, values in per_pair.items():
        metrics[name] = values.mean().item()
        if name.startswith("accuracy/"):
            metrics[name.replace("accuracy", "ties")] = int((values == 0.5).sum())
    return metrics


def as_responses(values: np.ndarray | None) -> Tensor | None:
    """[P, 2] -> [N], chosen and rejected in turns."""
    return None if values is None else torch.from_numpy(values).reshape(-1)
