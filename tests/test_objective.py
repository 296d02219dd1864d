"""Every loss against its equation, written out in fp64 without any of torch's fused forms."""

import itertools
import json
import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hafrm_ds.config import ObjectiveConfig
from hafrm_ds.data.comparisons import Comparisons
from hafrm_ds.data.pairs import Comparison
from hafrm_ds.objective import (
    JointLoss,
    JudgeFit,
    LossWeights,
    ResponseScores,
    attribute_heads,
    attribute_loss,
    best_of_rest_loss,
    bradley_terry_loss,
    centering_penalty,
    dpo_loss,
    hinge_loss,
    implicit_reward,
    ipo_loss,
    joint_loss,
    judges,
    plackett_luce_loss,
    policy_loss,
    preference_metrics,
    sft_loss,
    simpo_loss,
    weights_at,
)
from tests.tiny_models import comparisons_of_pairs

REWARD = [1.5, -0.5, -2.0, 0.25, 0.125, 0.125, 3.0, 4.0]  # right, wrong, tied and wrong
LOGPROB = [-12.0, -30.5, -7.25, -2.0, -40.0, -40.0, -3.0, -9.0]
REFERENCE = [-14.0, -28.0, -6.0, -5.5, -41.0, -38.5, -3.5, -8.0]
LENGTHS = [5, 11, 3, 1, 20, 16, 2, 4]
FIT = JudgeFit(
    (2.0, 3.0), (1.0, 2.5), (3.0, 3.5), (0.5, 0.25), 0.2, "held out", 80, 60, "ab12", ((2.5, 3.0), (1.5, 2.0))
)
MARGIN = [0.0, 1.0, 2.5, -0.5]
PAIRS = range(4)
OF_PAIRS = comparisons_of_pairs(4)
WITH_MARGINS = Comparisons.of([(2, [Comparison(0, 1, margin)]) for margin in MARGIN])


def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


def difference(values: list[float], pair: int) -> float:
    return values[2 * pair] - values[2 * pair + 1]


def log_ratio_difference(pair: int) -> float:
    return difference([own - ref for own, ref in zip(LOGPROB, REFERENCE, strict=True)], pair)


def order_of(grades: Sequence[float]) -> list[Comparison]:
    """All comparisons of answers by their grades, of which equal ones are ties."""
    places = range(len(grades))
    return [Comparison(i, j) for i in places for j in places if grades[i] > grades[j]]


def fp32(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def assert_pairs(actual: torch.Tensor, expected: list[float]) -> None:
    assert actual.shape == (len(expected),)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)


# ---- reward losses -------------------------------------------------------------------------------------------------


def test_bradley_terry():
    actual = bradley_terry_loss(fp32(REWARD), WITH_MARGINS, use_margin=False, label_smoothing=0.0)
    assert_pairs(actual, [-log_sigmoid(difference(REWARD, p)) for p in PAIRS])


def test_bradley_terry_with_margin_and_label_smoothing():
    logits = [difference(REWARD, p) - MARGIN[p] for p in PAIRS]
    actual = bradley_terry_loss(fp32(REWARD), WITH_MARGINS, use_margin=True, label_smoothing=0.0)
    assert_pairs(actual, [-log_sigmoid(h) for h in logits])
    assert_pairs(
        bradley_terry_loss(fp32(REWARD), WITH_MARGINS, use_margin=True, label_smoothing=0.1),
        [-0.9 * log_sigmoid(h) - 0.1 * log_sigmoid(-h) for h in logits],
    )


def test_centering():
    expected = [(REWARD[2 * p] + REWARD[2 * p + 1]) ** 2 for p in PAIRS]
    assert_pairs(centering_penalty(fp32(REWARD), OF_PAIRS), expected)


# ---- policy losses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo(smoothing):
    logits = [0.1 * log_ratio_difference(p) for p in PAIRS]
    assert_pairs(
        dpo_loss(fp32(LOGPROB), fp32(REFERENCE), OF_PAIRS, beta=0.1, label_smoothing=smoothing),
        [-(1 - smoothing) * log_sigmoid(h) - smoothing * log_sigmoid(-h) for h in logits],
    )


