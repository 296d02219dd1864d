"""Both heads as one judge: the fit against plain minimisers, what it gains, and that it never sees what it judges."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch

from hafrm_ds.evaluation.combined import (
    FEWEST_PAIRS,
    FEWEST_PROMPTS,
    NUM_FOLDS,
    RIDGE,
    CombinedJudge,
    fit_weights,
    folds_of,
    held_out_weights,
    too_few,
)
from hafrm_ds.evaluation.pair_scores import PairScores
from hafrm_ds.objective import JudgeFit

BETA = 0.1


def planted(num_pairs: int, weights: tuple[float, float], seed: int = 0, per_prompt: int = 1):
    """Margins [P, 2] whose pairs are labelled by the logit of `weights`, the second 100 times as large, and the
    prompts of the pairs."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(num_pairs, 2)) * np.array([1.0, 100.0])
    is_right = generator.random(num_pairs) < 1 / (1 + np.exp(-x @ np.array(weights)))
    return np.where(is_right[:, None], x, -x), [f"prompt {n // per_prompt}" for n in range(num_pairs)]


def two_noisy_judges(num_pairs: int, seed: int = 0) -> np.ndarray:
    """[P, 2] margins of two judges that see the same truth, each with a noise of its own."""
    generator = np.random.default_rng(seed)
    return np.abs(generator.normal(size=num_pairs))[:, None] + generator.normal(size=(num_pairs, 2)) * [1.0, 1.3]


def combine(first: np.ndarray, second: np.ndarray, prompts: list[str]) -> np.ndarray:
    """The margins of two judges as one, each by weights that were fitted without the fold of its prompt: [P] fp64."""
    margins = np.stack([first, second], axis=1).astype(np.float64)
    return np.einsum("pj,pj->p", held_out_weights(margins, prompts)[folds_of(prompts)], margins)


def scores_of(margins: np.ndarray, prompts: list[str], name: str = "near") -> PairScores:
    """Scores of pairs with given margins of (reward head, implicit reward)."""
    count = len(prompts)
    sides = margins[:, None, :] * np.array([0.5, -0.5])[None, :, None]
    logprob = -40 + sides[:, :, 1] / BETA
    names, lengths = [str(n) for n in range(count)], np.ones((count, 2), dtype=np.int64)
    return PairScores(
        name, 3, BETA, names, ["source"] * count, prompts, lengths,
        reward=sides[:, :, 0].astype(np.float32),
        logprob=logprob.astype(np.float32),
        reference=np.full((count, 2), -40, dtype=np.float32),
    )  # fmt: skip


def test_the_weights_are_those_of_a_plain_minimiser():
    margins, prompts = planted(300, (1.0, 0.005))
    found = fit_weights(margins, prompts)
    scale = np.sqrt((margins**2).mean(axis=0))
    np.testing.assert_allclose(found.deviations, scale)
    x, weights = torch.from_numpy(margins / scale), torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=500, tolerance_grad=1e-12, tolerance_change=0)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.softplus(-x @ weights).sum() + RIDGE / 2 * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    np.testing.assert_allclose(found.values, weights.detach().numpy() / scale, rtol=1e-6)


def test_planted_weights_are_found_within_their_intervals():
    planned, values, hits = np.array([1.0, 0.005]), [], []
    for seed in range(60):
        found = fit_weights(*planted(4000, tuple(planned), seed, per_prompt=2))
        hits.append(np.abs(found.values - planned) <= 1.96 * found.errors)
        values.append(found.values)
    np.testing.assert_allclose(np.mean(values, axis=0), planned, rtol=0.03)
    assert (np.mean(hits, axis=0) > 0.87).all()


def test_pairs_of_one_prompt_count_as_one_witness():
    """The same pairs ten times over, with the same prompts, say no more than once."""
    margins, prompts = planted(500, (1.0, 0.0))
    once, often = fit_weights(margins, prompts), fit_weights(np.tile(margins, (10, 1)), prompts * 10)
    np.testing.assert_allclose(often.values, once.values, rtol=0.02)
    np.testing.assert_allclose(often.errors, once.errors, rtol=0.02)


def test_judges_that_are_never_wrong_and_judges_that_say_nothing_have_weights_all_the_same():
    prompts = [str(n) for n in range(200)]
    separated = np.random.default_rng(0).uniform(0.1, 5, size=(200, 2))
    found = fit_weights(separated, prompts)
    assert np.isfinite(found.values).all() and (separated @ found.values > 0).all()
    silent = np.stack([separated[:, 0], np.zeros(200)], axis=1)
    assert fit_weights(silent, prompts).values[1] == 0
    assert np.isnan(fit_weights(np.full((200, 2), np.nan), prompts).values).all()
    outlier = np.vstack([separated[:-1] - 2, [[1e6, -1e6]]])
    assert np.isfinite(fit_weights(outlier, prompts).values).all()


