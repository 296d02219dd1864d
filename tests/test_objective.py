"""Every loss against its equation, written out in fp64 without any of torch's fused forms."""

import json
import math

import pytest
import torch

from hafrm_ds.config import ObjectiveConfig
from hafrm_ds.objective import (
    JudgeFit,
    LossWeights,
    ResponseScores,
    bradley_terry_loss,
    centering_penalty,
    dpo_loss,
    hinge_loss,
    implicit_reward,
    ipo_loss,
    joint_loss,
    judges,
    policy_loss,
    preference_metrics,
    sft_loss,
    simpo_loss,
    weights_at,
)

REWARD = [1.5, -0.5, -2.0, 0.25, 0.125, 0.125, 3.0, 4.0]  # right, wrong, tied and wrong
LOGPROB = [-12.0, -30.5, -7.25, -2.0, -40.0, -40.0, -3.0, -9.0]
REFERENCE = [-14.0, -28.0, -6.0, -5.5, -41.0, -38.5, -3.5, -8.0]
LENGTHS = [5, 11, 3, 1, 20, 16, 2, 4]
FIT = JudgeFit(
    (2.0, 3.0), (1.0, 2.5), (3.0, 3.5), (0.5, 0.25), 0.2, "held out", 80, 60, "ab12", ((2.5, 3.0), (1.5, 2.0))
)
MARGIN = [0.0, 1.0, 2.5, -0.5]
PAIRS = range(4)


def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


def difference(values: list[float], pair: int) -> float:
    return values[2 * pair] - values[2 * pair + 1]


def log_ratio_difference(pair: int) -> float:
    return difference([own - ref for own, ref in zip(LOGPROB, REFERENCE, strict=True)], pair)


def fp32(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def assert_pairs(actual: torch.Tensor, expected: list[float]) -> None:
    assert actual.shape == (len(expected),)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)


# ---- reward losses -------------------------------------------------------------------------------------------------


def test_bradley_terry():
    assert_pairs(bradley_terry_loss(fp32(REWARD)), [-log_sigmoid(difference(REWARD, p)) for p in PAIRS])


def test_bradley_terry_with_margin_and_label_smoothing():
    logits = [difference(REWARD, p) - MARGIN[p] for p in PAIRS]
    assert_pairs(bradley_terry_loss(fp32(REWARD), fp32(MARGIN)), [-log_sigmoid(h) for h in logits])
    assert_pairs(
        bradley_terry_loss(fp32(REWARD), fp32(MARGIN), label_smoothing=0.1),
        [-0.9 * log_sigmoid(h) - 0.1 * log_sigmoid(-h) for h in logits],
    )


def test_centering():
    assert_pairs(centering_penalty(fp32(REWARD)), [(REWARD[2 * p] + REWARD[2 * p + 1]) ** 2 for p in PAIRS])


# ---- policy losses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo(smoothing):
    logits = [0.1 * log_ratio_difference(p) for p in PAIRS]
    assert_pairs(
        dpo_loss(fp32(LOGPROB), fp32(REFERENCE), beta=0.1, label_smoothing=smoothing),
        [-(1 - smoothing) * log_sigmoid(h) - smoothing * log_sigmoid(-h) for h in logits],
    )


def test_dpo_starts_at_ln_2_where_policy_and_reference_are_equal():
    logprob = fp32(LOGPROB).requires_grad_()
    loss = dpo_loss(logprob, fp32(LOGPROB), beta=0.1)
    assert_pairs(loss.detach(), [math.log(2)] * 4)
    assert not implicit_reward(logprob, fp32(LOGPROB), beta=0.1).any()
    scores = ResponseScores(reward=None, logprob=logprob, num_tokens=torch.tensor(LENGTHS))
    metrics = preference_metrics(scores, fp32(LOGPROB), beta=0.1)
    assert metrics["margin/implicit"].tolist() == [0.0] * 4
    assert metrics["accuracy/implicit"].tolist() == [0.5] * 4
    loss.sum().backward()  # the start is no stationary point: half of beta, up for chosen and down for rejected
    torch.testing.assert_close(logprob.grad, fp32([-0.05, 0.05] * 4))


def test_ipo():
    expected = [(log_ratio_difference(p) - 1 / (2 * 0.25)) ** 2 for p in PAIRS]
    assert_pairs(ipo_loss(fp32(LOGPROB), fp32(REFERENCE), beta=0.25), expected)


def test_hinge():
    expected = [max(0.0, 1 - 0.5 * log_ratio_difference(p)) for p in PAIRS]
    assert min(expected) == 0 < max(expected)
    assert_pairs(hinge_loss(fp32(LOGPROB), fp32(REFERENCE), beta=0.5), expected)


def test_hinge_has_its_kink_at_a_margin_of_1():
    logprob = fp32([1.75, 0, 2.0, 0, 2.25, 0]).requires_grad_()
    loss = hinge_loss(logprob, torch.zeros(6), beta=0.5)
    assert loss.tolist() == [0.125, 0.0, 0.0]
    loss.sum().backward()
    assert logprob.grad.tolist() == [-0.5, 0.5, 0.0, 0.0, 0.0, 0.0]


