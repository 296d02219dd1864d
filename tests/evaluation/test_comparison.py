"""Methods against each other, from scores whose accuracies are known."""

import io
import time
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from hafrm_ds.errors import DataError
from hafrm_ds.evaluation import comparison
from hafrm_ds.evaluation.bootstrap import estimate, means_of_sets
from hafrm_ds.evaluation.comparison import OTHERS, TWO_MODELS, Judged, Method, compare, two_models
from hafrm_ds.evaluation.comparison_tables import gain_table, points, render_comparison, seeds_in_words
from hafrm_ds.evaluation.figures import JUDGES
from hafrm_ds.evaluation.pair_scores import PairScores
from tests.evaluation.groups import rated_groups

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
        trainings.append({set_name: Judged.of(scores(set_name, right, implicit)) for set_name, right in rights.items()})
    return Method(name, "implicit" if implicit else "reward", trainings)


@pytest.fixture(scope="module")
def results():
    methods = [method("baseline", [0.6, 0.7], 0), method("dpo", [0.5, 0.5], 1, True), method("haf", [0.8, 0.9], 2)]
    return compare(methods, list(SIZES), seeds=[4, 5], planned_seeds=[4, 5, 6])


def test_accuracies_are_means_over_seeds(results):
    baseline = results["methods"]["baseline"]
    for name in [*SIZES, OTHERS]:
        assert baseline["accuracy"][name]["value"] == pytest.approx(0.65)
        assert baseline["accuracy"][name]["by_seed"] == pytest.approx([0.6, 0.7])
        assert baseline["accuracy"][name]["low"] < 0.62 < 0.68 < baseline["accuracy"][name]["high"]
    assert results["methods"]["dpo"]["judge"] == "implicit"
    assert results["methods"]["dpo"]["other_judges"].keys() == {"logprob"}
    assert (results["seeds"], results["planned_seeds"]) == ([4, 5], [4, 5, 6])
    assert (results["sets"], results["pairs"]) == (list(SIZES), SIZES)


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
    assert paired["value"] == pytest.approx(0.05)
    assert paired["high"] - paired["low"] < 0.6 * (alone["high"] - alone["low"])


def test_every_set_counts_alike_and_is_resampled_by_itself():
    """Against a naive bootstrap that draws trainings, and prompts with all of their pairs for each set anew."""
    source = np.random.default_rng(0)
    values = [source.normal(size=(3, size)) + source.normal(size=(3, 1)) for size in (20, 300)]
    prompts = [[str(k) for k in source.integers(size, size=size)] for size in (20, 300)]
    found = means_of_sets({"": values}, prompts)[""]
    assert found["value"] == pytest.approx((values[0].mean() + values[1].mean()) / 2)
    groups = [[np.flatnonzero(np.array(names) == name) for name in set(names)] for names in prompts]
    means = []
    for _ in range(4000):
        trainings = source.integers(3, size=3)
        drawn = [np.concatenate([each[k] for k in source.integers(len(each), size=len(each))]) for each in groups]
        means.append(np.mean([rows[trainings][:, places].mean() for rows, places in zip(values, drawn)]))
    spread = np.std(means)
    assert (found["low"], found["high"]) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.1 * spread)


def test_a_single_prompt_has_a_difference_without_an_interval():
    one, other = method("one", [0.4], 0), method("other", [0.6], 1)
    for each in (one, other):
        each.trainings[0]["in"].prompts[:] = ["the same"] * SIZES["in"]
    value = compare([one, other], ["in"], [0], [0])["differences"]["other - one"]["in"]
    assert value["low"] is None and points(value) == "+20.0"


def test_seeds_are_counted_in_words():
    for number, planned, words in ((1, 1, "1 seed"), (3, 3, "3 seeds"), (1, 3, "1 of 3 seeds")):
        assert seeds_in_words({"seeds": [0] * number, "planned_seeds": [0] * planned}) == words