def test_dpo_starts_at_ln_2_where_policy_and_reference_are_equal():
    logprob = fp32(LOGPROB).requires_grad_()
    loss = dpo_loss(logprob, fp32(LOGPROB), OF_PAIRS, beta=0.1)
    assert_pairs(loss.detach(), [math.log(2)] * 4)
    assert not implicit_reward(logprob, fp32(LOGPROB), beta=0.1).any()
    scores = ResponseScores(reward=None, logprob=logprob, num_tokens=torch.tensor(LENGTHS))
    metrics = preference_metrics(scores, fp32(LOGPROB), 0.1, OF_PAIRS)
    assert metrics["margin/implicit"].tolist() == [0.0] * 4
    assert metrics["accuracy/implicit"].tolist() == [0.5] * 4
    loss.sum().backward()  # the start is no stationary point: half of beta, up for chosen and down for rejected
    torch.testing.assert_close(logprob.grad, fp32([-0.05, 0.05] * 4))


def test_ipo():
    expected = [(log_ratio_difference(p) - 1 / (2 * 0.25)) ** 2 for p in PAIRS]
    assert_pairs(ipo_loss(fp32(LOGPROB), fp32(REFERENCE), OF_PAIRS, beta=0.25), expected)


def test_hinge():
    expected = [max(0.0, 1 - 0.5 * log_ratio_difference(p)) for p in PAIRS]
    assert min(expected) == 0 < max(expected)
    assert_pairs(hinge_loss(fp32(LOGPROB), fp32(REFERENCE), OF_PAIRS, beta=0.5), expected)


def test_hinge_has_its_kink_at_a_margin_of_1():
    logprob = fp32([1.75, 0, 2.0, 0, 2.25, 0]).requires_grad_()
    loss = hinge_loss(logprob, torch.zeros(6), comparisons_of_pairs(3), beta=0.5)
    assert loss.tolist() == [0.125, 0.0, 0.0]
    loss.sum().backward()
    assert logprob.grad.tolist() == [-0.5, 0.5, 0.0, 0.0, 0.0, 0.0]


def test_simpo_averages_over_length_and_subtracts_gamma():
    averages = [own / length for own, length in zip(LOGPROB, LENGTHS, strict=True)]
    assert_pairs(
        simpo_loss(fp32(LOGPROB), torch.tensor(LENGTHS), OF_PAIRS, beta=2.0, gamma=0.5),
        [-log_sigmoid(2.0 * difference(averages, p) - 0.5) for p in PAIRS],
    )


def test_sft_is_the_mean_over_the_chosen_answer():
    expected = [-LOGPROB[2 * p] / LENGTHS[2 * p] for p in PAIRS]
    assert_pairs(sft_loss(fp32(LOGPROB), torch.tensor(LENGTHS), OF_PAIRS), expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dpo", lambda own, ref, n: dpo_loss(own, ref, OF_PAIRS, 0.3, 0.05)),
        ("ipo", lambda own, ref, n: ipo_loss(own, ref, OF_PAIRS, 0.3)),
        ("hinge", lambda own, ref, n: hinge_loss(own, ref, OF_PAIRS, 0.3)),
        ("simpo", lambda own, ref, n: simpo_loss(own, n, OF_PAIRS, 0.3, 0.7)),
        ("sft", lambda own, ref, n: sft_loss(own, n, OF_PAIRS)),
    ],
)
def test_policy_loss_by_name(name, expected):
    logprob, reference, lengths = fp32(LOGPROB), fp32(REFERENCE), torch.tensor(LENGTHS)
    objective = ObjectiveConfig(policy_loss=name, beta=0.3, policy_label_smoothing=0.05, simpo_gamma=0.7)
    actual = policy_loss(objective, logprob, reference if objective.uses_reference else None, lengths, OF_PAIRS)
    assert torch.equal(actual, expected(logprob, reference, lengths))


# ---- gradients and extremes ----------------------------------------------------------------------------------------

