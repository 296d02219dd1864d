"""Does a judge know how sure it is? Under Bradley-Terry it claims that the chosen answer is better with the probability
sigmoid(margin); calibration asks how often it is.

Legend: P pairs, or the comparisons of groups. A margin is the score of the chosen answer less that of the rejected one.
Where the data gives the probability of a comparison (`target`), that is not looked at: what is more likely is right.
"""

import itertools
from typing import Any

import numpy as np

NUM_BINS = 10
"""Of equal width between the confidences 0.5 (a coin) and 1."""
LARGEST_INVERSE_TEMPERATURE = 1e6
"""Where the search for 1 / temperature ends, in units of 1 / the mean size of a margin."""
BISECTIONS = 80


def calibrate(margins: np.ndarray) -> dict[str, Any]:
    """How well a judge's confidence agrees with how often it is right.

    Args:
        margins: [P] float64, finite, at least one.

    Returns:
        bins: the reliability curve (DeGroot & Fienberg 1983), as `reliability` gives it. ece: expected calibration
        error, the mean distance between confidence and accuracy over the pairs (Naeini et al. 2015). brier: mean of
        (1 - p)^2 with p the probability given to the chosen answer. log_loss: mean of -log p; both are strictly proper.
        temperature: T that minimises the log loss of sigmoid(margin / T) on these same pairs (Guo et al. 2017): above 1
        for a judge that is too sure. None if there is none: the judge is wrong more than right, or never wrong.
        ece_at_temperature, brier_at_temperature: after the division by it.
    """
    bins, temperature = reliability(margins), fitted_temperature(margins)
    at = None if temperature is None else margins / temperature
    return {
        "bins": bins,
        "ece": expected_calibration_error(bins),
        "brier": brier_score(margins),
        "log_loss": log_loss(margins),
        "temperature": temperature,
        "ece_at_temperature": None if at is None else expected_calibration_error(reliability(at)),
        "brier_at_temperature": None if at is None else brier_score(at),
    }


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -x))


def correctness(margins: np.ndarray) -> np.ndarray:
    """1 where the chosen answer scores higher, 0 where lower; a tie is 0.5. [P] -> [P]."""
    return (np.sign(margins) + 1) / 2


def reliability(margins: np.ndarray) -> list[dict[str, Any]]:
    """The pairs in NUM_BINS bins of confidence, sigmoid(|margin|).

    Returns:
        For each bin its ends low and high, the number of its pairs, their mean confidence, and accuracy, the share of
        them judged right; the last two are None without pairs.
    """
    confidence, right = sigmoid(np.abs(margins)), correctness(margins)
    edges = np.linspace(0.5, 1.0, NUM_BINS + 1).round(9)
    place = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, NUM_BINS - 1)
    bins = []
    for number, (low, high) in enumerate(itertools.pairwise(edges.tolist())):
        inside = place == number
        pairs = int(inside.sum())
        sure, accuracy = (float(each[inside].mean()) if pairs else None for each in (confidence, right))
        bins.append({"low": low, "high": high, "pairs": pairs, "confidence": sure, "accuracy": accuracy})
    return bins


def expected_calibration_error(bins: list[dict[str, Any]]) -> float:
    distances = [part["pairs"] * abs(part["accuracy"] - part["confidence"]) for part in bins if part["pairs"]]
    return sum(distances) / sum(part["pairs"] for part in bins)


def brier_score(margins: np.ndarray) -> float:
    return float(np.mean(sigmoid(-margins) ** 2))


def log_loss(margins: np.ndarray) -> float:
    return float(np.mean(np.logaddexp(0.0, -margins)))


def fitted_temperature(margins: np.ndarray) -> float | None:
    """T > 0 where the mean log loss of margins / T is smallest, None where there is no such T.

    The loss is convex in 1/T, so the zero of its slope is found by bisection.
    """

    def slope(inverse: float) -> float:
        return -float(np.mean(margins * sigmoid(-margins * inverse)))

    if margins.mean() <= 0 or margins.min() >= 0:  # best at 1/T <= 0, or the loss falls for ever
        return None
    low, high = 0.0, LARGEST_INVERSE_TEMPERATURE / float(np.abs(margins).mean())
    if slope(high) <= 0:
        return None
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 1 / high