def test_other_pairs_are_no_comparison():
    one, other = method("one", [0.5, 0.5], 0), method("other", [0.5, 0.5], 1)
    other.trainings[1]["far"].ids[3] = "another"
    with pytest.raises(
        DataError, match="other with seed 8 was not evaluated on the same pairs of far as one with seed 7"
    ):
        compare([one, other], list(SIZES), [7, 8], [7, 8])
    one.trainings[1]["far"].prompts[3] = one.trainings[1]["far"].prompts[4]
    with pytest.raises(
        DataError, match="one with seed 8 was not evaluated on the same pairs of far as one with seed 7"
    ):
        compare([one, other], list(SIZES), [7, 8], [7, 8])
    del one.trainings[0]["in"]
    with pytest.raises(DataError, match="one with seed 7 was not evaluated on in"):
        compare([one, other], list(SIZES), [7, 8], [7, 8])


def test_the_table_names_methods_judges_and_points(results):
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(render_comparison(results))
    text = console.export_text()
    for piece in ("baseline", "implicit reward", "65.0%", "+20.0 [", OTHERS, "2 of 3 seeds"):
        assert piece in text


def planted(name: str, shares: dict[str, float], cells: dict[str, dict[str, str]]) -> Method:
    """Two trainings, whose judges are right in a share of 200 pairs: the same pairs first."""
    names = [str(place) for place in range(200)]
    trainings = []
    for seed in range(2):
        order = np.random.default_rng(seed).permutation(200)
        right = {judge: (order < 200 * share).astype(np.float32) for judge, share in shares.items()}
        trainings.append({"in": Judged(names, names, right)})
    return Method(name, next(iter(shares)), trainings, cells)


def test_a_sweep_compares_with_the_baseline_of_the_cell_alone():
    one, two = {"baseline-pairs1": {"pairs": "1"}}, {"baseline-pairs2": {"pairs": "2"}}
    methods = [
        planted("baseline-pairs1", {"reward": 0.6}, one),
        planted("haf-pairs1", {"reward": 0.7, "implicit": 0.8}, {"baseline-pairs1": {"pairs": "1", "share": "0.5"}}),
        planted("baseline-pairs2", {"reward": 0.7}, two),
        planted("dpo", {"implicit": 0.75}, one | two),
    ]
    results = compare(methods, ["in"], [0, 1], [0, 1], {"pairs": {"option": "some.option"}})
    assert list(results["differences"]) == [
        "haf-pairs1 - baseline-pairs1",
        "dpo - baseline-pairs1",
        "dpo - baseline-pairs2",
    ]
    assert results["sweep"] == {"pairs": {"option": "some.option"}}
    assert [cell["baseline"] for cell in results["cells"]] == ["baseline-pairs1", "baseline-pairs2"]
    assert list(results["cells"][1]["methods"]) == ["baseline-pairs2", "dpo"]
    assert results["cells"][0]["methods"]["haf-pairs1"] == {"pairs": "1", "share": "0.5"}

    def gain(name: str, baseline: str, judge: str) -> float:
        found = results["methods"][name]["gains"][baseline][judge]["in"]
        assert found["low"] < found["value"] < found["high"] and len(found["by_seed"]) == 2
        return found["value"]

    assert gain("haf-pairs1", "baseline-pairs1", "reward") == pytest.approx(0.1)
    assert gain("haf-pairs1", "baseline-pairs1", "implicit") == pytest.approx(0.2)
    assert gain("dpo", "baseline-pairs1", "implicit") == pytest.approx(0.15)
    assert gain("dpo", "baseline-pairs2", "implicit") == pytest.approx(0.05)
    assert "gains" not in results["methods"]["baseline-pairs1"]


def test_both_heads_meet_the_other_methods_and_the_two_models():
    haf = planted("haf", {"reward": 0.6, "implicit": 0.6, "combined": 0.8}, {})
    dpo = planted("dpo", {"implicit": 0.65, TWO_MODELS: 0.75}, {})
    found = compare([planted("baseline", {"reward": 0.7}, {}), dpo, haf], ["in"], [0, 1], [0, 1])["differences"]
    assert {name: round(each["in"]["value"], 4) for name, each in found.items()} == {
        "dpo - baseline": -0.05,
        "haf - baseline": -0.1,
        "haf, both heads - baseline": 0.1,
        "haf - dpo": -0.05,
        "haf, both heads - dpo": 0.15,
        "haf, both heads - dpo, implicit reward with Baseline's head": 0.05,
    }


