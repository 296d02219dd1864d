"""Rows that rank or rate several answers, or compare them two by two: groups."""

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from hafrm_ds.data.formats.answers import after, answer_of, earlier_turns, prompt_of
from hafrm_ds.data.formats.labelled import has_label, inner_text
from hafrm_ds.data.formats.parts import (
    NO_PREFERENCE,
    TIE,
    UNCOMPARED,
    Made,
    Parts,
    as_preferred,
    best_first,
    chosen_of,
    probability_of,
)
from hafrm_ds.data.pairs import Comparison, Deselected, Message, Row, assistant, names_in_words, prompt_from_text, user
from hafrm_ds.errors import DataError

if TYPE_CHECKING:
    from hafrm_ds.data.sources import Source

FEWER = Deselected("fewer than two answers")
JUDGEMENTS = ("scores", "ranks", "comparisons")
"""Columns of which one says what is known of the answers in `responses`."""

Kind = Literal["scores", "votes", "ranks"]
"""What the values of answers are. The difference of two scores is a margin; of votes it only counts for min_score_gap;
of ranks it says nothing."""
Ranking = Literal["all", "best", "adjacent"]


# ---- values into comparisons ---------------------------------------------------------------------------------------


def compared(
    source: "Source", prompt: list[Message], rated: list[tuple[float, list[Message]]], kind: Kind = "scores"
) -> Made:
    """(value, answer) of each answer, higher better -> the group, its best answer first. Those of equal value are ties,
    and one that repeats another with its value is that."""
    if len(rated) < 2:
        return FEWER
    once = list({(value, json.dumps(answer)): (value, answer) for value, answer in rated}.values())
    ranked = sorted(once, key=lambda each: -each[0])
    ranked = chosen_of(ranked, source.max_answers, [prompt, ranked])
    values = [value for value, _ in ranked]
    comparisons = tuple(
        Comparison(better, worse, None if kind == "ranks" else values[better] - values[worse])
        for better, worse in ordered(values, source.ranking)
    )
    answers = tuple(answer for _, answer in ranked)
    return Parts(prompt, answers, comparisons, has_margins=kind == "scores") if comparisons else Deselected(TIE)


def ordered(values: Sequence[float], ranking: Ranking) -> Iterator[tuple[int, int]]:
    """Values in descending order -> (better, worse) places of those that are compared: all of different value; the best
    with each worse one; each with those of the next lower value."""
    for better, value in enumerate(values):
        if ranking == "best" and value < values[0]:
            return
        lower = [worse for worse in range(better + 1, len(values)) if values[worse] < value]
        for worse in lower:
            if ranking == "adjacent" and values[worse] < values[lower[0]]:
                break
            yield better, worse


# ---- values out of rows --------------------------------------------------------------------------------------------


def items_of(row: Row, field: str) -> list[Any]:
    items = row.value(field)
    if not isinstance(items, list):
        raise row.fault(f"field {field!r}", items, "a list")
    return items


def answer_at(row: Row, field: str, place: int) -> list[Message]:
    """The answer at a place of the list in `field`: a text, a message or messages."""
    name = f"{field}[{place}]"
    item = type(row)({name: row.fields[field][place]}, row.id, "", row.roles, row.mapped_roles)
    answer = answer_of(item, name, item.fields[name], strip=False)
    if answer[0]["role"] in ("system", "user"):
        raise row.fault(f"field {name!r}", item.fields[name], "the answer alone, without the prompt")
    return answer


def number_in(row: Row, name: str, value: Any) -> float | None:
    """A number, or None where it is null or NaN."""
    item = Row({name: value}, row.id, "")
    return float(item.number(name)) if has_label(item, name) else None


def objects_in(row: Row, field: str, answer: str, number: str) -> list[tuple[float, list[Message]]]:
    """Objects of `field` -> (their number, their answer); those without a number are left out."""
    items = items_of(row, field)
    texts = [inner_text(row, item, field, answer) for item in items]
    values = [number_in(row, f"{field}[{place}].{number}", item.get(number)) for place, item in enumerate(items)]
    return [(value, [assistant(text)]) for value, text in zip(values, texts) if value is not None]


