"""ALaRM's rule and ensembles against computations by hand, in fp64."""

import math
from dataclasses import dataclass

import pytest

from hafrm_ds.data.pairs import assistant, user
from hafrm_ds.rewards.ensemble import Ensemble
from hafrm_ds.rewards.hierarchy import Aspect, Hierarchy, Rule, shaped
from hafrm_ds.rewards.reward import Normalised, Score


@dataclass
class Fixed:
    """A reward that knows the score of every answer, and counts what it was asked."""

    known: dict[str, Score]
    asked: int = 0

    def scores(self, conversations):
        self.asked += len(conversations)
        return [self.known[each[-1]["content"]] for each in conversations]


RAW = {"far below": -9.0, "below": -2.6 - 1e-9, "at": -2.6, "above": 1.4}
MEAN, DEVIATION, THRESHOLD, WEIGHT = -5.0, 4.0, 0.6, 5.0
GRAMMAR = {"far below": (0.0, -1.0), "below": (0.0,), "at": (0.0, -1.0, -1.0, 0.0), "above": (-1.0,)}
LENGTH = {"far below": 3.0, "below": -0.5, "at": 0.25, "above": -800.0}
CONVERSATIONS = [[user("q"), assistant(answer)] for answer in RAW]


def hierarchy(mode: str, **scores: Score) -> Hierarchy:
    holistic = Fixed({answer: Score(raw) for answer, raw in RAW.items()})
    grammar = {answer: Score(sum(spans) / len(spans), spans=spans) for answer, spans in GRAMMAR.items()}
    length = {answer: Score(value) for answer, value in LENGTH.items()}
    aspects = {"grammar": Aspect(1.0, Fixed(grammar | scores)), "length": Aspect(0.3, Fixed(length))}
    return Hierarchy(Rule(mode, THRESHOLD, WEIGHT), Normalised(holistic, MEAN, DEVIATION), aspects)


def by_hand(mode: str, answer: str) -> float:
    z = (RAW[answer] + 5.0) / 4.0
    grammar = sum(1 / (1 + math.exp(-value)) for value in GRAMMAR[answer]) / len(GRAMMAR[answer])
    length = math.exp(LENGTH[answer]) / (1 + math.exp(LENGTH[answer]))
    aspects = grammar + 0.3 * length
    if mode == "holistic_only":
        return 5.0 * z
    if mode == "aspects_only":
        return aspects
    if mode == "weighted_sum":
        return 5.0 * z + aspects
    return 5.0 * z if answer in ("far below", "below") else 5.0 * z + aspects


@pytest.mark.parametrize("mode", ["hierarchical", "weighted_sum", "holistic_only", "aspects_only"])
def test_the_rule_is_that_of_the_paper_in_every_mode_and_at_the_threshold_itself(mode):
    assert (RAW["at"] - MEAN) / DEVIATION == THRESHOLD
    found = [score.value for score in hierarchy(mode).scores(CONVERSATIONS)]
    assert found == pytest.approx([by_hand(mode, answer) for answer in RAW], abs=1e-12)
    assert hierarchy(mode).scores([]) == []


def test_aspects_are_asked_where_they_count_alone():
    reward = hierarchy("hierarchical", **{"below": Score.none("no")})
    assert [score.error for score in reward.scores(CONVERSATIONS)] == [""] * 4
    assert reward.aspects["grammar"].reward.asked == reward.aspects["length"].reward.asked == 2


def test_an_error_of_a_part_is_the_error_of_the_answer():
    reward = hierarchy("weighted_sum", at=Score.none("too long"))
    reward.holistic.reward.known["above"] = Score.none("not finite")
    scores = reward.scores(CONVERSATIONS)
    assert [score.error for score in scores] == ["", "", "grammar: too long", "holistic: not finite"]
    assert [score.value is None for score in scores] == [False, False, True, True]


def test_doubling_the_sentences_of_an_answer_leaves_the_value_of_an_aspect():
    spans = (0.5, -0.5, 0.5)
    assert shaped(spans * 2) == pytest.approx(shaped(spans), abs=1e-15)
    known = {name: Score(sum(own) / len(own), spans=own) for name, own in (("once", spans), ("twice", spans * 2))}
    reward = Hierarchy(Rule("aspects_only", None, 1.0), None, {"facts": Aspect(2.0, Fixed(known))})
    once, twice = reward.scores([[user("q"), assistant(answer)] for answer in known])
    assert once.value == pytest.approx(twice.value, abs=1e-15)
    assert once.value == pytest.approx(2 * (2 / (1 + math.exp(-0.5)) + 1 / (1 + math.exp(0.5))) / 3, abs=1e-15)


@pytest.mark.parametrize(
    ("by", "expected"), [("mean", 3.0), ("min", 1.0), ("mean_minus_deviations", 3.0 - 0.5 * math.sqrt(8 / 3))]
)
def test_an_ensemble_is_what_it_is_called(by, expected):
    members = {str(value): Fixed({"a": Score(value), "b": Score(value)}) for value in (1.0, 3.0, 5.0)}
    reward = Ensemble(members, by, 0.5)
    members["3.0"].known["b"] = Score.none("no")
    good, bad = reward.scores([[assistant("a")], [assistant("b")]])
    assert good.value == pytest.approx(expected, abs=1e-12)
    assert bad == Score.none("3.0: no")
