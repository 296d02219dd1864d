"""The share of the policy loss in the pull on the body, and the alpha that gives one."""

import math

import pytest
import torch

from hafrm_ds.errors import UserError
from hafrm_ds.training.policy_share import Pull, alpha_for, readjusted


def inner_products(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float, float]:
    return (a @ a).item(), (a @ b).item(), (b @ b).item()


def test_a_pull_is_the_same_from_both_parts_and_from_one_and_the_sum():
    generator = torch.Generator().manual_seed(0)
    reward, policy = torch.randn(2, 1000, dtype=torch.float64, generator=generator)
    pull = Pull.of(*inner_products(reward, 0.1 * policy))
    cosine = torch.cosine_similarity(reward, policy, dim=0)
    assert pull == pytest.approx((reward.norm().item(), 0.1 * policy.norm().item(), cosine.item()), rel=1e-12)
    assert Pull.of_joint(*inner_products(reward, reward + 0.1 * policy)) == pytest.approx(pull, rel=1e-10)


def test_the_alpha_for_a_share_gives_it():
    pull = Pull(reward=3.0, policy=0.5, cosine=0.1)
    for share in (0.05, 0.5, 0.95):
        alpha = alpha_for(share, [pull])
        assert pull.times(alpha).metrics(alpha)["policy_share"] == pytest.approx(share)
    assert alpha_for(0.5, [Pull(1, 1, 0), Pull(4, 1, 0)]) == pytest.approx(2)


def test_a_kept_share_is_approached_from_both_sides_and_left_alone_when_reached():
    base = Pull(reward=2.0, policy=1.0, cosine=0.0)
    for start in (0.01, 100.0):
        alpha, gaps = start, []
        for _ in range(40):
            gaps.append(abs(base.times(alpha).metrics(alpha)["policy_share"] - 0.7))
            alpha = readjusted(alpha, 0.7, base.times(alpha))
        assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 1e-3
    assert readjusted(2.0, 0.5, base.times(2.0)) == pytest.approx(2.0)


@pytest.mark.parametrize(("reward", "policy"), [(0.0, 1.0), (1.0, 0.0), (math.nan, 1.0), (1.0, math.inf)])
def test_a_loss_that_does_not_pull_gives_no_alpha_and_moves_none(reward, policy):
    pull = Pull.of(reward**2, 0.0, policy**2)
    with pytest.raises(UserError, match=r"batch 2 of 2 .* norms .*--objective.alpha instead"):
        alpha_for(0.5, [Pull(1.0, 1.0, 0.0), pull])
    assert readjusted(3.0, 0.5, pull) == 3.0
    assert "body_grad_cosine" not in pull.metrics(3.0)


def test_a_row_has_what_is_defined():
    assert Pull.of(1.0, 0.0, 0.0).metrics(0.2)["policy_share"] == 0
    assert set(Pull.of(0.0, 0.0, 0.0).metrics(0.2)) == {"alpha", "body_grad_norm/reward", "body_grad_norm/policy"}
    assert len(Pull.of(1.0, 0.5, 1.0).metrics(0.2)) == 5
