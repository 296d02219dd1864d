"""The joint objective as pure functions: reward losses, policy losses and their metrics.

Legend: P pairs, N = 2P responses ordered [chosen 0, rejected 0, chosen 1, rejected 1, ...]. Everything is fp32 and
per pair ([P]); nothing here averages. The loop divides once, by the pairs of the global batch.
"""

from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hafrm_ds.config import ObjectiveConfig

Values = TypeVar("Values", Tensor, np.ndarray)


class ResponseScores(NamedTuple):
    """What the model says about N responses. The one output of the model, for every use.

    A named tuple, because DeepSpeed looks for the tensors of a module's output in tuples and not in dataclasses.

    reward: [N] fp32, None when the reward head was not asked for.
    logprob: [N] fp32, log pi(response | prompt) summed over its tokens; None when the LM head was not run.
    num_tokens: [N] int64, tokens of each response.
    token_logprobs: [M] fp32, log pi of each response token, response after response; None without logprob.
    """

    reward: Tensor | None
    logprob: Tensor | None
    num_tokens: Tensor
    token_logprobs: Tensor | None = None


def chosen_and_rejected(values: Tensor) -> tuple[Tensor, Tensor]:
    """[N] -> ([P], [P])."""
    pairs = values.view(-1, 2)
    return pairs[:, 0], pairs[:, 1]


# ---- reward losses -------------------------------------------------------------------------------------------------


