"""Losses, accuracies and margins of a model on a set of groups, mostly pairs."""

import numpy as np
import torch
from torch import Tensor

from hafrm_ds.config import ObjectiveConfig
from hafrm_ds.data.comparisons import Comparisons
from hafrm_ds.evaluation.pair_scores import Grouping, PairScores
from hafrm_ds.objective import policy_loss, reward_loss


def set_metrics(scores: PairScores, objective: ObjectiveConfig) -> dict[str, float]:
    """Means over the comparisons and the groups of a set, in the names of metrics.jsonl.

    Returns:
        pairs (the comparisons), ties/JUDGE (a tie counts half in accuracy/JUDGE), accuracy/JUDGE and margin/JUDGE over
        the comparisons; loss/reward and loss/policy over the groups, as `JointLoss` has them; reward/mean and
        reward/std over all responses that are compared.
    """
    answers = AnswerScores.of(scores)
    reward, logprob, reference = map(answers.values, (scores.reward, scores.logprob, scores.reference))
    metrics: dict[str, float] = {"pairs": len(scores)}
    if reward is not None:
        metrics["loss/reward"] = reward_loss(objective, reward, answers.comparisons).mean().item()
        metrics["reward/mean"] = reward.mean().item()
        metrics["reward/std"] = reward.std().item()
    if logprob is not None and objective.uses_policy:
        num_tokens = answers.values(scores.num_tokens)
        assert num_tokens is not None
        loss = policy_loss(objective, logprob, reference, num_tokens, answers.comparisons)
        metrics["loss/policy"] = loss.mean().item()
    for judge, values in scores.judges.items():
        chosen, rejected = torch.from_numpy(values).unbind(dim=1)
        right = (torch.sign(chosen - rejected) + 1) / 2
        metrics[f"accuracy/{judge}"] = right.mean().item()
        metrics[f"ties/{judge}"] = int((right == 0.5).sum())
        metrics[f"margin/{judge}"] = (chosen - rejected).mean().item()
    return metrics


class AnswerScores:
    """The answers that the comparisons of a set are made of, each once: N of them.

    comparisons: of these answers. row, side: [N] where the scores of each stand among those of the comparisons.
    """

    def __init__(self, comparisons: Comparisons, row: np.ndarray, side: np.ndarray):
        self.comparisons, self.row, self.side = comparisons, row, side

    @classmethod
    def of(cls, scores: PairScores) -> "AnswerScores":
        groups = scores.groups or Grouping.of_pairs(len(scores))
        # An answer as one number, ascending by group and position; of pairs chosen and rejected in turns.
        names = groups.number[:, None] * (int(groups.answers.max(initial=0)) + 1) + groups.answers
        _, first, place = np.unique(names, return_index=True, return_inverse=True)
        place = place.reshape(-1, 2)
        _, group = np.unique(groups.number, return_inverse=True)
        number = int(group.max(initial=-1)) + 1
        total = np.bincount(group, groups.weight, minlength=number)
        margin = np.zeros(len(scores), dtype=np.float32) if scores.margin is None else scores.margin
        shares = (groups.weight / total[group]).astype(np.float32)
        columns = (place[:, 0], place[:, 1], group, shares, groups.target, margin)
        better, worse, of_group, share, target, of_data = (torch.from_numpy(column) for column in columns)
        row, side = np.divmod(first, 2)
        return cls(Comparisons(better, worse, of_group, share, target, of_data, number), row, side)

    def values(self, of_comparisons: np.ndarray | None) -> Tensor | None:
        """[P, 2] -> [N]."""
        return None if of_comparisons is None else torch.from_numpy(of_comparisons[self.row, self.side])
