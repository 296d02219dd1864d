"""The share of the policy loss in the pull on the body, and the alpha that gives a wanted one.

Legend: g_r the gradient of rm_weight * L_reward over a global batch with respect to the body, g_p that of L_policy.
The share of the policy loss is |alpha g_p| / (|g_r| + |alpha g_p|).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from hafrm_ds.errors import UserError

FIRST_BATCHES = 8
"""Global batches that alpha is found from before the first step."""
READJUSTMENT = 0.25
"""Part of the way to the alpha of a single measurement, in its logarithm, that a kept share moves at once: the ratio of
the norms of one batch is noisy."""


class Pull(NamedTuple):
    """How strongly each loss pulls the body over a global batch: |g_r|, |alpha g_p| and the cosine between them."""

    reward: float
    policy: float
    cosine: float

    @classmethod
    def of(cls, reward_reward: float, reward_policy: float, policy_policy: float) -> "Pull":
        """From the inner products of g_r and alpha g_p."""
        reward, policy = (math.sqrt(max(square, 0.0)) for square in (reward_reward, policy_policy))
        return cls(reward, policy, reward_policy / (reward * policy) if reward * policy else math.nan)

    @classmethod
    def of_joint(cls, reward_reward: float, reward_joint: float, joint_joint: float) -> "Pull":
        """From the inner products of g_r and the gradient of the joint loss, g_r + alpha g_p."""
        return cls.of(reward_reward, reward_joint - reward_reward, joint_joint - 2 * reward_joint + reward_reward)

    @property
    def is_of_both(self) -> bool:
        """Whether both losses pull. The hinge loss does not where all pairs of a batch are beyond its margin."""
        return 0 < self.reward < math.inf and 0 < self.policy < math.inf

    def times(self, alpha: float) -> "Pull":
        """What it is under the weight alpha, if it was measured under 1."""
        return self._replace(policy=alpha * self.policy)

    def metrics(self, alpha: float) -> dict[str, float]:
        """A row of kind gradients, without what is not defined where a loss does not pull.

        Args:
            alpha: the weight that the policy loss had.
        """
        row = {"alpha": alpha, "body_grad_norm/reward": self.reward, "body_grad_norm/policy": self.policy}
        if self.reward + self.policy > 0:
            row["policy_share"] = self.policy / (self.reward + self.policy)
        if self.is_of_both:
            row["body_grad_cosine"] = self.cosine
        return row


def alpha_for(share: float, pulls: Sequence[Pull]) -> float:
    """The weight that gives the policy loss a share, in the geometric mean over batches that were measured with 1.

    Raises:
        UserError: in one of them a loss does not pull.
    """
    for number, pull in enumerate(pulls, start=1):
        if not pull.is_of_both:
            raise UserError(
                f"objective.policy_share: in batch {number} of {len(pulls)} the gradients of the reward loss and the "
                f"policy loss on the body have the norms {pull.reward} and {pull.policy}, so no alpha gives a share. "
                "Give --objective.alpha instead"
            )
    return math.exp(sum(missing(share, pull) for pull in pulls) / len(pulls))


def readjusted(alpha: float, share: float, pull: Pull) -> float:
    """The weight after alpha has given a measured pull, where a share is to be kept."""
    return alpha * math.exp(READJUSTMENT * missing(share, pull)) if pull.is_of_both else alpha


def missing(share: float, pull: Pull) -> float:
    """Logarithm of the factor by which |alpha g_p| falls short of a share."""
    return math.log(share / (1 - share)) + math.log(pull.reward) - math.log(pull.policy)
