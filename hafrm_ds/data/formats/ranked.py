"""Rows that rank several answers: they give several pairs."""

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from hafrm_ds.data.formats.answers import prompt_of
from hafrm_ds.data.formats.labelled import has_label, inner_text
from hafrm_ds.data.formats.parts import TIE, Made, Parts
from hafrm_ds.data.pairs import Deselected, Message, Row, assistant, prompt_from_text, user

if TYPE_CHECKING:
    from hafrm_ds.data.sources import Source

FEWER = Deselected("fewer than two answers")


def compared(
    source: "Source", prompt: list[Message], ranked: list[tuple[float, str]], *, with_margin: bool
) -> list[Made]:
    """(value, answer), higher better -> the best answer against each other or, where the source says adjacent, each
    against the next. Those of equal value are ties."""
    if len(ranked) < 2:
        return [FEWER]
    ranked = sorted(ranked, key=lambda item: -item[0])  # stable: of equals the first is the best
    comparisons = pairwise(ranked) if source.ranking == "adjacent" else ((ranked[0], other) for other in ranked[1:])
    return [
        Parts(prompt, [assistant(better)], [assistant(worse)], value - other if with_margin else None)
        if other < value
        else Deselected(TIE)
        for (value, better), (other, worse) in comparisons
    ]


def items_of(row: Row, field: str) -> list[Any]:
    items = row.value(field)
    if not isinstance(items, list):
        raise row.fault(f"field {field!r}", items, "a list of answers")
    return items


def answers_with(row: Row, field: str, answer: str, number: str) -> list[tuple[float, str]]:
    """Objects of `field` -> (their number, their answer); those without a number are left out."""
    items = items_of(row, field)
    texts = [inner_text(row, item, field, answer) for item in items]
    return [(value, text) for value, text in zip(numbers_of(row, field, items, number), texts) if value is not None]


def numbers_of(row: Row, field: str, items: list[Any], number: str) -> list[float | None]:
    """The number that each object of `field` holds, or None where it is null or NaN."""
    rows = [Row({number: item.get(number)}, f"{row.id}: {field}", "") for item in items]
    return [float(found.number(number)) if has_label(found, number) else None for found in rows]


def of_nectar(row: Row, source: "Source") -> list[Made]:
    """Nectar: a transcript as prompt, and answers with their rank, the lowest the best."""
    ranked = [(-rank, answer) for rank, answer in answers_with(row, "answers", "answer", "rank")]
    return compared(source, prompt_from_text(row.text("prompt"))[0], ranked, with_margin=False)


def of_ultrafeedback(row: Row, source: "Source") -> list[Made]:
    """UltraFeedback as it was published: an instruction, and completions with an overall_score."""
    ranked = answers_with(row, "completions", "response", "overall_score")
    return compared(source, [user(row.text("instruction"))], ranked, with_margin=True)


def of_stack_exchange(row: Row, source: "Source") -> list[Made]:
    """Stack Exchange preferences: a question, and answers with a score made of their votes."""
    ranked = answers_with(row, "answers", "text", "pm_score")
    return compared(source, [user(row.text("question"))], ranked, with_margin=False)


def of_lists(row: Row, source: "Source", question: str, answers: str, numbers: str) -> list[Made]:
    """A question, a list of answers and as many numbers, higher better, of which some may be null."""
    texts, values = items_of(row, answers), items_of(row, numbers)
    if len(texts) != len(values):
        raise row.fault(f"field {numbers!r}", values, f"{len(texts)} numbers, one for each of {answers!r}")
    found = numbers_of(row, numbers, [{"number": value} for value in values], "number")
    ranked = [
        (number, row.as_text(text, f"an item of field {answers!r}", expected="a text"))
        for number, text in zip(found, texts)
        if number is not None
    ]
    return compared(source, prompt_of(row, question)[0], ranked, with_margin=True)


# ---- trees ---------------------------------------------------------------------------------------------------------


def of_tree(row: Row, source: "Source") -> list[Made]:
    """OpenAssistant: a tree of messages, in which the replies of assistants to the same prompt are ranked from 0, the
    best. Every prompt with two ranked replies gives pairs, with the path to it as the conversation."""
    made = [pair for path, ranked in ranked_replies(row) for pair in compared(source, path, ranked, with_margin=False)]
    return made or [FEWER]


def ranked_replies(row: Row) -> Iterator[tuple[list[Message], list[tuple[float, str]]]]:
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
        ranks = numbers_of(row, "replies", replies, "rank")
        ranked = [
            (-rank, inner_text(row, reply, "replies", "text"))
            for rank, reply in zip(ranks, replies)
            if rank is not None and reply.get("role") == "assistant"
        ]
        if len(ranked) > 1 and path[-1]["role"] == "user":
            yield path, ranked
