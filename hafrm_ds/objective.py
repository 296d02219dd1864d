"""The joint objective as pure functions: reward losses, policy losses and their metrics.

Legend: G groups, N responses of all of them, C comparisons among these. Everything is fp32. Losses of comparisons are
[C]; a group's is their mean, or that of its whole order, [G]. Nothing here averages over groups: the loop divides once,
by what the groups of the global batch weigh.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hafrm_ds.config import ObjectiveConfig
from hafrm_ds.data.comparisons import Comparisons

Values = TypeVar("Values", Tensor, np.ndarray)


class RouterUse(NamedTuple):
    """How a mixture of experts spread the tokens of G groups over E experts in L layers.

    loss: [G] fp32, smallest (k, for k experts a token) where all get as many. load: [G, L, E] fp32, tokens that each
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
    router: of groups, where it was asked for.
    attributes: [N, A] fp32, of a model with attributes where the reward head was asked.
    """

    reward: Tensor | None
    logprob: Tensor | None
    num_tokens: Tensor
    token_logprobs: Tensor | None = None
    router: RouterUse | None = None
    attributes: Tensor | None = None

    def of(self, head: str) -> Tensor:
        """[N] (or [M]): what the model was asked for, by the name of its field, or one of `attribute_heads`."""
        name, _, place = head.partition("/")
        values = getattr(self, name)
        assert values is not None, f"the model was not asked for {name}"
        return values[:, int(place)] if place else values


def attribute_heads(names: Sequence[str]) -> tuple[str, ...]:
    """What `ResponseScores.of` calls each of a model's attributes."""
    return tuple(f"attributes/{place}" for place in range(len(names)))


# ---- losses of comparisons, [N] -> [C] -----------------------------------------------------------------------------