def test_two_models_are_those_of_one_cell():
    """DPO does not feel what the cells differ in; its rival's reward head is that of the first."""
    one, two = {"baseline-lr1": {"lr": "1"}}, {"baseline-lr2": {"lr": "2"}}
    methods = [
        planted("baseline-lr1", {"reward": 0.6}, one),
        planted("dpo", {"implicit": 0.65, TWO_MODELS: 0.75}, one | two),
        planted("haf-lr1", {"reward": 0.6, "combined": 0.8}, {"baseline-lr1": {"lr": "1", "share": "0.5"}}),
        planted("baseline-lr2", {"reward": 0.7}, two),
        planted("haf-lr2", {"reward": 0.6, "combined": 0.8}, {"baseline-lr2": {"lr": "2", "share": "0.5"}}),
    ]
    results = compare(methods, ["in"], [0, 1], [0, 1], {"lr": {"option": "some.option"}})
    gains = results["methods"]["dpo"]["gains"]
    assert TWO_MODELS in gains["baseline-lr1"] and list(gains["baseline-lr2"]) == ["implicit"]
    rival = "dpo, implicit reward with Baseline's head"
    assert results["differences"][f"haf-lr1, both heads - {rival}"]["in"]["value"] == pytest.approx(0.05)
    assert f"haf-lr2, both heads - {rival}" not in results["differences"]
    rows = [name for name, _ in gain_table(results, ["in"], "gains").rows]
    assert f"{rival} (against baseline-lr1)" in rows and f"{rival} (against baseline-lr2)" not in rows


def test_a_score_that_is_no_number_is_named():
    right = scores("in", np.ones(50))
    right.reward[3, 0] = np.nan
    with pytest.raises(DataError, match="in: the reward head gives in:3 a score that is no number"):
        Judged.of(right)


def test_names_of_prompts_may_differ_where_they_group_the_pairs_alike():
    """Of models with tokenizers of their own: prompts are named by their tokens."""
    one, other = method("one", [0.5], 0), method("other", [0.5], 1)
    before = compare([one, other], list(SIZES), [0], [0])["differences"]
    renamed = {
        name: replace(judged, prompts=[f"another {each}" for each in judged.prompts])
        for name, judged in other.trainings[0].items()
    }
    other = replace(other, trainings=[renamed])
    assert compare([one, other], list(SIZES), [0], [0])["differences"] == before


def test_many_methods_at_once_are_estimated_as_each_alone(monkeypatch):
    methods = [method(name, [0.6 + 0.1 * place, 0.7], place) for place, name in enumerate(("baseline", "dpo", "haf"))]
    together = compare(methods, list(SIZES), [0, 1], [0, 1])
    monkeypatch.setattr(comparison, "COLUMNS_AT_ONCE", 1)
    apart = compare(methods, list(SIZES), [0, 1], [0, 1])
    value, alone = (each["differences"]["haf - dpo"][OTHERS] for each in (together, apart))
    assert value["low"] == pytest.approx(alone["low"], abs=1e-9) and value["by_seed"] == alone["by_seed"]
    rights = [methods[2].right(name) - methods[1].right(name) for name in list(SIZES)[1:]]
    prompts = [methods[0].trainings[0][name].prompts for name in list(SIZES)[1:]]
    assert value["high"] == pytest.approx(means_of_sets({"": rights}, prompts)[""]["high"], abs=1e-9)


def test_twenty_seeds_of_fifty_methods_take_seconds():
    source, names = np.random.default_rng(0), [str(place) for place in range(600)]

    def drawn(name: str) -> Method:
        right = [{judge: (source.random(600) < 0.8).astype(np.float32) for judge in JUDGES} for _ in range(20)]
        return Method(name, "reward", [{"in": Judged(names, names, each)} for each in right], {"m0": {}})

    started = time.process_time()
    results = compare([drawn(f"m{place}") for place in range(50)], ["in"], range(20), range(20), {})
    assert len(results["differences"]) == 49 and time.process_time() - started < 30