def test_two_noisy_judges_together_beat_either():
    margins = two_noisy_judges(5000)
    prompts = [str(n) for n in range(5000)]
    together = combine(margins[:, 0], margins[:, 1], prompts)
    accuracies = (margins > 0).mean(axis=0)
    assert (together > 0).mean() > accuracies.max() + 0.02
    # The logit is what it says: of pairs at about 1, sigmoid(1) are right.
    sure = np.abs(np.abs(together) - 1) < 0.1
    assert (together[sure] > 0).mean() == pytest.approx(1 / (1 + np.exp(-1)), abs=0.05)


def test_no_pair_is_judged_by_its_label_or_by_one_of_its_prompt():
    """Other labels of a fold change nothing of what is said of it, and of the other folds they do."""
    margins, prompts = planted(600, (1.0, 0.01), per_prompt=3)
    mine = folds_of(prompts) == 2
    turned = np.where((mine & (np.arange(600) % 7 < 4))[:, None], -margins, margins)
    said, after = (combine(each[:, 0], each[:, 1], prompts) for each in (margins, turned))
    np.testing.assert_array_equal(np.abs(after[mine]), np.abs(said[mine]))
    assert (np.abs(after[~mine] - said[~mine]) > 1e-6).all()


def test_labels_without_meaning_are_judged_no_better_than_by_a_coin():
    """In sample two weights would gain on so few pairs."""
    found = []
    for seed in range(40):
        noise = np.random.default_rng(seed).normal(size=(100, 2))
        found.append((combine(noise[:, 0], noise[:, 1], [str(n) for n in range(100)]) > 0).mean())
    assert abs(np.mean(found) - 0.5) < 0.025


def test_the_folds_hold_whole_prompts_and_do_not_hang_on_the_order():
    prompts = [f"prompt {n // 2}" for n in range(1000)]
    folds = folds_of(prompts)
    assert (folds[::2] == folds[1::2]).all() and (folds_of(prompts[::-1])[::-1] == folds).all()
    assert np.bincount(folds, minlength=NUM_FOLDS).min() > 150
    margins, _ = planted(1000, (1.0, 0.01))
    order = np.random.default_rng(0).permutation(1000)
    shuffled = combine(*margins[order].T, [prompts[n] for n in order])
    np.testing.assert_allclose(shuffled, combine(*margins.T, prompts)[order], rtol=1e-9)


def test_a_set_is_judged_by_what_has_not_seen_its_prompts():
    margins, prompts = planted(400, (1.0, 0.01), per_prompt=2)
    near = scores_of(margins, prompts)
    judge = CombinedJudge.fitted_on(near)
    judge.judge(near)
    np.testing.assert_allclose(near.margins("combined"), combine(*margins.T, prompts), rtol=1e-3, atol=1e-4)
    far = scores_of(margins[:100], [*prompts[:50], *(f"other {n}" for n in range(50))], "far")
    judge.judge(far)
    np.testing.assert_array_equal(far.combined[:50], near.combined[:50])
    np.testing.assert_allclose(far.margins("combined")[50:], margins[50:100] @ judge.fit.weights, rtol=1e-3, atol=1e-4)
    assert far.fit == near.fit == judge.fit and judge.fit.set == "near"
    assert (judge.fit.pairs, judge.fit.prompts, judge.fit.beta) == (400, 200, BETA)
    assert all(low < value < high for low, value, high in zip(judge.fit.low, judge.fit.weights, judge.fit.high))


def test_a_saved_fit_judges_the_pairs_it_has_seen_as_it_did_among_whatever_others():
    margins, prompts = planted(400, (1.0, 0.01))
    near = scores_of(margins, prompts)
    CombinedJudge.fitted_on(near).judge(near)
    saved = CombinedJudge(JudgeFit.from_json(json.loads(json.dumps(near.fit.to_json()))))
    others = [f"other {n}" for n in range(400)]
    mixed = scores_of(np.concatenate([margins[:-1], margins]), [*prompts[:-1], *others])
    saved.judge(mixed)
    np.testing.assert_array_equal(mixed.combined[:399], near.combined[:-1])
    np.testing.assert_allclose(mixed.margins("combined")[399:], margins @ saved.fit.weights, rtol=1e-3, atol=1e-4)


def test_a_score_that_is_no_number_makes_no_judge():
    margins, prompts = planted(400, (1.0, 0.01))
    margins[7, 0] = np.nan
    assert CombinedJudge.fitted_on(scores_of(margins, prompts)) is None


def test_without_both_heads_or_enough_pairs_and_prompts_there_is_none():
    margins, prompts = planted(FEWEST_PAIRS, (1.0, 0.01))
    whole = scores_of(margins, prompts)
    judge = CombinedJudge.fitted_on(whole)
    assert judge is not None
    few = [prompts[n % (FEWEST_PROMPTS - 1)] for n in range(FEWEST_PAIRS)]
    for part, names in ((margins, few), (margins[1:], prompts[1:])):
        assert CombinedJudge.fitted_on(scores_of(part, names)) is None
        assert re.search(r"pairs of \d+ prompts are too few .* on 50 pairs of 10 prompts or more", too_few(names))
    for missing in ("reward", "logprob", "reference"):
        part = dataclasses.replace(whole, **{missing: None})
        assert CombinedJudge.fitted_on(part) is None
        judge.judge(part)
        assert "combined" not in part.judges
