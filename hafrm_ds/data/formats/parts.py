"""The parts that a format makes of a row, and the group that they become."""

import json
import math
import random
from typing import TYPE_CHECKING, Any, NamedTuple

from hafrm_ds.data.pairs import Comparison, Deselected, Dropped, Message, Outcome, PreferenceGroup, Row
from hafrm_ds.errors import DataError

if TYPE_CHECKING:
    from hafrm_ds.data.sources import Source

# Outcomes that several formats share.
TIE = "tie"
NO_PREFERENCE = "no preference is given"
MORE_TURNS = "more than one turn"
NO_PROMPT = "no common prompt"
CLOSE = "no difference of scores as large as min_score_gap"
IDENTICAL = "identical answers"
UNCOMPARED = "max_answers leaves no two answers that are compared"


class Parts(NamedTuple):
    """A group without what every format may carry beside it."""

    prompt: list[Message]
    answers: tuple[list[Message], ...]
    comparisons: tuple[Comparison, ...]
    """A margin is what the format itself says; None leaves that of a pair to the row's `margin` or scores."""
    has_margins: bool = True
    """Whether the margins are more than differences that min_score_gap asks for."""


Made = Parts | Deselected | Dropped


def pair(
    prompt: list[Message],
    chosen: list[Message],
    rejected: list[Message],
    margin: float | None = None,
    target: float = 1.0,
) -> Parts:
    """The smallest group: two answers, the chosen one preferred with the probability `target`."""
    return Parts(prompt, (chosen, rejected), (Comparison(0, 1, margin, target),))


def split_conversations(chosen: list[Message], rejected: list[Message]) -> Parts:
    """Two whole conversations: the prompt is what they begin with alike."""
    length = common_prefix_length(chosen, rejected)
    return pair(chosen[:length], chosen[length:], rejected[length:])


def common_prefix_length(a: list[Message], b: list[Message]) -> int:
    """Number of messages that both conversations begin with, at least one message short of either end."""
    length = 0
    while length < min(len(a), len(b)) - 1 and a[length] == b[length]:
        length += 1
    return length


# ---- finished ------------------------------------------------------------------------------------------------------


def finished(made: Made, row: Row, source: "Source") -> Outcome:
    """The group, with its source and what columns of the row say of a pair; or why there is none."""
    if not isinstance(made, Parts):
        return made
    prompt, answers, comparisons, has_margins = made
    if not any(message["role"] not in ("system", "developer") for message in prompt):
        return Dropped(NO_PROMPT)
    if any(answer[0]["role"] in ("system", "user", "developer") for answer in answers):  # to a question of its own
        return Dropped(NO_PROMPT)
    if source.single_turn and not is_single_turn(prompt, answers):
        return Deselected(MORE_TURNS)
    if any(answer[-1]["role"] != "assistant" for answer in answers):
        return Dropped("does not end with an answer")
    margin_fault = ""
    if len(answers) == 2 and len(comparisons) == 1:
        better, worse, margin, target, weight = comparisons[0]
        if margin is None:
            margin, margin_fault = margin_or_fault(row)
        if has_probability(row, source):
            target = probability_of(row, " (else name it in ignore_columns of the source)")
        preferred = as_preferred(Comparison(better, worse, margin, target, weight))
        if preferred is None:
            return Deselected(TIE)
        comparisons = (preferred,)
        if preferred.better > preferred.worse:
            answers, comparisons = those_at([1, 0], answers, comparisons)
    elif has_probability(row, source):
        raise DataError(
            f"{row.id}: field 'probability' is that of a pair, and the row has {len(answers)} answers: give "
            "comparisons, or name it in ignore_columns of the source"
        )
    if source.min_score_gap is not None:
        comparisons = tuple(each for each in comparisons if is_as_far(each.margin, source.min_score_gap))
        if not comparisons:
            return Deselected(CLOSE)
    if not has_margins:
        comparisons = tuple(each._replace(margin=None) for each in comparisons)
    if len(answers) > 2:  # of a pair, tokenising sees whether its answers are identical
        answers, comparisons = distinct(answers, comparisons)
        if not comparisons:
            return Dropped(IDENTICAL)
    return PreferenceGroup(prompt, answers, comparisons, row.source, row.id, margin_fault)