def test_simpo_averages_over_length_and_subtracts_gamma():
    averages = [own / length for own, length in zip(LOGPROB, LENGTHS, strict=True)]
    assert_pairs(
        simpo_loss(fp32(LOGPROB), torch.tensor(LENGTHS), beta=2.0, gamma=0.5),
        [-log_sigmoid(2.0 * difference(averages, p) - 0.5) for p in PAIRS],
    )


def test_sft_is_the_mean_over_the_chosen_answer():
    expected = [-LOGPROB[2 * p] / LENGTHS[2 * p] for p in PAIRS]
    assert_pairs(sft_loss(fp32(LOGPROB), torch.tensor(LENGTHS)), expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dpo", lambda own, ref, n: dpo_loss(own, ref, 0.3, 0.05)),
        ("ipo", lambda own, ref, n: ipo_loss(own, ref, 0.3)),
        ("hinge", lambda own, ref, n: hinge_loss(own, ref, 0.3)),
        ("simpo", lambda own, ref, n: simpo_loss(own, n, 0.3, 0.7)),
        ("sft", lambda own, ref, n: sft_loss(own, n)),
    ],
)
def test_policy_loss_by_name(name, expected):
    logprob, reference, lengths = fp32(LOGPROB), fp32(REFERENCE), torch.tensor(LENGTHS)
    objective = ObjectiveConfig(policy_loss=name, beta=0.3, policy_label_smoothing=0.05, simpo_gamma=0.7)
    actual = policy_loss(objective, logprob, reference if objective.uses_reference else None, lengths)
    assert torch.equal(actual, expected(logprob, reference, lengths))


# ---- gradients and extremes ----------------------------------------------------------------------------------------