def test_two_models_judge_together_better_than_either_and_have_a_name_in_the_tables():
    """Two judges whose faults are independent."""
    source = np.random.default_rng(0)

    def margins(size: int) -> np.ndarray:
        return np.stack([source.normal(0.6, 1, size), np.zeros(size)], axis=1).astype(np.float32)

    sizes = {"in": 2000, "far": 1000}
    names = {name: [str(place) for place in range(size)] for name, size in sizes.items()}
    ones = {name: np.ones((size, 2), dtype=int) for name, size in sizes.items()}

    def model(head: str) -> dict[str, PairScores]:
        return {
            name: PairScores(name, 1, 1.0, names[name], ["s"] * size, names[name], ones[name], **{head: margins(size)})
            for name, size in sizes.items()
        }

    baseline, dpo = model("reward"), model("logprob")
    for name, scores in dpo.items():
        scores.reference = np.zeros((sizes[name], 2), dtype=np.float32)
    together = two_models(dpo, baseline, "in")
    for name, right in together.items():
        alone = [Judged.of(each[name]).right[judge].mean() for each, judge in ((baseline, "reward"), (dpo, "implicit"))]
        assert right.mean() > max(alone) + 0.03

    trainings = [{name: Judged.of(scores) for name, scores in each.items()} for each in (baseline, dpo)]
    for name, right in together.items():
        trainings[1][name].right[TWO_MODELS] = right
    methods = [Method("baseline", "reward", trainings[:1]), Method("dpo", "implicit", trainings[1:])]
    results = compare(methods, list(sizes), seeds=[0], planned_seeds=[0])
    found = results["methods"]["dpo"]["other_judges"][TWO_MODELS]
    assert {name: found[name]["value"] for name in sizes} == {
        name: pytest.approx(right.mean()) for name, right in together.items()
    }
    file = io.StringIO()
    Console(file=file, width=200).print(render_comparison(results))
    assert "dpo, implicit reward with Baseline's head" in file.getvalue()


def test_comparisons_of_groups_are_paired_by_their_ids_and_resampled_by_prompt():
    source = np.random.default_rng(0)
    gold = source.permuted(np.tile(np.arange(4), (80, 1)), axis=1)
    methods = []
    for name, noise in (("one", 3.0), ("other", 1.0)):
        judged = [rated_groups(gold, gold + source.normal(scale=noise, size=gold.shape), name="in") for _ in range(2)]
        assert len(set(judged[0].ids)) == len(judged[0]) == 80 * 6
        methods.append(Method(name, "reward", [{"in": Judged.of(scores)} for scores in judged]))
    results = compare(methods, ["in"], [0, 1], [0, 1])
    assert results["pairs"] == {"in": 480}
    right = methods[1].right("in") - methods[0].right("in")
    value = results["differences"]["other - one"]["in"]
    assert value["value"] == pytest.approx(right.mean()) and value["low"] > 0
    assert (value["low"], value["high"]) == pytest.approx(naive_interval(right, np.arange(480) // 6), abs=0.01)


def naive_interval(right: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """Of the mean of [S, P], where trainings and prompts are drawn."""
    source, means = np.random.default_rng(1), []
    of_prompts = [np.flatnonzero(prompts == prompt) for prompt in np.unique(prompts)]
    for _ in range(2000):
        places = np.concatenate([of_prompts[k] for k in source.integers(len(of_prompts), size=len(of_prompts))])
        means.append(right[source.integers(len(right), size=len(right))][:, places].mean())
    return np.quantile(means, [0.025, 0.975])


def test_a_judge_that_one_training_lacks_is_left_out():
    both, alone = (scores("in", np.ones(10), implicit=True) for _ in range(2))
    trainings = [{"in": Judged.of(each)} for each in (both, alone)]
    trainings[0]["in"].right[TWO_MODELS] = np.ones(10, dtype=np.float32)
    assert Method("dpo", "implicit", trainings).judges == ["implicit", "logprob"]