def expected(loss: Callable[[Tensor], Tensor], difference: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    """p * loss(d) + (1 - p) * loss(-d), where the better answer is preferred with the probability p, [C] -> [C].

    Args:
        difference: d, of the better answer's score and the worse one's.
        target: [C] the probability by the data, 1 for a plain comparison.
        label_smoothing: probability that a label is flipped besides (Mitchell 2023).
    """
    kept, flipped = 1 - label_smoothing, label_smoothing
    as_told, otherwise = target * kept + (1 - target) * flipped, target * flipped + (1 - target) * kept
    return as_told * loss(difference) + otherwise * loss(-difference)


def negative_log_sigmoid(difference: Tensor) -> Tensor:
    return -F.logsigmoid(difference)


def bradley_terry_loss(reward: Tensor, comparisons: Comparisons, use_margin: bool, label_smoothing: float) -> Tensor:
    """-log sigmoid(r_b - r_w - m) (Bradley & Terry 1952; HAF-RM eq. of L_reward; margin: Llama 2, eq. 2)."""
    difference = comparisons.difference(reward)
    if use_margin:
        difference = difference - comparisons.margin
    return expected(negative_log_sigmoid, difference, comparisons.target, label_smoothing)


def centering_penalty(reward: Tensor, comparisons: Comparisons) -> Tensor:
    """(r_b + r_w)^2 (Eisenstein et al. 2023): a reward is defined up to a constant; this picks one."""
    return (reward[comparisons.better] + reward[comparisons.worse]).square()


def implicit_reward(logprob: Values, reference: Values, beta: float) -> Values:
    """beta * (log pi - log pi_ref) of each response (Rafailov et al. 2023, eq. 5, up to a constant of the prompt)."""
    return beta * (logprob - reference)


def dpo_loss(
    logprob: Tensor, reference: Tensor, comparisons: Comparisons, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """-log sigmoid(h), h = beta * [(log pi - log pi_ref)(b) - (log pi - log pi_ref)(w)] (Rafailov et al. 2023, eq. 7).

    Label smoothing as in conservative DPO (Mitchell 2023): (1 - e) * loss(h) + e * loss(-h).
    """
    difference = comparisons.difference(implicit_reward(logprob, reference, beta))
    return expected(negative_log_sigmoid, difference, comparisons.target, label_smoothing)


def ipo_loss(logprob: Tensor, reference: Tensor, comparisons: Comparisons, beta: float) -> Tensor:
    """(h - 1/(2 beta))^2 with h the difference of summed log-ratios (Azar et al. 2023, eq. 17; beta is their tau)."""
    difference = comparisons.difference(logprob - reference)
    return expected(lambda h: (h - 1 / (2 * beta)).square(), difference, comparisons.target, 0.0)


def hinge_loss(logprob: Tensor, reference: Tensor, comparisons: Comparisons, beta: float) -> Tensor:
    """max(0, 1 - h) with h as in DPO: SLiC's loss on DPO's margin (Liu et al. 2023)."""
    difference = comparisons.difference(implicit_reward(logprob, reference, beta))
    return expected(lambda h: F.relu(1 - h), difference, comparisons.target, 0.0)


def simpo_loss(logprob: Tensor, num_tokens: Tensor, comparisons: Comparisons, beta: float, gamma: float) -> Tensor:
    """-log sigmoid(beta * [log pi(b)/|b| - log pi(w)/|w|] - gamma) (Meng et al. 2024, eq. 6)."""
    difference = comparisons.difference(beta * logprob / num_tokens)
    return expected(lambda h: -F.logsigmoid(h - gamma), difference, comparisons.target, 0.0)


def sft_loss(logprob: Tensor, num_tokens: Tensor, comparisons: Comparisons) -> Tensor:
    """Mean negative log-prob of the preferred answer's tokens, the reference-free regulariser of GRM
    (Yang et al. 2024, eq. 8)."""
    per_token = -(logprob / num_tokens)
    target = comparisons.target
    return target * per_token[comparisons.better] + (1 - target) * per_token[comparisons.worse]


# ---- losses of whole orders, [N] -> [G] ----------------------------------------------------------------------------


def plackett_luce_loss(score: Tensor, comparisons: Comparisons) -> Tensor:
    """-log P(order): answers are drawn one after another, the best first, each with a probability in proportion to
    exp(score) among those that are left (Plackett 1975; Rafailov et al. 2023, appendix A.3, eq. 20, where the score is
    the implicit reward). Of two answers it is the loss of Bradley and Terry.

    Those left beside an answer are the ones that it is better than, so answers that tie are each drawn as if the others
    of their place were not there.
    """
    return summed_over_groups(draw_losses(score, comparisons), comparisons)


def best_of_rest_loss(score: Tensor, comparisons: Comparisons) -> Tensor:
    """-log P(the best is drawn first), the first factor of Plackett-Luce: the best answer against all that it is better
    than by one softmax. Several that are best count as their mean."""
    is_worse = torch.zeros_like(score).index_fill(0, comparisons.worse, 1.0)
    is_best = torch.zeros_like(score).index_fill(0, comparisons.better, 1.0) * (1 - is_worse)
    number = summed_over_groups(is_best, comparisons)
    return summed_over_groups(draw_losses(score, comparisons) * is_best, comparisons) / number


def draw_losses(score: Tensor, comparisons: Comparisons) -> Tensor:
    """-log(exp(s_i) / (exp(s_i) + sum of exp(s_j) over the answers j that i is better than)), [N]; 0 where there are
    none."""
    better, worse = comparisons.better, comparisons.worse
    largest = score.detach().scatter_reduce(0, better, score.detach()[worse], "amax")
    others = torch.zeros_like(score).index_add(0, better, (score[worse] - largest[better]).exp())
    own = score - largest
    return (own.exp() + others).log() - own


def summed_over_groups(values: Tensor, comparisons: Comparisons) -> Tensor:
    """[N] -> [G], of values that are 0 for answers that are better than none."""
    group = torch.zeros(len(values), dtype=torch.int64, device=values.device)
    group = group.scatter(0, comparisons.better, comparisons.group)
    return values.new_zeros(comparisons.num_groups).index_add(0, group, values)


# ---- regression, [N, A] -> [G] -------------------------------------------------------------------------------------


def attribute_loss(predicted: Tensor, values: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Mean squared error over the known values of each group; 0 for a group without any. The attributes of HelpSteer2
    are learned so (Wang et al. 2024), by the regression reward models of NeMo-Aligner. Of a group that is laid out in
    parts, each part has the mean over its own answers.

    Args:
        predicted: [N, A]. values: [N, A], NaN where unknown. group: [N] which of the groups each response belongs to.
    """
    known = ~values.isnan()
    errors = torch.where(known, predicted - values.nan_to_num(), 0.0).square()
    total, number = (
        predicted.new_zeros(num_groups).index_add(0, group, each.sum(1)) for each in (errors, known.to(predicted.dtype))
    )
    return total / number.clamp(min=1)


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
    """Losses of groups: total [G] and its parts before weighting (None where a part is not computed, as in the block of
    an alternating run in which it weighs nothing).

    The parts are `loss/reward` and so on in the rows of training and evaluation alike: the losses that are
    trained, with the margins and label smoothing where the objective uses them. Centering is in the total alone.
    router, attributes: that of the experts' routers and that of the attributes, where they are trained.
    """

    total: Tensor
    reward: Tensor | None
    policy: Tensor | None
    router: Tensor | None = None
    attributes: Tensor | None = None

    def with_part(self, name: str, loss: Tensor, weight: float) -> "JointLoss":
        """The same with one more loss, [G], in the total, by the name of its field."""
        return replace(self, total=self.total + weight * loss, **{name: loss})


def joint_loss(
    objective: ObjectiveConfig,
    weights: LossWeights,
    scores: ResponseScores,
    reference: Tensor | None,
    comparisons: Comparisons,
    trains_reward: Tensor | None = None,
) -> JointLoss:
    """rm_weight * L_reward + alpha * L_policy for each group (HAF-RM, L_H), of what the model was asked for.

    Args:
        reference: [N] log pi_ref, where the policy loss uses it.
        trains_reward: [G] 1 for a group that trains the reward loss, and 0 for one whose reward loss is none; None
            where all do.
    """
    reward = policy = None
    parts = []
    if scores.reward is not None and objective.uses_reward:
        reward = reward_loss(objective, scores.reward, comparisons)
        centered = reward
        if objective.reward_centering:
            penalty = comparisons.mean(centering_penalty(scores.reward, comparisons))
            centered = reward + objective.reward_centering * penalty
        if trains_reward is not None:
            reward, centered = reward * trains_reward, centered * trains_reward
        parts.append(weights.reward * centered)
    if scores.logprob is not None and objective.uses_policy:
        policy = policy_loss(objective, scores.logprob, reference, scores.num_tokens, comparisons)
        parts.append(weights.policy * policy)
    return JointLoss(total=torch.stack(parts).sum(0), reward=reward, policy=policy)


ORDER_LOSSES = {"plackett_luce": plackett_luce_loss, "best": best_of_rest_loss}
"""Losses of a whole order of answers, by objective.ranking_loss."""


def reward_loss(objective: ObjectiveConfig, reward: Tensor, comparisons: Comparisons) -> Tensor:
    """[N] -> [G]."""
    if objective.ranking_loss != "pairwise":
        return ORDER_LOSSES[objective.ranking_loss](reward, comparisons)
    smoothing = objective.reward_label_smoothing
    return comparisons.mean(bradley_terry_loss(reward, comparisons, objective.use_margin, smoothing))


def policy_loss(
    objective: ObjectiveConfig,
    logprob: Tensor,
    reference: Tensor | None,
    num_tokens: Tensor,
    comparisons: Comparisons,
) -> Tensor:
    """[N] log-probs, their references where the loss uses them, and lengths -> [G]."""
    beta, kind = objective.beta, objective.policy_loss
    if not objective.uses_reference:
        if kind == "simpo":
            losses = simpo_loss(logprob, num_tokens, comparisons, beta, objective.simpo_gamma)
        else:
            losses = sft_loss(logprob, num_tokens, comparisons)
        return comparisons.mean(losses)
    assert reference is not None
    if objective.ranking_loss != "pairwise":
        return ORDER_LOSSES[objective.ranking_loss](implicit_reward(logprob, reference, beta), comparisons)
    if kind == "ipo":
        return comparisons.mean(ipo_loss(logprob, reference, comparisons, beta))
    if kind == "hinge":
        return comparisons.mean(hinge_loss(logprob, reference, comparisons, beta))
    return comparisons.mean(dpo_loss(logprob, reference, comparisons, beta, objective.policy_label_smoothing))


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
    seen, folds: a short hash of each prompt (`hafrm_ds.evaluation.combined`), and the weights that were fitted without
        each fold of the prompts.
    """

    weights: tuple[float, float]
    low: tuple[float, float]
    high: tuple[float, float]
    deviations: tuple[float, float]
    beta: float
    set: str
    pairs: int
    prompts: int
    seen: str
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


def preference_metrics(
    scores: ResponseScores, reference: Tensor | None, beta: float, comparisons: Comparisons
) -> dict[str, Tensor]:
    """Accuracy and margin of each of the judges, means over the comparisons of a group: name -> [G] fp32. A tie of the
    judge counts half."""
    metrics = {}
    for judge, values in judges(scores.reward, scores.logprob, reference, beta).items():
        difference = comparisons.difference(values.detach())
        metrics[f"accuracy/{judge}"] = comparisons.mean((torch.sign(difference) + 1) / 2)
        metrics[f"margin/{judge}"] = comparisons.mean(difference)
    return metrics