def in_lists(row: Row, answers: str, numbers: str) -> list[tuple[float, list[Message]]]:
    """A list of answers and as many numbers -> (number, answer); those without a number are left out."""
    items, values = items_of(row, answers), items_of(row, numbers)
    if len(items) != len(values):
        raise row.fault(f"field {numbers!r}", values, f"{len(items)} numbers, one for each of {answers!r}")
    found = [number_in(row, f"{numbers}[{place}]", value) for place, value in enumerate(values)]
    return [(value, answer_at(row, answers, place)) for place, value in enumerate(found) if value is not None]


def lowest_first(ranked: list[tuple[float, list[Message]]]) -> list[tuple[float, list[Message]]]:
    """Ranks, of which the lowest is the best, as values of which the highest is."""
    return [(-rank, answer) for rank, answer in ranked]


# ---- formats -------------------------------------------------------------------------------------------------------


def of_nectar(row: Row, source: "Source") -> Made:
    """Nectar: a transcript as prompt, and answers with their rank, the lowest the best."""
    ranked = lowest_first(objects_in(row, "answers", "answer", "rank"))
    return compared(source, prompt_from_text(row.text("prompt"))[0], ranked, "ranks")


def of_ultrafeedback(row: Row, source: "Source") -> Made:
    """UltraFeedback as it was published: an instruction, and completions with an overall_score."""
    rated = objects_in(row, "completions", "response", "overall_score")
    return compared(source, [user(row.text("instruction"))], rated)


def of_stack_exchange(row: Row, source: "Source") -> Made:
    """Stack Exchange preferences: a question, and answers with a score made of their votes."""
    return compared(source, [user(row.text("question"))], objects_in(row, "answers", "text", "pm_score"), "votes")


def of_lists(row: Row, source: "Source", question: str, answers: str, numbers: str) -> Made:
    """A question, a list of answers and as many numbers, higher better, of which some may be null."""
    return compared(source, prompt_of(row, question)[0], in_lists(row, answers, numbers))


def of_best_of_n(row: Row, source: "Source") -> Made:
    """What best_of_n.py writes into ranked.jsonl: a prompt and its candidates, each with the score of the gold scorer.
    The model's own score is no preference of anybody."""
    candidates = items_of(row, "candidates")
    lacking = [place for place, each in enumerate(candidates) if not isinstance(each, dict) or "gold" not in each]
    if lacking:
        place = f"field 'candidates[{lacking[0]}]'"
        raise row.fault(place, candidates[lacking[0]], "a candidate with gold, as best_of_n.py --gold writes it")
    lists = {name: [each.get(name) for each in candidates] for name in ("response", "gold")}
    unfolded = type(row)(row.fields | lists, row.id, "", row.roles, row.mapped_roles)
    return compared(source, prompt_of(row, "prompt")[0], in_lists(unfolded, "response", "gold"))


def of_groups(row: Row, source: "Source") -> Made:
    """A prompt, its responses, and scores (higher better, some may be null), ranks (whole numbers, the lowest the best)
    or comparisons of two at a time."""
    given = [name for name in JUDGEMENTS if row.fields.get(name) not in (None, "", [])]
    given = [name for name in given if name not in source.ignore_columns]
    if len(given) > 1:
        raise DataError(
            f"{row.id}: {names_in_words(given)} are given, of which one is read: name the others in ignore_columns of "
            "the source"
        )
    if not given:
        return Deselected(NO_PREFERENCE)
    prompt = after(earlier_turns(row), prompt_of(row, "prompt")[0])
    if given == ["comparisons"]:
        return of_comparisons(row, source, prompt)
    rated = in_lists(row, "responses", given[0])
    if given == ["scores"]:
        return compared(source, prompt, rated)
    if uneven := [rank for rank, _ in rated if not rank.is_integer()]:
        raise row.fault("a rank in field 'ranks'", uneven[0], "a whole number")
    return compared(source, prompt, lowest_first(rated), "ranks")


