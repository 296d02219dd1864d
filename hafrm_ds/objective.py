"""The joint objective as pure functions: reward losses, policy losses and their metrics.

Legend: P pairs, N = 2P responses ordered [chosen 0, rejected 0, chosen 1, rejected 1, ...]. Everything is fp32 and
per pair ([P]); nothing here averages. The loop divides once, by the pairs of the global batch.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hafrm_ds.config import ObjectiveConfig

Values = TypeVar("Values", Tensor, np.ndarray)


class RouterUse(NamedTuple):
    """How a mixture of experts spread the tokens of P pairs over E experts in L layers.

    loss: [P] fp32, smallest (k, for k experts a token) where all get as many. load: [P, L, E] fp32, tokens that each
    expert got, without gradient.
    """

    loss: Tensor
    load: Tensor


class ResponseScores(NamedTuple):
    """What the model says about N responses. The one output of the model, for every use.

    A named tuple, because DeepSpeed looks for the tensors of a module's output in tuples and not in dataclasses.

    reward: [N] fp32, None when the reward head was not asked for.
    logprob: [N] fp32, log pi(response | prompt) summed over its tokens; None when the LM head was not run.
    num_tokens: [N] int64, tokens of each response.
    token_logprobs: [M] fp32, log pi of each response token, response after response; None without logprob.
    router: of pairs, where it was asked for.
    """

    reward: Tensor | None
    logprob: Tensor | None
    num_tokens: Tensor
    token_logprobs: Tensor | None = None
    router: RouterUse | None = None

    def of(self, head: str) -> Tensor:
        """[N] (or [M]): what the model was asked for, by the name of its field."""
        values = getattr(self, head)
        assert values is not None, f"the model was not asked for {head}"
        return values


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


class LossWeights(NamedTuple):
    """What the two losses of a step count: rm_weight and alpha, or 0."""

    reward: float
    policy: float


def weights_at(objective: ObjectiveConfig, step: int, found_alpha: float | None = None) -> LossWeights:
    """The weights at optimizer step `step` (from 0), the same on all ranks.

    Args:
        found_alpha: the weight that objective.policy_share stands for; without a share it is not read.

    With objective.alternate_every = k they alternate in blocks of k steps, as in the paper: first the policy loss
    alone, then the reward loss alone, and so on. With 0 both losses count in every step.
    """
    every, alpha = objective.alternate_every, objective.alpha if objective.policy_share is None else found_alpha
    assert alpha is not None, "the weight of the policy loss has not been found yet"
    if every and (step // every) % 2 == 0:
        return LossWeights(0.0, alpha)
    return LossWeights(objective.rm_weight, 0.0 if every else alpha)


@dataclass(frozen=True)
class JointLoss:
    """Per-pair losses: total [P] and its parts before weighting (None where a part is not computed, as in the block of
    an alternating run in which it weighs nothing).

    The parts are `loss/reward` and `loss/policy` in the rows of training and evaluation alike: the losses that are
    trained, with the pairs' margins and label smoothing where the objective uses them. Centering is in the total alone.
    router: that of the experts' routers, where it is trained.
    """

    total: Tensor
    reward: Tensor | None
    policy: Tensor | None
    router: Tensor | None = None

    def with_router(self, router: Tensor, coefficient: float) -> "JointLoss":
        """The same with the loss of the routers, [P], in the total."""
        return replace(self, total=self.total + coefficient * router, router=router)


def joint_loss(
    objective: ObjectiveConfig,
    weights: LossWeights,
    scores: ResponseScores,
    reference: Tensor | None,
    margin: Tensor,
) -> JointLoss:
    """rm_weight * L_reward + alpha * L_policy for each pair (HAF-RM, L_H), of what the model was asked for.

    Args:
        reference: [N] log pi_ref, where the policy loss uses it.
        margin: [P], where objective.use_margin asks for it.
    """
    reward = policy = None
    parts = []
    if scores.reward is not None and objective.uses_reward:
        reward = reward_loss(objective, scores.reward, margin)
        centered = reward
        if objective.reward_centering:
            centered = reward + objective.reward_centering * centering_penalty(scores.reward)
        parts.append(weights.reward * centered)
    if scores.logprob is not None and objective.uses_policy:
        policy = policy_loss(objective, scores.logprob, reference, scores.num_tokens)
        parts.append(weights.policy * policy)
    return JointLoss(total=torch.stack(parts).sum(0), reward=reward, policy=policy)


def reward_loss(objective: ObjectiveConfig, reward: Tensor, margin: Tensor) -> Tensor:
    """[N], [P] -> [P]."""
    return bradley_terry_loss(reward, margin if objective.use_margin else None, objective.reward_label_smoothing)


def policy_loss(objective: ObjectiveConfig, logprob: Tensor, reference: Tensor | None, num_tokens: Tensor) -> Tensor:
    """[N] log-probs, their references where the loss uses them, and lengths -> [P]."""
    beta = objective.beta
    if not objective.uses_reference:
        if objective.policy_loss == "simpo":
            return simpo_loss(logprob, num_tokens, beta, objective.simpo_gamma)
        return sft_loss(logprob, num_tokens)
    assert reference is not None
    if objective.policy_loss == "ipo":
        return ipo_loss(logprob, reference, beta)
    if objective.policy_loss == "hinge":
        return hinge_loss(logprob, reference, beta)
    return dpo_loss(logprob, reference, beta, objective.policy_label_smoothing)


# ---- judges and metrics --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JudgeFit:
    """Both heads of a model as one judge, `combined`: what a unit of either head's score counts.

    The score is the logit of being preferred, up to a constant of the prompt, as the implicit reward is: it compares
    answers to one prompt. `hafrm_ds.evaluation.combined` fits it. All pairs of numbers are (reward head, implicit
    reward).

    weights: logits per unit of score. low, high: the ends of their 95% intervals.
    deviations: root mean squares of the margins over the pairs of the fit.
    beta: scale of the implicit reward that the second weight belongs to.
    set, pairs, prompts: name of the set that it was fitted on, its pairs, and its different prompts.
    prompts_sha256, folds: what the prompts are, and the weights that were fitted without each fold of them.
    """

    weights: tuple[float, float]
    low: tuple[float, float]
    high: tuple[float, float]
    deviations: tuple[float, float]
    beta: float
    set: str
    pairs: int
    prompts: int
    prompts_sha256: str
    folds: tuple[tuple[float, float], ...]

    def score(self, reward: Values, logprob: Values, reference: Values) -> Values:
        """The logits of answers, in the shape given."""
        return self.weights[0] * reward + self.weights[1] * implicit_reward(logprob, reference, self.beta)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "JudgeFit":
        """Raises TypeError for what `to_json` has not made."""
        pairs = {name: tuple(content[name]) for name in ("weights", "low", "high", "deviations")}
        return cls(**content | pairs | {"folds": tuple(map(tuple, content["folds"]))})


def judges(
    reward: Values | None,
    logprob: Values | None,
    reference: Values | None,
    beta: float,
    fit: JudgeFit | None = None,
) -> dict[str, Values]:
    """What takes sides between answers, of all that is known of them: name -> values of the shape given.

    reward: the reward head. implicit: beta * (log pi - log pi_ref). logprob: log pi itself. combined: the first two by
    their fit. The larger value is the preferred answer.
    """
    found = {}
    if reward is not None:
        found["reward"] = reward
    if logprob is not None and reference is not None:
        found["implicit"] = implicit_reward(logprob, reference, beta)
    if logprob is not None:
        found["logprob"] = logprob
    if fit is not None and reward is not None and logprob is not None and reference is not None:
        found["combined"] = fit.score(reward, logprob, reference)
    return found


def preference_metrics(scores: ResponseScores, reference: Tensor | None, beta: float) -> dict[str, Tensor]:
    """Accuracy and margin of each of the judges, per pair: name -> [P] fp32. A tie counts half."""
    return metrics_of(judges(scores.reward, scores.logprob, reference, beta))


def metrics_of(judged: dict[str, Tensor]) -> dict[str, Tensor]:
    """The metrics of judges from what they say, name -> [N]."""
    metrics = {}
    for judge, values in judged.items():
        chosen, rejected = chosen_and_rejected(values.detach())
        metrics[f"accuracy/{judge}"] = (torch.sign(chosen - rejected) + 1) / 2
        metrics[f"margin/{judge}"] = chosen - rejected
    return metrics
