"""How far rewards agree, against numbers by hand, and the job from pairs to a composition that can be opened."""

import itertools
import json
import math

import numpy as np
import pytest
import torch.distributed as dist
import yaml

from hafrm_ds.errors import ConfigError, DataError
from hafrm_ds.evaluation.agreement import (
    ALONE,
    EVERY,
    KEEP,
    LEAVE_OUT,
    UNDECIDED,
    SharedPairs,
    agreement_of,
    composed,
    fit,
    folds_of,
    held_out_correctness,
    normalised,
    verdict,
    with_aspect,
)
from hafrm_ds.evaluation.agreement_job import AgreementOptions, compare_rewards
from hafrm_ds.evaluation.report.writing import write_report
from hafrm_ds.options import read
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.rewards.hierarchy import Rule
from hafrm_ds.rewards.loading import load_reward
from tests.evaluation.report.chromium import DESKTOP, PHONE, PROGRAM, Chromium
from tests.evaluation.report.test_chromium import OVERFLOWING, OVERLAPPING_LABELS
from tests.evaluation.report.test_writing import Page

RULE = Rule("hierarchical", 0.5, 3.0)


def test_two_rewards_against_numbers_by_hand():
    scores = {
        "whole": np.array([[2.0, 1.0], [0.0, 3.0], [1.0, 1.0], [5.0, 4.0]]),  # margins 1, -3, 0, 1
        "other": np.array([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [0.0, 4.0]]),  # margins 1, 2, 3, -4
    }
    lengths = np.array([[10, 10], [500, 10], [10, 11], [10, 10]])
    found = agreement_of(SharedPairs(["a", "b", "c", "c"], lengths, scores), "whole", RULE)
    assert (found["pairs"], found["prompts"]) == (4, 3)
    whole = found["rewards"]["whole"]
    assert whole["mean"] == pytest.approx(17 / 8)
    assert whole["deviation"] == pytest.approx(math.sqrt(57 / 8 - (17 / 8) ** 2))
    assert whole["accuracy"]["value"] == pytest.approx((1 + 0 + 0.5 + 1) / 4) and whole["ties"] == 1
    [two] = found["between"]
    assert two["rewards"] == ["whole", "other"]
    assert two["inconsistency"]["value"] == pytest.approx((0 + 1 + 0.5 + 1) / 4)
    # Ranks 3.5, 1, 2, 3.5 and 2, 3, 4, 1: products of what they are from 2.5 by hand.
    assert two["spearman"] == pytest.approx((-0.5 - 0.75 - 0.75 - 1.5) / math.sqrt(4.5 * 5))
    bins = {(each["low"], each["high"]): each for each in two["by_length_difference"]}
    assert {ends: each["pairs"] for ends, each in bins.items()} == {(-100, -1): 1, (0, 0): 2, (401, None): 1}
    assert bins[(0, 0)]["inconsistency"]["value"] == pytest.approx(0.5)
    assert bins[(401, None)]["inconsistency"]["value"] == 1


