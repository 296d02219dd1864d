"""The implicit reward of a policy as its score: what a model says of an answer that was trained by DPO alone."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.packing import PackedBatch
from hafrm_ds.objective import ResponseScores, implicit_reward
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


class ImplicitRewardModel(Scorer):
    """beta * (log pi - log pi_ref) of an answer (`objective.implicit_reward`)."""

    heads = SavedImplicitReward.heads

    def __init__(self, policy: PolicyModel, reference: PolicyModel, beta: float):
        config = policy.model.causal_lm.config
        super().__init__(policy.formatter, config, layout=policy.layout, max_tokens=policy.max_tokens)
        self.policy, self.reference, self.beta = policy, reference, beta

    @classmethod
    def load(cls, saved: SavedImplicitReward, device: torch.device, max_tokens: int) -> "ImplicitRewardModel":
        policy = PolicyModel.load(saved.policy, device, max_tokens)
        # The same micro-batches go through both.
        same = {"layout": policy.layout, "uses_stock_logits": policy.model.uses_stock_logits}
        reference = PolicyModel.load(replace(saved.reference, metadata=same), device, max_tokens)
        return cls(policy, reference, saved.beta)

    def forward(self, batch: PackedBatch, *, with_reward: bool, with_logprob: bool) -> ResponseScores:
        policy, reference = (
            model.forward(batch, with_reward=False, with_logprob=True) for model in (self.policy, self.reference)
        )
        return ResponseScores(
            implicit_reward(policy.of("logprob"), reference.of("logprob"), self.beta), None, policy.num_tokens
        )