OF_EIGHT = Comparisons.of([(8, order_of([3, 0, 1, 1, 4, 2, 3, 0]))])
LOSSES = {
    "bradley-terry": lambda x: bradley_terry_loss(x, WITH_MARGINS, use_margin=True, label_smoothing=0.1),
    "centering": lambda x: centering_penalty(x, OF_PAIRS),
    "dpo": lambda x: dpo_loss(x, torch.tensor(REFERENCE).to(x), OF_PAIRS, beta=0.1, label_smoothing=0.1),
    "ipo": lambda x: ipo_loss(x, torch.tensor(REFERENCE).to(x), OF_PAIRS, beta=0.1),
    "hinge": lambda x: hinge_loss(x, torch.tensor(REFERENCE).to(x), OF_PAIRS, beta=0.1),
    "simpo": lambda x: simpo_loss(x, torch.tensor(LENGTHS), OF_PAIRS, beta=2.0, gamma=0.5),
    "sft": lambda x: sft_loss(x, torch.tensor(LENGTHS), OF_PAIRS),
    "plackett-luce": lambda x: plackett_luce_loss(x, OF_EIGHT),
    "best": lambda x: best_of_rest_loss(x, OF_EIGHT),
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
    loss = bradley_terry_loss(reward, comparisons_of_pairs(2), use_margin=False, label_smoothing=0.0)
    assert loss.tolist() == [1e4, 0.0]
    loss.sum().backward()
    assert reward.grad.tolist() == [-1.0, 1.0, 0.0, 0.0]


# ---- pairs, bit for bit --------------------------------------------------------------------------------------------


def joint_loss_of_pairs(objective: ObjectiveConfig, reward, logprob, reference, lengths, margin) -> Tensor:
    """[P], by formulas that know no other groups: two columns, and no comparisons."""

    def halves(values: Tensor) -> tuple[Tensor, Tensor]:
        return values.view(-1, 2)[:, 0], values.view(-1, 2)[:, 1]

    def smoothed(logits: Tensor, e: float) -> Tensor:
        return -(1 - e) * F.logsigmoid(logits) - e * F.logsigmoid(-logits)

    (chosen, rejected), beta = halves(reward), objective.beta
    of_reward = smoothed(
        chosen - rejected - margin if objective.use_margin else chosen - rejected, objective.reward_label_smoothing
    )
    if objective.reward_centering:
        of_reward = of_reward + objective.reward_centering * (chosen + rejected).square()
    if objective.policy_loss == "simpo":
        chosen, rejected = halves(beta * logprob / lengths)
        of_policy = -F.logsigmoid(chosen - rejected - objective.simpo_gamma)
    elif objective.policy_loss == "sft":
        of_policy = -halves(logprob / lengths)[0]
    elif objective.policy_loss == "ipo":
        chosen, rejected = halves(logprob - reference)
        of_policy = (chosen - rejected - 1 / (2 * beta)).square()
    else:
        chosen, rejected = halves(beta * (logprob - reference))
        if objective.policy_loss == "hinge":
            of_policy = F.relu(1 - (chosen - rejected))
        else:
            of_policy = smoothed(chosen - rejected, objective.policy_label_smoothing)
    return torch.stack([objective.rm_weight * of_reward, objective.alpha * of_policy]).sum(0)


@pytest.mark.parametrize("use_margin", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("centering", [0.0, 0.01])
@pytest.mark.parametrize("policy_loss", ["dpo", "ipo", "hinge", "simpo", "sft"])
def test_pairs_are_what_they_were_bit_for_bit(policy_loss, centering, smoothing, use_margin):
    num_pairs, source = 500, torch.Generator().manual_seed(7)
    objective = ObjectiveConfig(
        rm_weight=0.7,
        alpha=0.3,
        beta=0.13,
        policy_loss=policy_loss,
        use_margin=use_margin,
        reward_centering=centering,
        reward_label_smoothing=smoothing,
        policy_label_smoothing=smoothing if policy_loss == "dpo" else 0.0,
    )
    reward, logprob, reference = torch.randn(3, 2 * num_pairs, generator=source) * torch.tensor([[2.0], [50], [50]])
    lengths = torch.randint(1, 400, (2 * num_pairs,), generator=source)
    margin, weight = torch.randn(2, num_pairs, generator=source)
    comparisons = Comparisons.of([(2, [Comparison(0, 1, each)]) for each in margin.tolist()])
    found = []
    for compute in (
        lambda *values: joint_loss_of_pairs(objective, *values, reference, lengths, margin),
        lambda reward, logprob: (
            joint_loss(
                objective,
                weights_at(objective, 0),
                ResponseScores(reward, logprob, lengths),
                reference if objective.uses_reference else None,
                comparisons,
            ).total
        ),
    ):
        values = [each.clone().requires_grad_() for each in (reward, logprob)]
        total = compute(*values)
        (total * weight).sum().backward()
        found.append([total, *(each.grad for each in values)])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))
    assert found[0][0].unique().numel() > num_pairs // 2


