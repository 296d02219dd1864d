"""Methods against each other, from scores whose accuracies are known."""

import io

import numpy as np
import pytest
from rich.console import Console

from hafrm_ds.errors import DataError
from hafrm_ds.evaluation.bootstrap import estimate, mean_of_sets
from hafrm_ds.evaluation.comparison import OTHERS, Method, compare, render_comparison
from hafrm_ds.evaluation.pair_scores import PairScores

SIZES = {"in": 200, "far": 100, "farther": 50}


def scores(name: str, right: np.ndarray, implicit: bool = False) -> PairScores:
    """Scores by which the pairs of `right` are judged so."""
    names = [f"{name}:{place}" for place in range(len(right))]
    values = np.stack([right.astype(np.float32), np.full(len(right), 0.5, dtype=np.float32)], axis=1)
    heads = {"logprob": values, "reference": np.zeros_like(values)} if implicit else {"reward": values}
    return PairScores(name, 1, 0.1, names, ["s"] * len(right), names, np.ones((len(right), 2), dtype=int), **heads)


def method(name: str, shares: list[float], seed: int, implicit: bool = False) -> Method:
    """One training for each share: that share of every set is judged right, in a random order."""
    source = np.random.default_rng(seed)
    trainings = []
    for share in shares:
        rights = {
            set_name: source.permutation(np.arange(size) < round(share * size)) for set_name, size in SIZES.items()
        }
        trainings.append({set_name: scores(set_name, right, implicit) for set_name, right in rights.items()})
    return Method(name, "implicit" if implicit else "reward", trainings)


@pytest.fixture(scope="module")
def results():
    methods = [method("baseline", [0.6, 0.7], 0), method("dpo", [0.5, 0.5], 1, True), method("haf", [0.8, 0.9], 2)]
    return compare(methods, list(SIZES), seeds=[4, 5])


def test_accuracies_are_means_over_seeds(results):
    baseline = results["methods"]["baseline"]
    for name in [*SIZES, OTHERS]:
        assert baseline["accuracy"][name]["value"] == pytest.approx(0.65)
        assert baseline["accuracy"][name]["by_seed"] == pytest.approx([0.6, 0.7])
        assert baseline["accuracy"][name]["low"] < 0.62 < 0.68 < baseline["accuracy"][name]["high"]
    assert results["methods"]["dpo"]["judge"] == "implicit"
    assert results["methods"]["dpo"]["other_judges"].keys() == {"logprob"}
    assert (results["seeds"], results["sets"], results["pairs"]) == ([4, 5], list(SIZES), SIZES)


def test_differences_are_later_less_earlier(results):
    assert list(results["differences"]) == ["dpo - baseline", "haf - baseline", "haf - dpo"]
    value = results["differences"]["haf - baseline"]["in"]
    assert value["value"] == pytest.approx(0.2) and value["by_seed"] == pytest.approx([0.2, 0.2])
    assert 0.05 < value["low"] < value["high"] < 0.35


def test_a_paired_difference_is_surer_than_two_accuracies():
    """Two methods that err on the same pairs, but for a few."""
    right = np.random.default_rng(0).random(400) < 0.7
    better = right.copy()
    better[np.flatnonzero(~right)[:20]] = True
    prompts = [str(k) for k in range(400)]
    paired = estimate(better.astype(float) - right, prompts)
    alone = estimate(right.astype(float), prompts)
    assert paired.value == pytest.approx(0.05) and paired.high - paired.low < 0.6 * (alone.high - alone.low)


def test_every_set_counts_alike_and_is_resampled_by_itself():
    small, large = np.ones((1, 10)), np.zeros((1, 1000))
    mean = mean_of_sets([small, large], [[str(k) for k in range(n)] for n in (10, 1000)])
    assert (mean.value, mean.low, mean.high) == (0.5, 0.5, 0.5)


def test_other_pairs_are_no_comparison():
    one, other = method("one", [0.5], 0), method("other", [0.5], 1)
    other.scores[0]["far"].ids[3] = "another"
    with pytest.raises(DataError, match="other was not evaluated on the same pairs of far as one"):
        compare([one, other], list(SIZES), [0])


def test_the_table_names_methods_judges_and_points(results):
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(render_comparison(results))
    text = console.export_text()
    for piece in ("baseline", "implicit reward", "65.0%", "+20.0 [", OTHERS, "2 seeds"):
        assert piece in text
