"""Both heads of a model as one judge: what each of them counts, by logistic regression on pairs that are kept out of
the test.

A pair's logit is w_r * (margin of the reward head) + w_i * (margin of the implicit reward). Which of its answers stands
first says nothing, so there is no intercept. Prompts are dealt into folds by a hash of their names: a pair is judged by
weights that were fitted without its fold, so no pair is judged by a fit that has seen its label or that of another pair
of its prompt.

Legend: P pairs, F folds. The second axis of [P, 2] is (reward head, implicit reward), or any two judges. A margin is
the score of the chosen answer less that of the rejected one; the label says that it should be above 0.
"""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from hafrm_ds.evaluation.calibration import sigmoid
from hafrm_ds.evaluation.pair_scores import PairScores
from hafrm_ds.objective import JudgeFit

FEWEST_PAIRS, FEWEST_PROMPTS = 50, 10
"""On fewer, two weights say more of the pairs than of the model."""
NUM_FOLDS = 5
RIDGE = 1.0
"""Penalty on half the squared weights of margins over their deviations: what a single pair can pull. It bounds the
weights where they judge every pair right."""
MOST_STEPS = 100
TOLERANCE = 1e-10
NORMAL_QUANTILE = 1.959963984540054
"""Of 97.5%."""


class Weights(NamedTuple):
    """A fit on margins [P, 2]: weights [2] of the margins as they are, standard errors [2] of these, and the root mean
    squares [2] of the margins."""

    values: np.ndarray
    errors: np.ndarray
    deviations: np.ndarray


def fit_weights(margins: np.ndarray, prompts: Sequence[str]) -> Weights:
    """Logistic regression of the label on margins [P, 2], without intercept, by Newton's method in fp64.

    The standard errors are those of the sandwich estimator, clustered by prompt (Liang & Zeger 1986). Margins that are
    not finite have weights that are not finite either.
    """
    margins = np.asarray(margins, dtype=np.float64)
    deviations = np.sqrt(np.mean(margins**2, axis=0))
    if not np.isfinite(deviations).all():
        return Weights(np.full(2, np.nan), np.full(2, np.nan), deviations)
    scale = np.where(deviations > 0, deviations, 1.0)  # a head that says nothing gets the weight 0
    x = margins / scale

    def loss(weights: np.ndarray) -> float:
        return float(np.logaddexp(0, -x @ weights).sum() + RIDGE / 2 * weights @ weights)

    weights = np.zeros(2)
    for _ in range(MOST_STEPS):
        wrong = sigmoid(-x @ weights)
        gradients = -wrong[:, None] * x
        hessian = (x * (wrong * (1 - wrong))[:, None]).T @ x + RIDGE * np.eye(2)
        step = np.linalg.solve(hessian, gradients.sum(axis=0) + RIDGE * weights)
        while np.abs(step).max() > TOLERANCE and loss(weights - step) > loss(weights):
            step /= 2
        weights = weights - step
        if np.abs(step).max() <= TOLERANCE:
            break
    _, cluster = np.unique(np.asarray(prompts), return_inverse=True)
    pulls = np.stack([np.bincount(cluster, weights=column) for column in gradients.T])  # [2, prompts]
    inverse = np.linalg.inv(hessian)
    errors = np.sqrt(np.diag(inverse @ pulls @ pulls.T @ inverse))
    return Weights(weights / scale, errors / scale, deviations)


def folds_of(prompts: Sequence[str]) -> np.ndarray:
    """The fold of each prompt, [P], by its name alone: the same on every machine, in any order of the pairs."""
    return np.array([hashlib.blake2b(prompt.encode()).digest()[0] for prompt in prompts], dtype=np.int64) % NUM_FOLDS


def held_out_weights(margins: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """The weights that are fitted without each fold, [F, 2], on margins [P, 2]."""
    folds, names = folds_of(prompts), np.asarray(prompts)
    return np.stack([fit_weights(margins[folds != fold], names[folds != fold]).values for fold in range(NUM_FOLDS)])


def too_few(prompts: Sequence[str] | np.ndarray) -> str | None:
    """Why there is no fit on pairs of these prompts [P], by any names; None where there is one."""
    num_pairs, num_prompts = len(prompts), len(np.unique(prompts))
    if num_pairs >= FEWEST_PAIRS and num_prompts >= FEWEST_PROMPTS:
        return None
    return (
        f"{num_pairs:,} pairs of {num_prompts:,} prompts are too few for the combined judge, which is fitted on "
        f"{FEWEST_PAIRS} pairs of {FEWEST_PROMPTS} prompts or more"
    )


@dataclass(frozen=True)
class CombinedJudge:
    """A fit, which judges no prompt that it has seen by what it has learned from it, in whatever set it stands."""

    fit: JudgeFit

    @classmethod
    def fitted_on(cls, scores: PairScores) -> "CombinedJudge | None":
        """The judge of a set of pairs; None where they lack one of the heads, are too few for a fit, or have a score
        that is no number."""
        if not {"reward", "implicit"} <= scores.judges.keys() or too_few(scores.prompts):
            return None
        prompts = sorted(set(scores.prompts))
        margins = np.stack([scores.margins(judge) for judge in ("reward", "implicit")], axis=1)
        if not np.isfinite(margins).all():
            return None
        found = fit_weights(margins, scores.prompts)
        reach = NORMAL_QUANTILE * found.errors
        fit = JudgeFit(
            weights=as_pair(found.values),
            low=as_pair(found.values - reach),
            high=as_pair(found.values + reach),
            deviations=as_pair(found.deviations),
            beta=scores.beta,
            set=scores.set,
            pairs=len(scores),
            prompts=len(prompts),
            seen=base64.b64encode(short_hashes(prompts).tobytes()).decode(),
            folds=tuple(map(as_pair, held_out_weights(margins, scores.prompts))),
        )
        return cls(fit)

    def judge(self, scores: PairScores) -> None:
        """Add what it says to the scores of a set, where these have both heads."""
        if scores.reward is None or scores.logprob is None or scores.reference is None:
            return
        combined = np.empty_like(scores.reward)
        number = np.where(self.has_seen(scores.prompts), folds_of(scores.prompts), NUM_FOLDS)
        for fold, weights in enumerate((*self.fit.folds, self.fit.weights)):
            mine = number == fold
            part = replace(self.fit, weights=weights)
            combined[mine] = part.score(scores.reward[mine], scores.logprob[mine], scores.reference[mine])
        scores.combined, scores.fit = combined, self.fit

    def has_seen(self, prompts: Sequence[str]) -> np.ndarray:
        """Which of the prompts of a set it was fitted on, [P] bool."""
        return np.isin(short_hashes(prompts), np.frombuffer(base64.b64decode(self.fit.seen), dtype="<u4"))


def as_pair(values: np.ndarray) -> tuple[float, float]:
    return float(values[0]), float(values[1])


def short_hashes(prompts: Sequence[str]) -> np.ndarray:
    """A hash of four bytes of each name, [P]. Where two are equal by chance, a prompt is judged by the weights of four
    folds in place of five, which does no harm."""
    hashes = [hashlib.blake2b(prompt.encode(), digest_size=4).digest() for prompt in prompts]
    return np.frombuffer(b"".join(hashes), dtype="<u4")