# ---- groups of any size, against loops in fp64 ---------------------------------------------------------------------


def random_group(source: random.Random, plain: bool) -> tuple[int, list[Comparison]]:
    """2 to 8 answers, among them ties, with all comparisons that their grades make; unless plain, of any weight,
    probability and margin, and some of them left out."""
    grades = [0, 1]
    grades = [*grades, *(source.randrange(4) for _ in range(source.randrange(7)))]
    source.shuffle(grades)
    comparisons = order_of(grades)
    if not plain:
        comparisons = source.sample(comparisons, source.randint(1, len(comparisons)))
        comparisons = [
            Comparison(
                each.better,
                each.worse,
                source.choice([None, source.uniform(-1, 2)]),
                source.choice([1.0, source.uniform(0.51, 0.99)]),
                source.choice([1.0, source.uniform(0.2, 5)]),
            )
            for each in comparisons
        ]
    return len(grades), comparisons


def naive_loss(
    objective: ObjectiveConfig, reward: Tensor, logprob: Tensor, reference: list[float], lengths: list[int], groups
) -> Tensor:
    """[G] in fp64, by the equations alone: one number after another."""
    totals, start, e, beta = [], 0, objective.reward_label_smoothing, objective.beta

    def log_sigmoid(x: Tensor) -> Tensor:
        return -(1 + (-x).exp()).log()

    def soft(loss, difference: Tensor, probability: float) -> Tensor:
        return probability * loss(difference) + (1 - probability) * loss(-difference)

    def smoothed(difference: Tensor, probability: float, e: float) -> Tensor:
        return soft(lambda d: -log_sigmoid(d), difference, probability * (1 - e) + (1 - probability) * e)

    def policy(i: int, j: int, probability: float) -> Tensor:
        ratios = [logprob[k] - reference[k] for k in (i, j)]
        averages = [logprob[k] / lengths[k] for k in (i, j)]
        h = ratios[0] - ratios[1]
        if objective.policy_loss == "dpo":
            return smoothed(beta * h, probability, objective.policy_label_smoothing)
        if objective.policy_loss == "ipo":
            return soft(lambda d: (d - 1 / (2 * beta)) ** 2, h, probability)
        if objective.policy_loss == "hinge":
            return soft(lambda d: (1 - beta * d).clamp(min=0), h, probability)
        if objective.policy_loss == "simpo":
            difference = beta * (averages[0] - averages[1])
            return soft(lambda d: -log_sigmoid(d - objective.simpo_gamma), difference, probability)
        return -probability * averages[0] - (1 - probability) * averages[1]

    def order(score: list[Tensor], comparisons: list[Comparison]) -> Tensor:
        """-log of the product of the draws, each from the answer and all that it is better than."""
        worse: dict[int, list[int]] = {}
        for each in comparisons:
            worse.setdefault(each.better, []).append(each.worse)
        draws = {i: -(score[i].exp() / sum(score[k].exp() for k in (i, *others))).log() for i, others in worse.items()}
        if objective.ranking_loss == "plackett_luce":
            return sum(draws.values())
        best = [i for i in worse if not any(i in others for others in worse.values())]
        return sum(draws[i] for i in best) / len(best)

    for num_answers, comparisons in groups:
        weight, total = sum(each.weight for each in comparisons), torch.zeros((), dtype=torch.float64)
        if objective.ranking_loss != "pairwise":
            own = range(start, start + num_answers)
            total = objective.rm_weight * order([reward[k] for k in own], comparisons)
            implicit = [beta * (logprob[k] - reference[k]) for k in own]
            total = total + objective.alpha * order(implicit, comparisons)
        for each in comparisons:
            i, j = start + each.better, start + each.worse
            margin = (each.margin or 0.0) if objective.use_margin else 0.0
            loss = objective.reward_centering * objective.rm_weight * (reward[i] + reward[j]) ** 2
            if objective.ranking_loss == "pairwise":
                loss = loss + objective.rm_weight * smoothed(reward[i] - reward[j] - margin, each.target, e)
                loss = loss + objective.alpha * policy(i, j, each.target)
            total = total + each.weight / weight * loss
        totals.append(total)
        start += num_answers
    return torch.stack(totals)