def test_intervals_are_clustered_by_prompt():
    source = np.random.default_rng(0)
    signs = np.repeat(source.choice([-1.0, 1.0], size=40), 10)  # ten pairs of a prompt are alike

    def width(prompts: list[str]) -> float:
        scores = {"whole": np.stack([np.ones(400), np.zeros(400)], 1), "other": np.stack([signs, 0 * signs], 1)}
        found = agreement_of(SharedPairs(prompts, np.zeros((400, 2), int), scores), "whole", RULE)
        inconsistency = found["between"][0]["inconsistency"]
        return inconsistency["high"] - inconsistency["low"]

    clustered, free = width([str(n // 10) for n in range(400)]), width([str(n) for n in range(400)])
    assert clustered == pytest.approx(math.sqrt(10) * free, rel=0.25)


@pytest.mark.parametrize("mode", ["hierarchical", "weighted_sum", "holistic_only", "aspects_only"])
def test_a_composition_is_held_out_by_prompt(mode):
    """Against a loop over folds and answers."""
    source, rule = np.random.default_rng(1), Rule(mode, 0.2, 1.5)
    prompts = [f"p{n // 2}" for n in range(60)]
    scores = {name: source.normal(size=(60, 2)) for name in ("whole", "a", "b")}
    pairs = SharedPairs(prompts, np.zeros((60, 2), int), scores)
    found, folds = held_out_correctness(pairs, "whole", rule), folds_of(prompts)
    assert len(set(folds)) == 5 and all(folds[::2] == folds[1::2])
    for place in range(60):
        rest = folds != folds[place]
        values = []
        for side in (0, 1):
            z = {name: (each[place, side] - each[rest].mean()) / each[rest].std() for name, each in scores.items()}
            aspects = sum(1 / (1 + math.exp(-z[name])) for name in ("a", "b"))
            above = {"hierarchical": z["whole"] >= 0.2}.get(mode, mode != "holistic_only")
            values.append((1.5 * z["whole"] if mode != "aspects_only" else 0) + (aspects if above else 0))
        assert found[EVERY][place] == (values[0] > values[1])
    assert folds_of(["one", "one"]) is None


def test_an_aspect_that_knows_what_the_holistic_reward_does_not_is_kept_and_one_that_is_turned_round_is_not():
    source = np.random.default_rng(2)
    noise = {name: source.normal(size=(800, 2)) for name in ("whole", "useful", "harmful", "noise")}
    good = np.array([1.0, 0.0])
    scores = {
        "whole": 0.4 * good + noise["whole"],
        "useful": 2.0 * good + noise["useful"],
        "harmful": -2.0 * good + noise["harmful"],
        "constant": np.ones((800, 2)),
    }
    pairs = SharedPairs([str(n) for n in range(800)], np.zeros((800, 2), int), scores)
    found = agreement_of(pairs, "whole", Rule("weighted_sum", None, 1.0))
    aspects = found["aspects"]
    assert (aspects["useful"]["by_rule"], aspects["useful"]["by_accuracy"]) == (KEEP, KEEP)
    assert (aspects["harmful"]["by_rule"], aspects["harmful"]["by_accuracy"]) == (LEAVE_OUT, LEAVE_OUT)
    assert aspects["constant"]["inconsistency"]["value"] == 0.5 and aspects["constant"]["by_accuracy"] == UNDECIDED
    accuracy = {name: each["value"] for name, each in found["compositions"].items()}
    assert aspects["useful"]["gain"]["value"] == pytest.approx(accuracy[with_aspect("useful")] - accuracy[ALONE])
    assert accuracy["with those that raise the accuracy"] == accuracy[with_aspect("useful")]
    assert accuracy["with those that ALaRM's rule keeps"] == accuracy[with_aspect("useful")]


def test_a_verdict_needs_an_interval_beside_the_line():
    for low, high, expected in (
        (0.1, 0.4, KEEP),
        (0.6, 0.9, LEAVE_OUT),
        (0.4, 0.5, UNDECIDED),
        (None, None, UNDECIDED),
    ):
        assert verdict({"value": 0.4, "low": low, "high": high}, 0.5, keep_below=True) == expected
    assert verdict({"value": 0.4, "low": 0.1, "high": 0.6}, 0.0, keep_below=False) == KEEP


# ---- the job -------------------------------------------------------------------------------------------------------

FUNCTIONS = """
def words(prompt, answer):
    return len(answer.split())

def brevity(prompt, answer):
    if answer == "fault":
        raise ValueError("no")
    return -len(answer) / 10

def constant(prompt, answer):
    return 1
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "f.py").write_text(FUNCTIONS)
    texts = ["a b c", "a bbbbbbbbbb", "cc", "a b c d e", "x y", "long-long-long"]
    rows = [
        {"prompt": f"p{number % 7}", "chosen": one, "rejected": other}
        for number, (one, other) in enumerate(itertools.permutations(texts, 2))
    ]
    write(tmp_path / "pairs.jsonl", rows)
    return tmp_path


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def options_of(folder, *more: str) -> AgreementOptions:
    rewards = [f"{folder}/f.py:{name}" for name in ("words", "brevity", "constant")]
    given = ["--rewards", *rewards, "--data", f"{folder}/pairs.jsonl", "--output_dir", f"{folder}/out"]
    return read(AgreementOptions, [*given, "--cache_dir", f"{folder}/cache", *more])


def alone() -> Processes:
    return Processes(rank=0, local_rank=0, world_size=1, store=dist.HashStore())


def test_pairs_become_a_table_a_page_and_a_composition_that_can_be_opened(folder, capsys):
    options = options_of(folder, "--threshold", "0.1")
    assert compare_rewards(options, alone()) == 0
    found = json.loads((folder / "out" / "agreement.json").read_text())
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    words = np.array([[len(row[side].split()) for side in ("chosen", "rejected")] for row in pairs], float)
    brevity = np.array([[-len(row[side]) / 10 for side in ("chosen", "rejected")] for row in pairs])
    assert found["rewards"]["words"]["mean"] == pytest.approx(words.mean())
    assert found["rewards"]["words"]["deviation"] == pytest.approx(words.std())
    signs = [np.sign(each[:, 0] - each[:, 1]) for each in (words, brevity)]
    inconsistency = np.mean([0.5 if not one * other else one != other for one, other in zip(*signs)])
    assert found["between"][0]["inconsistency"]["value"] == pytest.approx(inconsistency)
    assert found["between"][1]["spearman"] is None  # of a constant
    assert "prefer different answers" in capsys.readouterr().out

    page = Page((folder / "out" / "report.html").read_text())
    assert page.row("words / brevity")[0].startswith(f"{inconsistency:.1%}")
    assert write_report(folder / "out", folder / "again.html").exists()

    composition = yaml.safe_load((folder / "out" / "composition.yaml").read_text())
    assert composition["aspects"]["constant"] == {"function": f"{folder}/f.py:constant", "weight": 0.0}
    reward = load_reward(folder / "out" / "composition.yaml", device="cpu")
    asked = [[{"role": "user", "content": "p"}, {"role": "assistant", "content": row["chosen"]}] for row in pairs]
    scaled = {"words": normalised(words, **fit(words)), "brevity": normalised(brevity, **fit(brevity))}
    kept = [name for name in ("brevity",) if composition["aspects"][name]["weight"]]
    expected = composed(scaled, "words", kept, Rule("hierarchical", 0.1, 3.0))[:, 0]
    assert [score.value for score in reward.scores(asked)] == pytest.approx(expected.tolist(), abs=1e-9)


@pytest.mark.skipif(PROGRAM is None, reason="no chromium is installed")
def test_the_page_fits_a_desktop_and_a_phone(folder, tmp_path_factory):
    compare_rewards(options_of(folder), alone())
    browser = Chromium(tmp_path_factory.mktemp("profile"))
    for width in (DESKTOP, PHONE):
        browser.open(folder / "out" / "report.html", width, "light")
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        assert browser.evaluate(OVERFLOWING) == 0
        assert browser.evaluate(OVERLAPPING_LABELS) == []
        assert not {"Log.entryAdded", "Runtime.exceptionThrown"} & {event["method"] for event in browser.events}
    browser.close()


def test_a_pair_that_cannot_be_scored_is_left_out_and_counted(folder):
    with (folder / "pairs.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "p", "chosen": "fault", "rejected": "b"}) + "\n")
    assert compare_rewards(options_of(folder), alone()) == 1
    found = json.loads((folder / "out" / "agreement.json").read_text())
    assert found["pairs"] == 30
    assert found["pairs_not_scored"] == {"by": {"words": 0, "brevity": 1, "constant": 0}, "left_out": 1}


def test_another_job_in_the_folder_is_refused(folder):
    compare_rewards(options_of(folder, "--max_pairs", "9"), alone())
    assert json.loads((folder / "out" / "agreement.json").read_text())["pairs"] == 9
    (folder / "f.py").write_text(FUNCTIONS + "\n# changed")
    with pytest.raises(DataError, match="another model, input or setting"):
        compare_rewards(options_of(folder, "--max_pairs", "9"), alone())


def test_rewards_have_names(folder):
    data = ["--data", "x.jsonl", "--output_dir", "out"]
    assert list(read(AgreementOptions, ["--rewards", "{a: m, b: f.py:g}", *data]).rewards.items()) == [
        ("a", "m"),
        ("b", "f.py:g"),
    ]
    assert list(read(AgreementOptions, ["--rewards", "m", "f.py:g", "h.py:g", *data]).rewards) == ["m", "g", "h.py:g"]
    with pytest.raises(ConfigError, match="names m twice"):
        read(AgreementOptions, ["--rewards", "m", "m", *data])
    with pytest.raises(ConfigError, match="at least 2"):
        read(AgreementOptions, ["--rewards", "m", *data])