def is_single_turn(prompt: list[Message], answers: tuple[list[Message], ...]) -> bool:
    """One question, and answers of one message; a system message does not count."""
    turns = [message for message in prompt if message["role"] != "system"]
    return len(turns) == 1 and all(len(answer) == 1 for answer in answers)


def margin_or_fault(row: Row) -> tuple[float | None, str]:
    """The margin of a pair that the row gives, and why it cannot be read or ""."""
    try:
        return margin_of(row), ""
    except DataError as error:  # no margin is needed unless training uses margins, which then refuses it
        return None, str(error)


def margin_of(row: Row) -> float | None:
    """The row's `margin`, else score_chosen - score_rejected, else None. A null counts as not given."""
    if row.given("margin"):
        return float(row.number("margin"))
    if row.given("score_chosen") and row.given("score_rejected"):
        return float(row.number("score_chosen")) - float(row.number("score_rejected"))
    return None


def has_probability(row: Row, source: "Source") -> bool:
    """Whether a row has a probability that its better answer is preferred. NaN is none: tables have it where nothing is
    given."""
    value = row.fields.get("probability")
    return row.given("probability") and value == value and "probability" not in source.ignore_columns


def probability_of(row: Row, remedy: str = "") -> float:
    try:
        probability = float(row.number("probability"))
    except DataError:
        probability = math.nan
    if not 0 <= probability <= 1:
        raise row.fault("field 'probability'", row.fields["probability"], f"a probability from 0 to 1{remedy}")
    return probability


def as_preferred(comparison: Comparison) -> Comparison | None:
    """The comparison with the answer as the better one that is preferred more often, whatever `better` named; None for
    a tie, which is a probability of 1/2 as far as a number of 32 bits can tell."""
    better, worse, margin, target, weight = comparison
    if abs(target - 0.5) < 1e-7:
        return None
    if target > 0.5:
        return comparison
    return Comparison(worse, better, None if margin is None else -margin, 1 - target, weight)


def is_as_far(difference: float | None, gap: float) -> bool:
    """Whether a difference is known to reach the gap. 4.3 - 4.1 does not fall short of 0.2 by its rounding."""
    return difference is not None and difference >= gap * (1 - 1e-9)


# ---- which answers -------------------------------------------------------------------------------------------------

Answers = tuple[list[Message], ...]
Comparisons = tuple[Comparison, ...]
Group = tuple[Answers, Comparisons]


def distinct(answers: Answers, comparisons: Comparisons) -> Group:
    """The answers that are compared, each of them once: one that repeats another is one with it, and the comparisons of
    both are its own, but for those between the two."""
    first: dict[str, int] = {}
    same = {place: first.setdefault(json.dumps(answer), place) for place, answer in enumerate(answers)}
    if len(first) < len(answers):
        merged = (each.among(same) for each in comparisons)
        comparisons = tuple(each for each in merged if each.better != each.worse)
    return that_are_compared(answers, comparisons)


def that_are_compared(answers: Answers, comparisons: Comparisons) -> Group:
    return those_at(sorted({place for each in comparisons for place in each[:2]}), answers, comparisons)


def those_at(places: list[int], answers: Answers, comparisons: Comparisons) -> Group:
    """The answers at these places, in this order, and the comparisons among them."""
    new = {old: number for number, old in enumerate(places)}
    among = tuple(each.among(new) for each in comparisons if each.better in new and each.worse in new)
    return tuple(answers[place] for place in places), among


def best_first(answers: Answers, comparisons: Comparisons, max_answers: int | None) -> Group:
    """The answers that are compared, at most max_answers, ordered by how much oftener they are better than worse."""
    surplus = [0] * len(answers)
    for each in comparisons:
        surplus[each.better] += 1
        surplus[each.worse] -= 1
    order = sorted(range(len(answers)), key=lambda place: -surplus[place])
    return that_are_compared(*those_at(chosen_of(order, max_answers, answers), answers, comparisons))


def chosen_of(ranked: list[Any], max_answers: int | None, content: Any) -> list[Any]:
    """The best, the worst and a random choice of the others, in their order, max_answers in all.

    The choice depends on the `content` of the group alone, so neither on its place in a file nor on the run's seed.
    """
    if max_answers is None or len(ranked) <= max_answers:
        return ranked
    between = sorted(random.Random(json.dumps(content)).sample(range(1, len(ranked) - 1), max_answers - 2))
    return [ranked[place] for place in (0, *between, len(ranked) - 1)]