OBJECTIVES = {
    **{name: {"policy_loss": name} for name in ("dpo", "ipo", "hinge", "simpo", "sft")},
    "margin": {"use_margin": True, "reward_centering": 0.05},
    "smoothing": {"reward_label_smoothing": 0.1, "policy_label_smoothing": 0.2, "use_margin": True},
    "plackett-luce": {"ranking_loss": "plackett_luce"},
    "best": {"ranking_loss": "best", "reward_centering": 0.05},
}


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_and_gradients_of_groups(name, seed):
    """Several groups of different sizes in one micro-batch."""
    source = random.Random(seed)
    objective = ObjectiveConfig(rm_weight=0.8, alpha=0.4, beta=0.3, **OBJECTIVES[name])
    groups = [random_group(source, objective.ranking_loss != "pairwise") for _ in range(source.randint(1, 5))]
    number = sum(num_answers for num_answers, _ in groups)
    lengths = [source.randint(1, 30) for _ in range(number)]
    drawn = [[source.gauss(0, scale) for _ in range(number)] for scale in (2, 6, 6)]
    reference = drawn.pop()
    weight = [source.uniform(0.1, 2) for _ in groups]
    found = []
    for dtype, compute in (
        (
            torch.float32,
            lambda *values: (
                joint_loss(
                    objective,
                    weights_at(objective, 0),
                    ResponseScores(*values, torch.tensor(lengths)),
                    fp32(reference),
                    Comparisons.of(groups),
                ).total
            ),
        ),
        (torch.float64, lambda *values: naive_loss(objective, *values, reference, lengths, groups)),
    ):
        values = [torch.tensor(each, dtype=dtype, requires_grad=True) for each in drawn]
        total = compute(*values)
        assert total.dtype == dtype and total.shape == (len(groups),)
        (total * torch.tensor(weight, dtype=dtype)).sum().backward()
        found.append([each.double() for each in (total.detach(), *(value.grad for value in values))])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def probability_of(order: Sequence[int], score: Sequence[float]) -> float:
    """Of drawing the answers in this order, each by exp(score) from those that are left."""
    product = 1.0
    for place, answer in enumerate(order):
        product *= math.exp(score[answer]) / sum(math.exp(score[left]) for left in order[place:])
    return product