def bradley_terry_loss(reward: Tensor, margin: Tensor | None = None, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(r_c - r_r - m), [N] -> [P] (Bradley & Terry 1952; HAF-RM eq. of L_reward; margin: Llama 2, eq. 2).

    With label smoothing e: (1 - e) times that plus e times the loss of the flipped pair.

    Args:
        reward: [N] fp32.
        margin: [P] fp32 or None.
    """
    chosen, rejected = chosen_and_rejected(reward)
    logits = chosen - rejected if margin is None else chosen - rejected - margin
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def centering_penalty(reward: Tensor) -> Tensor:
    """(r_c + r_r)^2, [N] -> [P] (Eisenstein et al. 2023): a reward is defined up to a constant; this picks one."""
    chosen, rejected = chosen_and_rejected(reward)
    return (chosen + rejected).square()


# ---- policy losses -------------------------------------------------------------------------------------------------


def implicit_reward(logprob: Values, reference: Values, beta: float) -> Values:
    """beta * (log pi - log pi_ref) of each response (Rafailov et al. 2023, eq. 5, up to a constant of the prompt)."""
    return beta * (logprob - reference)


def dpo_loss(logprob: Tensor, reference: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(h), h = beta * [(log pi - log pi_ref)(c) - (log pi - log pi_ref)(r)] (Rafailov et al. 2023, eq. 7).

    Label smoothing as in conservative DPO (Mitchell 2023): (1 - e) * loss(h) + e * loss(-h). [N], [N] -> [P].
    """
    chosen, rejected = chosen_and_rejected(implicit_reward(logprob, reference, beta))
    logits = chosen - rejected
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def ipo_loss(logprob: Tensor, reference: Tensor, beta: float) -> Tensor:
    """(h - 1/(2 beta))^2 with h the difference of summed log-ratios (Azar et al. 2023, eq. 17; beta is their tau).

    [N], [N] -> [P].
    """
    chosen, rejected = chosen_and_rejected(logprob - reference)
    return (chosen - rejected - 1 / (2 * beta)).square()


def hinge_loss(logprob: Tensor, reference: Tensor, beta: float) -> Tensor:
    """max(0, 1 - h) with h as in DPO: SLiC's loss on DPO's margin (Liu et al. 2023). [N], [N] -> [P]."""
    chosen, rejected = chosen_and_rejected(implicit_reward(logprob, reference, beta))
    return F.relu(1 - (chosen - rejected))


def simpo_loss(logprob: Tensor, num_tokens: Tensor, beta: float, gamma: float) -> Tensor:
    """-log sigmoid(beta * [log pi(c)/|c| - log pi(r)/|r|] - gamma) (Meng et al. 2024, eq. 6). [N] -> [P]."""
    chosen, rejected = chosen_and_rejected(beta * logprob / num_tokens)
    return -F.logsigmoid(chosen - rejected - gamma)


def sft_loss(logprob: Tensor, num_tokens: Tensor) -> Tensor:
    """Mean negative log-prob of the chosen answer's tokens, the reference-free regulariser of GRM
    (Yang et al. 2024, eq. 8). [N] -> [P]."""
    chosen, _ = chosen_and_rejected(logprob / num_tokens)
    return -chosen


# ---- the joint loss ------------------------------------------------------------------------------------------------


class HeadWeights(NamedTuple):
    """What the two losses weigh at a step. A head of weight 0 is not computed in it."""

    reward: float
    policy: float


def weights_at(objective: ObjectiveConfig, step: int) -> HeadWeights:
    """The weights at optimizer step `step` (from 0): rm_weight and alpha, or one of them alone in the paper's
    alternating schedule.

    Blocks of alternate_every steps: the first with the policy loss alone, the second with the reward loss alone, and so
    on. They depend on the step alone, so all ranks run the same heads.
    """
    every = objective.alternate_every
    if every == 0:
        return HeadWeights(objective.rm_weight, objective.alpha)
    is_policy_block = (step // every) % 2 == 0
    return HeadWeights(0.0, objective.alpha) if is_policy_block else HeadWeights(objective.rm_weight, 0.0)


@dataclass(frozen=True)
class JointLoss:
    """Losses of each pair. total: [P], what is minimised. parts: name in metrics.jsonl -> [P], before weighting; those
    of a head of weight 0 are absent."""

    total: Tensor
    parts: dict[str, Tensor]


def joint_loss(
    objective: ObjectiveConfig,
    weights: HeadWeights,
    scores: ResponseScores,
    reference: Tensor | None,
    margin: Tensor,
) -> JointLoss:
    """weights.reward * L_reward + weights.policy * L_policy for each pair (HAF-RM, L_H), of which one may be absent.

    Args:
        reference: [N], where the policy loss uses one.
        margin: [P], used where objective.use_margin asks for it.

    Returns:
        Its parts are loss/reward, loss/policy and, where margin, label smoothing or centering make the reward loss
        another than the plain one, loss/reward_trained. loss/reward is the plain Bradley-Terry loss in every row, of
        training and of evaluation: that alone can be compared across runs and sets. So loss/total is the weighted sum
        of loss/reward_trained, where it is there, and loss/policy.
    """
    weighted, parts = [], {}
    if weights.reward:
        trained = parts["loss/reward"] = bradley_terry_loss(scores.reward)
        if objective.use_margin or objective.reward_label_smoothing:
            used_margin = margin if objective.use_margin else None
            trained = bradley_terry_loss(scores.reward, used_margin, objective.reward_label_smoothing)
        if objective.reward_centering:
            trained = trained + objective.reward_centering * centering_penalty(scores.reward)
        if trained is not parts["loss/reward"]:
            parts["loss/reward_trained"] = trained
        weighted.append(weights.reward * trained)
    if weights.policy:
        parts["loss/policy"] = policy_loss(objective, scores, reference)
        weighted.append(weights.policy * parts["loss/policy"])
    return JointLoss(torch.stack(weighted).sum(0), parts)


def policy_loss(objective: ObjectiveConfig, scores: ResponseScores, reference: Tensor | None) -> Tensor:
    """The configured policy loss of each pair: [P]. `reference` [N] is needed by dpo, ipo and hinge."""
    name, beta = objective.policy_loss, objective.beta
    if name == "dpo":
        return dpo_loss(scores.logprob, reference, beta, objective.policy_label_smoothing)
    if name == "ipo":
        return ipo_loss(scores.logprob, reference, beta)
    if name == "hinge":
        return hinge_loss(scores.logprob, reference, beta)
    if name == "simpo":
        return simpo_loss(scores.logprob, scores.num_tokens, beta, objective.simpo_gamma)
    return sft_loss(scores.logprob, scores.num_tokens)


# ---- judges and metrics --------------------------------------------------------------------------------------------


def judges(reward: Values | None, logprob: Values | None, reference: Values | None, beta: float) -> dict[str, Values]:
    """What takes sides between answers, of all that is known of them: name -> values of the shape given.

    reward: the reward head. implicit: beta * (log pi - log pi_ref). logprob: log pi itself. The larger value is the
    preferred answer.
    """
    found = {}
    if reward is not None:
        found["reward"] = reward
    if logprob is not None and reference is not None:
        found["implicit"] = implicit_reward(logprob, reference, beta)
    if logprob is not None:
        found["logprob"] = logprob
    return found


def preference_metrics(scores: ResponseScores, reference: Tensor | None, beta: float) -> dict[str, Tensor]:
    """Accuracy and margin of each of the judges, per pair: name -> [P] fp32. A tie counts half."""
    metrics = {}
    for judge, values in judges(scores.reward, scores.logprob, reference, beta).items():
        chosen, rejected = chosen_and_rejected(values.detach())
        metrics[f"accuracy/{judge}"] = (torch.sign(chosen - rejected) + 1) / 2
        metrics[f"margin/{judge}"] = chosen - rejected
    return metrics
