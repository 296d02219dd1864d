"""The objective of a run: its options applied to the pure functions of `hafrm_ds.objective`."""

from torch import Tensor

from hafrm_ds.config import ObjectiveConfig
from hafrm_ds.objective import (
    JointLoss,
    ResponseScores,
    alternating_weights,
    bradley_terry_loss,
    centering_penalty,
    joint_loss,
    policy_loss,
)


def configured_policy_loss(objective: ObjectiveConfig, scores: ResponseScores, reference: Tensor | None) -> Tensor:
    """[P] for scores of N = 2P responses; `reference` [N] where the loss uses one."""
    return policy_loss(
        objective.policy_loss,
        scores,
        reference,
        beta=objective.beta,
        label_smoothing=objective.policy_label_smoothing,
        simpo_gamma=objective.simpo_gamma,
    )


def configured_joint_loss(
    objective: ObjectiveConfig, step: int, scores: ResponseScores, reference: Tensor | None, margin: Tensor
) -> JointLoss:
    """The losses of each pair at optimizer step `step` (from 0).

    Args:
        margin: [P], used where objective.use_margin asks for it.
    """
    reward = centering = policy = None
    if objective.uses_reward:
        used_margin = margin if objective.use_margin else None
        reward = bradley_terry_loss(scores.reward, used_margin, objective.reward_label_smoothing)
        if objective.reward_centering:
            centering = objective.reward_centering * centering_penalty(scores.reward)
    if objective.uses_policy:
        policy = configured_policy_loss(objective, scores, reference)
    rm_weight, alpha = alternating_weights(step, objective.alternate_every, objective.rm_weight, objective.alpha)
    return joint_loss(reward, policy, rm_weight=rm_weight, alpha=alpha, centering=centering)