@pytest.mark.parametrize("number", range(2, 7))
def test_plackett_luce_gives_every_order_its_probability(number):
    score = torch.randn(number, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
    orders = list(itertools.permutations(range(number)))
    every = [(number, [Comparison(*both) for both in itertools.combinations(order, 2)]) for order in orders]
    losses = plackett_luce_loss(score.repeat(len(orders)), Comparisons.of(every))
    assert (-losses).exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert (-losses).exp().tolist() == pytest.approx([probability_of(order, score.tolist()) for order in orders])


@pytest.mark.parametrize("grades", [[1, 1, 0], [2, 0, 0], [0, 2, 1, 2, 1], [3, 1, 3, 3, 0, 1]])
def test_plackett_luce_draws_answers_that_tie_as_if_the_others_of_their_place_were_not_there(grades):
    score = [0.3, -1.2, 0.8, 2.1, -0.4, 0.0][: len(grades)]
    expected = 0.0
    for answer, grade in enumerate(grades):
        left = [other for other, its in enumerate(grades) if its < grade]
        begun = [probability_of([answer, *rest], score) for rest in itertools.permutations(left)]
        expected -= math.log(sum(begun))
    comparisons = Comparisons.of([(len(grades), order_of(grades))])
    assert plackett_luce_loss(torch.tensor(score).double(), comparisons).item() == pytest.approx(expected)


@pytest.mark.parametrize("grades", [[1, 1, 0], [2, 0, 0, 1], [0, 2, 1, 2, 1]])
def test_the_best_is_drawn_first_of_all_that_are_worse(grades):
    score = [0.3, -1.2, 0.8, 2.1, -0.4][: len(grades)]
    best = [answer for answer, grade in enumerate(grades) if grade == max(grades)]
    worse = [math.exp(score[other]) for other in range(len(grades)) if other not in best]
    expected = [-math.log(math.exp(score[i]) / (math.exp(score[i]) + sum(worse))) for i in best]
    comparisons = Comparisons.of([(len(grades), order_of(grades))])
    actual = best_of_rest_loss(torch.tensor(score).double(), comparisons).item()
    assert actual == pytest.approx(sum(expected) / len(best))


@pytest.mark.parametrize("loss", [plackett_luce_loss, best_of_rest_loss])
def test_of_a_pair_the_order_is_the_comparison(loss):
    reward = fp32(REWARD)
    torch.testing.assert_close(loss(reward, OF_PAIRS), bradley_terry_loss(reward, OF_PAIRS, False, 0.0))


# ---- the joint loss ------------------------------------------------------------------------------------------------


def scores_of(reward: torch.Tensor | None, logprob: torch.Tensor | None) -> ResponseScores:
    return ResponseScores(reward, logprob, torch.tensor(LENGTHS))


def test_joint_loss_weights_its_parts_and_reports_them_unweighted():
    objective = ObjectiveConfig(
        rm_weight=0.5, alpha=0.2, use_margin=True, reward_label_smoothing=0.1, reward_centering=0.01, beta=0.3
    )
    reward, logprob, reference = map(fp32, (REWARD, LOGPROB, REFERENCE))
    joint = joint_loss(objective, weights_at(objective, 0), scores_of(reward, logprob), reference, WITH_MARGINS)
    assert torch.equal(joint.reward, bradley_terry_loss(reward, WITH_MARGINS, True, 0.1))
    assert torch.equal(joint.policy, dpo_loss(logprob, reference, OF_PAIRS, 0.3))
    centered = joint.reward.double() + 0.01 * centering_penalty(reward, OF_PAIRS).double()
    assert_pairs(joint.total, (0.5 * centered + 0.2 * joint.policy.double()).tolist())


def test_joint_loss_of_one_part():
    reward, logprob = fp32(REWARD), fp32(LOGPROB)
    baseline = ObjectiveConfig(rm_weight=2.0, alpha=0)
    alone = joint_loss(baseline, weights_at(baseline, 0), scores_of(reward, None), None, WITH_MARGINS)
    assert torch.equal(alone.total, 2.0 * bradley_terry_loss(reward, OF_PAIRS, False, 0.0))
    assert alone.policy is None
    dpo = ObjectiveConfig(rm_weight=0, alpha=0.5)
    alone = joint_loss(dpo, weights_at(dpo, 0), scores_of(None, logprob), fp32(REFERENCE), WITH_MARGINS)
    assert torch.equal(alone.total, 0.5 * dpo_loss(logprob, fp32(REFERENCE), OF_PAIRS, 0.1))
    assert alone.reward is None


def test_groups_that_train_the_policy_alone_send_no_gradient_to_the_reward_head():
    objective = ObjectiveConfig(rm_weight=0.5, alpha=0.2, reward_centering=0.01)
    reward, logprob = fp32(REWARD).requires_grad_(), fp32(LOGPROB).requires_grad_()
    given = (objective, weights_at(objective, 0), scores_of(reward, logprob), fp32(REFERENCE), WITH_MARGINS)
    whole, joint = joint_loss(*given), joint_loss(*given, torch.tensor([1.0, 0.0, 1.0, 0.0]))
    assert torch.equal(joint.reward[::2], whole.reward[::2]) and joint.reward[1::2].tolist() == [0.0, 0.0]
    assert torch.equal(joint.policy, whole.policy) and torch.equal(joint.total[::2], whole.total[::2])
    assert torch.equal(joint.total[1::2], 0.2 * whole.policy[1::2])
    joint.total.sum().backward()
    assert reward.grad.view(4, 2)[1::2].tolist() == [[0.0, 0.0]] * 2 and reward.grad.view(4, 2)[::2].all()
    assert logprob.grad.all()


def test_a_part_of_weight_0_sends_no_gradient():
    reward, logprob = fp32(REWARD).requires_grad_(), fp32(LOGPROB).requires_grad_()
    joint = joint_loss(
        ObjectiveConfig(), LossWeights(0.0, 0.2), scores_of(reward, logprob), fp32(REFERENCE), WITH_MARGINS
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
    metrics = preference_metrics(scores, fp32(REFERENCE), 0.1, OF_PAIRS)
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


def test_metrics_of_a_group_are_means_over_its_comparisons():
    comparisons = Comparisons.of(
        [(3, [Comparison(2, 0), Comparison(2, 1, weight=2.0), Comparison(1, 0)]), (2, [Comparison(1, 0)])]
    )
    reward = fp32([1.0, 4.0, 4.0, -1.0, -3.0])  # right, tied at twice the weight, right; wrong
    metrics = preference_metrics(ResponseScores(reward, None, torch.ones(5)), None, 0.1, comparisons)
    assert metrics["accuracy/reward"].tolist() == [0.75, 0.0]
    assert metrics["margin/reward"].tolist() == [(3 + 2 * 0 + 3) / 4, -2.0]


@pytest.mark.parametrize("seed", range(3))
def test_the_regression_of_attributes_and_its_gradient_against_fp64(seed):
    """Groups of 1 to 5 answers, some values unknown; in the last group all of them."""
    source = np.random.default_rng(seed)
    group = np.repeat(np.arange(7), source.integers(1, 6, 7))
    predicted, values = (source.normal(2, 3, (len(group), 3)) for _ in range(2))
    values[(source.random(values.shape) < 0.4) | (group == 6)[:, None]] = np.nan
    expected, slope = [], np.zeros_like(predicted)
    for number in range(7):
        errors = {
            place: predicted[place] - values[place]
            for place in np.ndindex(values.shape)
            if group[place[0]] == number and not math.isnan(values[place])
        }
        expected.append(sum(error**2 for error in errors.values()) / max(1, len(errors)))
        for place, error in errors.items():
            slope[place] = (number + 1) * 2 * error / len(errors)
    given = torch.tensor(predicted, dtype=torch.float32, requires_grad=True)
    loss = attribute_loss(given, torch.tensor(values, dtype=torch.float32), torch.tensor(group), 7)
    assert_pairs(loss, expected)
    (loss * torch.arange(1, 8)).sum().backward()
    torch.testing.assert_close(given.grad.double(), torch.tensor(slope), rtol=1e-5, atol=1e-5)


def test_one_more_loss_stands_in_the_total_by_its_weight():
    loss = JointLoss(fp32([1.0, 2.0]), fp32([1.0, 2.0]), None).with_part("attributes", fp32([3.0, 5.0]), 0.5)
    assert (loss.total.tolist(), loss.attributes.tolist(), loss.policy) == ([2.5, 4.5], [3.0, 5.0], None)


def test_an_attribute_is_asked_for_as_a_head():
    of_both = fp32([3.0, 4.0, 5.0, 6.0]).view(2, 2)
    scores = ResponseScores(fp32([1.0, 2.0]), None, torch.tensor([1, 1]), attributes=of_both)
    assert [scores.of(head).tolist() for head in ("reward", *attribute_heads(["a", "b"]))] == [[1, 2], [3, 5], [4, 6]]


def test_metrics_of_a_judge_that_is_not_there_are_left_out():
    lengths = torch.tensor(LENGTHS)
    reward_only = preference_metrics(ResponseScores(fp32(REWARD), None, lengths), fp32(REFERENCE), 0.1, OF_PAIRS)
    assert reward_only.keys() == {"accuracy/reward", "margin/reward"}
    no_reference = preference_metrics(ResponseScores(None, fp32(LOGPROB), lengths), None, 0.1, OF_PAIRS)
    assert no_reference.keys() == {"accuracy/logprob", "margin/logprob"}


def test_metrics_hold_on_to_no_graph():
    reward = fp32(REWARD).requires_grad_()
    metrics = preference_metrics(ResponseScores(reward, None, torch.tensor(LENGTHS)), None, 0.1, OF_PAIRS)
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
