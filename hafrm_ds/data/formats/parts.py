"""The parts that a format makes of a row, and the preference pair that they become."""

from typing import TYPE_CHECKING, NamedTuple

from hafrm_ds.data.pairs import Deselected, Dropped, Message, Outcome, PreferencePair, Row
from hafrm_ds.errors import DataError

if TYPE_CHECKING:
    from hafrm_ds.data.sources import Source

# Outcomes that several formats share.
TIE = "tie"
NO_PREFERENCE = "no preference is given"
MORE_TURNS = "more than one turn"
NO_PROMPT = "no common prompt"


class Parts(NamedTuple):
    """A pair without what every format may carry beside it."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    margin: float | None = None
    """What the format itself says; None leaves it to the row's `margin` or scores."""


Made = Parts | Deselected | Dropped


def split_conversations(chosen: list[Message], rejected: list[Message]) -> Parts:
    """Two whole conversations: the prompt is what they begin with alike."""
    length = common_prefix_length(chosen, rejected)
    return Parts(chosen[:length], chosen[length:], rejected[length:])


def common_prefix_length(a: list[Message], b: list[Message]) -> int:
    """Number of messages that both conversations begin with, at least one message short of either end."""
    length = 0
    while length < min(len(a), len(b)) - 1 and a[length] == b[length]:
        length += 1
    return length


def finished(made: Made, row: Row, source: "Source") -> Outcome:
    """The pair, with margin and source; or why there is none."""
    if not isinstance(made, Parts):
        return made
    prompt, chosen, rejected, margin = made
    if not any(message["role"] not in ("system", "developer") for message in prompt):
        return Dropped(NO_PROMPT)
    if source.single_turn and not is_single_turn(prompt, chosen, rejected):
        return Deselected(MORE_TURNS)
    if any(answer[-1]["role"] != "assistant" for answer in (chosen, rejected)):
        return Dropped("does not end with an answer")
    if margin is not None:
        return PreferencePair(prompt, chosen, rejected, margin, row.source, row.id)
    try:
        return PreferencePair(prompt, chosen, rejected, margin_of(row), row.source, row.id)
    except DataError as error:  # no margin is needed unless training uses margins, which then refuses it
        return PreferencePair(prompt, chosen, rejected, None, row.source, row.id, str(error))


def is_single_turn(prompt: list[Message], chosen: list[Message], rejected: list[Message]) -> bool:
    """One question, one answer on either side; a system message does not count."""
    turns = [message for message in prompt if message["role"] != "system"]
    return len(turns) == len(chosen) == len(rejected) == 1


def margin_of(row: Row) -> float | None:
    """The row's `margin`, else score_chosen - score_rejected, else None. A null counts as not given."""
    if row.given("margin"):
        return float(row.number("margin"))
    if row.given("score_chosen") and row.given("score_rejected"):
        return float(row.number("score_chosen")) - float(row.number("score_rejected"))
    return None