def of_comparisons(row: Row, source: "Source", prompt: list[Message]) -> Made:
    """A prompt, its responses and what is known of two of them at a time; those that are not compared are left out."""
    responses = items_of(row, "responses")
    if len(responses) < 2:
        return FEWER
    read = [comparison_at(row, place, len(responses)) for place in range(len(items_of(row, "comparisons")))]
    comparisons = [each for each in read if each is not None]
    if not comparisons:
        return Deselected(TIE)
    places = {old: new for new, old in enumerate(sorted({place for each in comparisons for place in each[:2]}))}
    answers = tuple(answer_at(row, "responses", place) for place in places)
    group = best_first(answers, tuple(each.among(places) for each in comparisons), source.max_answers)
    return Parts(prompt, *group) if group[1] else Deselected(UNCOMPARED)


def comparison_at(row: Row, place: int, num_answers: int) -> Comparison | None:
    """The comparison at a place of the list in `comparisons`: [better, worse], which are positions of `responses` from
    0, or {better, worse} with probability, margin or weight; None for a tie.

    The probability is that `better` is preferred: below 1/2 the other one is the better.
    """
    value, name = row.fields["comparisons"][place], f"comparisons[{place}]"
    if isinstance(value, list) and len(value) == 2:
        value = dict(zip(("better", "worse"), value))
    if not isinstance(value, dict) or not value.keys() >= {"better", "worse"}:
        raise row.fault(f"field {name!r}", value, "[better, worse] or an object with better and worse")
    if unknown := value.keys() - {"better", "worse", "probability", "margin", "weight"}:
        raise DataError(
            f"{row.id}: field {name!r} has {names_in_words(sorted(map(str, unknown)))}, expected better, worse, "
            "probability, margin and weight"
        )
    item = Row(value, f"{row.id}: {name}", "")
    better, worse = (position_in(item, field, num_answers) for field in ("better", "worse"))
    if better == worse:
        raise DataError(f"{item.id} compares answer {better} with itself")
    target = probability_of(item) if item.given("probability") else 1.0
    margin = float(item.number("margin")) if item.given("margin") else None
    weight = float(item.number("weight")) if item.given("weight") else 1.0
    if not 1e-30 <= weight <= 1e30:
        raise item.fault("field 'weight'", value["weight"], "a number above 0 (from 1e-30 to 1e30)")
    return as_preferred(Comparison(better, worse, margin, target, weight))


def position_in(row: Row, field: str, num_answers: int) -> int:
    position = float(row.number(field))
    if not position.is_integer() or not 0 <= position < num_answers:
        raise row.fault(f"field {field!r}", row.fields[field], f"a position from 0 to {num_answers - 1}")
    return int(position)


# ---- trees ---------------------------------------------------------------------------------------------------------


def of_tree(row: Row, source: "Source") -> list[Made]:
    """OpenAssistant: a tree of messages, in which the replies of assistants to the same prompt are ranked from 0, the
    best. Every prompt with two ranked replies gives a group, with the path to it as the conversation."""
    return [compared(source, path, ranked, "ranks") for path, ranked in ranked_replies(row)] or [FEWER]


def ranked_replies(row: Row) -> Iterator[tuple[list[Message], list[tuple[float, list[Message]]]]]:
    """(conversation, [(value, answer)]) of every message of a user that has replies with a rank."""
    todo: list[tuple[list[Message], Any]] = [([], row.value("prompt"))]
    while todo:
        before, node = todo.pop()
        text = inner_text(row, node, "prompt", "text")
        path = [*before, {"role": row.role(node.get("role"), "a message of field 'prompt'"), "content": text}]
        replies = node.get("replies") or []
        if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
            raise row.fault("replies of a message of field 'prompt'", replies, "a list of messages")
        replies = [reply for reply in replies if not reply.get("deleted")]
        todo += [(path, reply) for reply in reversed(replies)]
        ranks = [number_in(row, f"replies[{place}].rank", reply.get("rank")) for place, reply in enumerate(replies)]
        ranked = [
            (-rank, [assistant(inner_text(row, reply, "replies", "text"))])
            for rank, reply in zip(ranks, replies)
            if rank is not None and reply.get("role") == "assistant"
        ]
        if len(ranked) > 1 and path[-1]["role"] == "user":
            yield path, ranked