LOSSES = {
    "bradley-terry": lambda x: bradley_terry_loss(x, torch.tensor(MARGIN).to(x), label_smoothing=0.1),
    "centering": centering_penalty,
    "dpo": lambda x: dpo_loss(x, torch.tensor(REFERENCE).to(x), beta=0.1, label_smoothing=0.1),
    "ipo": lambda x: ipo_loss(x, torch.tensor(REFERENCE).to(x), beta=0.1),
    "hinge": lambda x: hinge_loss(x, torch.tensor(REFERENCE).to(x), beta=0.1),
    "simpo": lambda x: simpo_loss(x, torch.tensor(LENGTHS), beta=2.0, gamma=0.5),
    "sft": lambda x: sft_loss(x, torch.tensor(LENGTHS)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name):
    values = torch.tensor(LOGPROB, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(LOSSES[name], (values,))


@pytest.mark.parametrize("name", LOSSES)
def test_a_difference_of_1e4_either_way_stays_finite(name):
    values = fp32([0.0, -1e4, -1e4, 0.0, -1e4, -1e4, 0.0, 0.0]).requires_grad_()
    loss = LOSSES[name](values)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert values.grad.isfinite().all()


def test_a_pair_far_on_the_wrong_side_still_pulls_with_full_strength():
    reward = fp32([-1e4, 0.0, 1e4, 0.0]).requires_grad_()
    loss = bradley_terry_loss(reward)
    assert loss.tolist() == [1e4, 0.0]
    loss.sum().backward()
    assert reward.grad.tolist() == [-1.0, 1.0, 0.0, 0.0]


# ---- the joint loss ------------------------------------------------------------------------------------------------


def scores_of(reward: torch.Tensor | None, logprob: torch.Tensor | None) -> ResponseScores:
    return ResponseScores(reward, logprob, torch.tensor(LENGTHS))


def test_joint_loss_weights_its_parts_and_reports_them_unweighted():
    objective = ObjectiveConfig(
        rm_weight=0.5, alpha=0.2, use_margin=True, reward_label_smoothing=0.1, reward_centering=0.01, beta=0.3
    )
    reward, logprob, reference, margin = map(fp32, (REWARD, LOGPROB, REFERENCE, MARGIN))
    joint = joint_loss(objective, weights_at(objective, 0), scores_of(reward, logprob), reference, margin)
    assert torch.equal(joint.reward, bradley_terry_loss(reward, margin, 0.1))
    assert torch.equal(joint.policy, dpo_loss(logprob, reference, 0.3))
    centered = joint.reward.double() + 0.01 * centering_penalty(reward).double()
    assert_pairs(joint.total, (0.5 * centered + 0.2 * joint.policy.double()).tolist())


def test_joint_loss_of_one_part():
    reward, logprob, margin = fp32(REWARD), fp32(LOGPROB), fp32(MARGIN)
    baseline = ObjectiveConfig(rm_weight=2.0, alpha=0)
    alone = joint_loss(baseline, weights_at(baseline, 0), scores_of(reward, None), None, margin)
    assert torch.equal(alone.total, 2.0 * bradley_terry_loss(reward))
    assert alone.policy is None
    dpo = ObjectiveConfig(rm_weight=0, alpha=0.5)
    alone = joint_loss(dpo, weights_at(dpo, 0), scores_of(None, logprob), fp32(REFERENCE), margin)
    assert torch.equal(alone.total, 0.5 * dpo_loss(logprob, fp32(REFERENCE), 0.1))
    assert alone.reward is None


def test_a_part_of_weight_0_sends_no_gradient():
    reward, logprob = fp32(REWARD).requires_grad_(), fp32(LOGPROB).requires_grad_()
    joint = joint_loss(
        ObjectiveConfig(), LossWeights(0.0, 0.2), scores_of(reward, logprob), fp32(REFERENCE), fp32(MARGIN)
    )
    joint.total.sum().backward()
    assert reward.grad.tolist() == [0.0] * 8
    assert logprob.grad.abs().min() > 0


def test_alternating_blocks_begin_with_the_policy():
    objective = ObjectiveConfig(alternate_every=2, rm_weight=1.0, alpha=0.2)
    policy, reward = (0.0, 0.2), (1.0, 0.0)
    weights = [weights_at(objective, step) for step in range(7)]
    assert weights == [policy, policy, reward, reward, policy, policy, reward]


def test_without_alternation_both_losses_count_at_every_step():
    assert {weights_at(ObjectiveConfig(rm_weight=1.0, alpha=0.2), step) for step in range(5)} == {(1.0, 0.2)}


def test_a_share_takes_the_weight_that_was_found_and_a_given_alpha_does_not():
    assert weights_at(ObjectiveConfig(policy_share=0.5), 0, 3.5) == (1.0, 3.5)
    assert weights_at(ObjectiveConfig(alpha=0.2), 0, 3.5) == (1.0, 0.2)
    with pytest.raises(AssertionError, match="not been found"):
        weights_at(ObjectiveConfig(policy_share=0.5), 0)


# ---- metrics -------------------------------------------------------------------------------------------------------


def test_metrics_of_every_judge():
    scores = ResponseScores(fp32(REWARD), fp32(LOGPROB), torch.tensor(LENGTHS))
    metrics = preference_metrics(scores, fp32(REFERENCE), beta=0.1)
    judges = {
        "reward": [difference(REWARD, p) for p in PAIRS],
        "logprob": [difference(LOGPROB, p) for p in PAIRS],
        "implicit": [0.1 * log_ratio_difference(p) for p in PAIRS],
    }
    assert metrics.keys() == {f"{kind}/{judge}" for kind in ("accuracy", "margin") for judge in judges}
    for judge, margins in judges.items():
        assert_pairs(metrics[f"margin/{judge}"], margins)
        assert metrics[f"accuracy/{judge}"].tolist() == [1.0 if m > 0 else 0.5 if m == 0 else 0.0 for m in margins]
    assert metrics["accuracy/reward"].tolist() == [1.0, 0.0, 0.5, 0.0]


def test_metrics_of_a_judge_that_is_not_there_are_left_out():
    lengths = torch.tensor(LENGTHS)
    reward_only = preference_metrics(ResponseScores(fp32(REWARD), None, lengths), fp32(REFERENCE), beta=0.1)
    assert reward_only.keys() == {"accuracy/reward", "margin/reward"}
    no_reference = preference_metrics(ResponseScores(None, fp32(LOGPROB), lengths), None, beta=0.1)
    assert no_reference.keys() == {"accuracy/logprob", "margin/logprob"}


def test_metrics_hold_on_to_no_graph():
    reward = fp32(REWARD).requires_grad_()
    metrics = preference_metrics(ResponseScores(reward, None, torch.tensor(LENGTHS)), None, beta=0.1)
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("options", [{}, {"rm_weight": 0}, {"alpha": 0}, {"policy_loss": "simpo"}])
def test_the_measures_of_an_objective_are_those_of_the_judges_that_it_trains(options):
    objective = ObjectiveConfig(**options)
    known = judges(
        fp32(REWARD) if objective.uses_reward else None,
        fp32(LOGPROB) if objective.uses_policy else None,
        fp32(REFERENCE) if objective.uses_reference else None,
        objective.beta,
        FIT,
    )
    assert [f"accuracy/{judge}" for judge in known] == [m for m in objective.measures if m.startswith("accuracy/")]


def test_the_combined_judge_is_the_weighted_sum_by_the_beta_of_its_fit():
    found = judges(fp32(REWARD), fp32(LOGPROB), fp32(REFERENCE), 99.0, FIT)["combined"]
    expected = [2 * r + 3 * 0.2 * (a - b) for r, a, b in zip(REWARD, LOGPROB, REFERENCE)]
    assert found.tolist() == pytest.approx(expected)
    assert "combined" not in judges(None, fp32(LOGPROB), fp32(REFERENCE), 0.1, FIT)
    assert "combined" not in judges(fp32(REWARD), fp32(LOGPROB), None, 0.1, FIT)


def test_a_fit_is_read_as_it_was_written():
    assert JudgeFit.from_json(json.loads(json.dumps(FIT.to_json()))) == FIT
