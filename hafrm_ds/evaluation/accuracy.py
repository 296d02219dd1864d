"""Losses, accuracies and margins of a model on a set of groups, mostly pairs."""

import numpy as np
import torch
from torch import Tensor

from hafrm_ds.config import ObjectiveConfig
from hafrm_ds.data.comparisons import Comparisons
from hafrm_ds.evaluation.order import GoldOrder
from hafrm_ds.evaluation.pair_scores import Grouping, PairScores
from hafrm_ds.objective import policy_loss, reward_loss


def set_metrics(scores: PairScores, objective: ObjectiveConfig) -> dict[str, float]:
    """Means over the comparisons and the groups of a set, in the names of metrics.jsonl.

    Returns:
        pairs (the comparisons), ties/JUDGE (a tie counts half in accuracy/JUDGE), accuracy/JUDGE and margin/JUDGE over
        the comparisons; loss/reward and loss/policy over the groups, as `JointLoss` has them; reward/mean and
        reward/std over all responses that are compared. Of a set with groups of more than two answers also groups,
        and over these tau_b/JUDGE and top_1/JUDGE, as `GoldOrder.measures` has them.
    """
    comparisons = comparisons_of(scores)

    def of_answers(values: np.ndarray | None) -> Tensor | None:
        return None if values is None else torch.from_numpy(scores.answers.values(values))

    reward, logprob, reference = map(of_answers, (scores.reward, scores.logprob, scores.reference))
    metrics: dict[str, float] = {"pairs": len(scores)}
    if reward is not None:
        metrics["loss/reward"] = reward_loss(objective, reward, comparisons).mean().item()
        metrics["reward/mean"] = reward.mean().item()
        metrics["reward/std"] = reward.std().item()
    if logprob is not None and objective.uses_policy:
        num_tokens = of_answers(scores.num_tokens)
        assert num_tokens is not None
        metrics["loss/policy"] = policy_loss(objective, logprob, reference, num_tokens, comparisons).mean().item()
    for judge, values in scores.judges.items():
        chosen, rejected = torch.from_numpy(values).unbind(dim=1)
        right = (torch.sign(chosen - rejected) + 1) / 2
        metrics[f"accuracy/{judge}"] = right.mean().item()
        metrics[f"ties/{judge}"] = int((right == 0.5).sum())
        metrics[f"margin/{judge}"] = (chosen - rejected).mean().item()
    if (order := GoldOrder.of(scores)) is not None:
        metrics["groups"] = comparisons.num_groups
        for judge in scores.judges:
            measures = order.measures(judge)
            metrics |= {f"{name}/{judge}": float(measures[name].mean()) for name in ("tau_b", "top_1")}
    return metrics


def comparisons_of(scores: PairScores) -> Comparisons:
    """The comparisons of a set, among its `answers`."""
    groups, answers = scores.groups or Grouping.of_pairs(len(scores)), scores.answers
    better, worse = answers.place.T.copy()
    group = answers.group[better]
    shares = (groups.weight / np.bincount(group, groups.weight)[group]).astype(np.float32)
    margin = np.zeros(len(scores), dtype=np.float32) if scores.margin is None else scores.margin
    as_tensor = torch.from_numpy
    return Comparisons(
        as_tensor(better),
        as_tensor(worse),
        as_tensor(group),
        as_tensor(shares),
        as_tensor(groups.target),
        as_tensor(margin),
        len(answers.sizes),
    )
