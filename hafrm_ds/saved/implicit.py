"""Scores that measure a policy against its reference: the implicit reward, and both heads of a model as one judge.

They compare answers to one prompt. Between prompts they say nothing: the implicit reward is the reward that the policy
was trained by but for a constant of each prompt, which nobody knows.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.packing import PackedBatch
from hafrm_ds.objective import JudgeFit, ResponseScores, implicit_reward
from hafrm_ds.saved.folder import SavedModel
from hafrm_ds.saved.policy import PolicyModel, SavedPolicy
from hafrm_ds.saved.scorer import Scorer


@dataclass(frozen=True)
class SavedImplicitReward:
    """A policy and the reference that it is measured against, which are loaded side by side.

    beta: scale of the implicit reward.
    """

    policy: SavedModel | SavedPolicy
    reference: SavedPolicy
    beta: float
    heads = ("reward",)

    @property
    def folder(self) -> Path:
        return self.policy.folder

    def formatter(self) -> ChatFormatter:
        return self.policy.formatter()


@dataclass(frozen=True)
class SavedCombinedReward(SavedImplicitReward):
    """A model with both heads, its reference, and what each of the heads counts in the combined judge."""

    fit: JudgeFit


class ImplicitRewardModel(Scorer):
    """beta * (log pi - log pi_ref) of an answer (`objective.implicit_reward`): a forward of either model."""

    heads = SavedImplicitReward.heads

    def __init__(self, policy: PolicyModel, reference: PolicyModel, saved: SavedImplicitReward):
        config = policy.model.causal_lm.config
        super().__init__(policy.formatter, config, layout=policy.layout, max_tokens=policy.max_tokens)
        self.policy, self.reference, self.saved = policy, reference, saved

    @classmethod
    def load(cls, saved: SavedImplicitReward, device: torch.device, max_tokens: int) -> "ImplicitRewardModel":
        policy = PolicyModel.load(saved.policy, device, max_tokens)
        # The same micro-batches go through both.
        same = {"layout": policy.layout, "uses_stock_logits": policy.model.uses_stock_logits}
        reference = PolicyModel.load(replace(saved.reference, metadata=same), device, max_tokens)
        return cls(policy, reference, saved)

    def forward(self, batch: PackedBatch, *, with_reward: bool, with_logprob: bool) -> ResponseScores:
        policy, reference = self.of_both(batch, with_reward=False)
        return ResponseScores(
            implicit_reward(policy.of("logprob"), reference, self.saved.beta), None, policy.num_tokens
        )

    def of_both(self, batch: PackedBatch, *, with_reward: bool) -> tuple[ResponseScores, Tensor]:
        """What the policy says of a micro-batch, and the log-probs of the reference [N]."""
        policy = self.policy.forward(batch, with_reward=with_reward, with_logprob=True)
        return policy, self.reference.forward(batch, with_reward=False, with_logprob=True).of("logprob")


class CombinedRewardModel(ImplicitRewardModel):
    """Both heads of a model as one judge (`objective.JudgeFit`): logits of preference between answers to one prompt.

    One forward of the model gives both of its heads, and one of the reference the rest.
    """

    saved: SavedCombinedReward

    def forward(self, batch: PackedBatch, *, with_reward: bool, with_logprob: bool) -> ResponseScores:
        policy, reference = self.of_both(batch, with_reward=True)
        score = self.saved.fit.score(policy.of("reward"), policy.of("logprob"), reference)
        return ResponseScores(score, None, policy.num_tokens)
