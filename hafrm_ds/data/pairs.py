"""Preference pairs: the one form that a row of any format becomes before anything else is done with it.

A format is a pure function from a row to a `PreferencePair`; to `Deselected` when the row is sound but holds no
preference (a tie) or is not one that the source asks for; or to `Dropped` when the row was asked for but is no usable
pair. A row that cannot be read is a `DataError` that names file, row and field.
"""

import math
import os.path
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hafrm_ds.errors import DataError

if TYPE_CHECKING:
    from hafrm_ds.data.sources import Source

FORMAT_VERSION = 3
"""Part of the cache key of read data: raise it whenever a format makes another outcome of the same row."""

# Outcomes that several formats share.
TIE = "tie"
MORE_TURNS = "more than one turn"
NO_PROMPT = "no common prompt"
TOOL_CALLS = "has tool calls, which are not supported"

NO_TOOLS: tuple[Any, ...] = (None, [], "", "[]")
"""What stands in the column `tools` of a row without any: a list, or its JSON."""

Message = dict[str, str]
"""{"role": ..., "content": ...}, both text."""


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """One comparison: after `prompt`, the answer `chosen` was preferred to `rejected`."""

    prompt: list[Message]
    """The conversation so far, of any number of turns, with its system message if it has one."""
    chosen: list[Message]
    """The messages after the prompt: as a rule one message of the assistant."""
    rejected: list[Message]
    margin: float | None
    """By how much the chosen answer is better, in the units of the data; None where the data does not say."""
    source: str
    """Name that results are grouped by: the row's own `source` field, else the name of the data source."""
    id: str
    """FILE:ROW with rows counted from 1, or hub/id[split]:ROW. For messages to the user."""


@dataclass(frozen=True, slots=True)
class Deselected:
    """A sound row that is left out, and why: it holds no preference, or the source's options do not ask for it."""

    reason: str


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row that was asked for but is no usable pair, and why: it counts against data.max_dropped_share."""

    reason: str


Outcome = PreferencePair | Deselected | Dropped


class ToolCallsError(DataError):
    """A conversation calls tools, or may: rendered without them it would be another one."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row as it was read. The methods give one field in the type that was asked for, or raise DataError."""

    fields: dict[str, Any]
    id: str
    source_name: str
    """The pair's source where the row has no `source` field of its own."""

    @property
    def source(self) -> str:
        own = self.fields.get("source")
        return own if isinstance(own, str) and own else self.source_name

    def value(self, field: str) -> Any:
        if field not in self.fields:
            raise DataError(f"{self.id}: field {field!r} is missing (fields: {', '.join(self.fields) or 'none'})")
        return self.fields[field]

    def text(self, field: str) -> str:
        return self.as_text(self.value(field), f"field {field!r}", expected="a text")

    def flag(self, field: str) -> bool:
        value = self.value(field)
        if not isinstance(value, bool):
            raise self.fault(f"field {field!r}", value, "true or false")
        return value

    def number(self, field: str) -> float:
        value = self.value(field)
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise self.fault(f"field {field!r}", value, "a finite number")
        return value

    def messages(self, field: str) -> list[Message]:
        """A list of messages; keys other than role and content are left out.

        Raises:
            ToolCallsError: a message calls tools, or the row has `tools` for them.
        """
        value = self.value(field)
        if self.fields.get("tools") not in NO_TOOLS:
            raise ToolCallsError(f"{self.id}: {TOOL_CALLS} (field 'tools')")
        if not isinstance(value, list) or not value:
            raise self.fault(f"field {field!r}", value, "a list of messages")
        return [self.message(item, f"message {n} of field {field!r}") for n, item in enumerate(value, start=1)]

    def message(self, value: Any, place: str) -> Message:
        if isinstance(value, dict) and (value.get("tool_calls") or value.get("function_call")):
            raise ToolCallsError(f"{self.id}: {place} {TOOL_CALLS}")
        if not isinstance(value, dict) or not {"role", "content"} <= value.keys():
            raise self.fault(place, value, "an object with role and content")
        return {
            "role": self.as_text(value["role"], f"role of {place}", expected="a text"),
            "content": self.as_text(
                value["content"], f"content of {place}", expected="a text (other kinds of content are not supported)"
            ),
        }

    def as_text(self, value: Any, place: str, expected: str) -> str:
        if not isinstance(value, str):
            raise self.fault(place, value, expected)
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{self.id}: {place} holds half of a surrogate pair at character {error.start + 1}, which is no text"
            ) from None
        return value

    def fault(self, place: str, value: Any, expected: str) -> DataError:
        return DataError(f"{self.id}: {place} is {in_words(value)}, expected {expected}")


def in_words(value: Any) -> str:
    """A value of any type, short enough for a message."""
    match value:
        case None:
            return "null"
        case str():
            return f"the text {value if len(value) <= 40 else value[:40] + '...'!r}"
        case list():
            return f"a list of {len(value)}"
        case dict():
            return f"an object with the keys {', '.join(map(str, value)) or '(none)'}"
        case bool():
            return "true" if value else "false"
        case _:
            return f"the {type(value).__name__} {value!r}"


# ---- formats -------------------------------------------------------------------------------------------------------


def from_explicit_prompt(row: Row, source: "Source") -> Outcome:
    """prompt, chosen, rejected, each a text or messages.

    An answer is a text, the messages after the prompt, or a whole conversation. Whole conversations (UltraFeedback
    binarized) are read as such, and the prompt must be part of their common beginning.
    """
    if isinstance(row.value("prompt"), str):
        prompt, from_transcript = prompt_from_text(row.text("prompt"))
    else:
        prompt, from_transcript = row.messages("prompt"), False
    answers = []
    for field in ("chosen", "rejected"):
        if isinstance(row.value(field), list):
            answers.append(row.messages(field))
        else:
            text = row.as_text(row.value(field), f"field {field!r}", expected="a text or a list of messages")
            answers.append([assistant(text.strip() if from_transcript else text)])

    chosen, rejected = answers
    repeats_prompt = [is_conversation(answer, prompt) for answer in answers]
    if not any(repeats_prompt):
        return make_pair(row, source, prompt, chosen, rejected)
    if not all(repeats_prompt):
        which, other = ("chosen", "rejected") if repeats_prompt[0] else ("rejected", "chosen")
        raise DataError(f"{row.id}: field {which!r} is a whole conversation, but field {other!r} is an answer alone")
    length = common_prefix_length(chosen, rejected)
    if not contains(chosen[:length], prompt):
        raise DataError(
            f"{row.id}: fields 'chosen' and 'rejected' are whole conversations, but the prompt is not part of their "
            f"common beginning ({length} messages)"
        )
    return make_pair(row, source, chosen[:length], chosen[length:], rejected[length:])


def is_conversation(answer: list[Message], prompt: list[Message]) -> bool:
    return answer[: len(prompt)] == prompt or answer[0]["role"] in ("system", "user")


def contains(conversation: list[Message], part: list[Message]) -> bool:
    """Whether `part` stands somewhere in `conversation`; white space around contents does not count."""

    def bare(messages: list[Message]) -> list[tuple[str, str]]:
        return [(message["role"], message["content"].strip()) for message in messages]

    whole, wanted = bare(conversation), bare(part)
    return any(whole[start : start + len(wanted)] == wanted for start in range(len(whole) - len(wanted) + 1))


def from_safe_rlhf(row: Row, source: "Source") -> Outcome:
    """PKU-SafeRLHF and BeaverTails: two responses, the number (0 or 1) of the better and of the safer, and whether each
    is safe. `source.label` says which number decides, also between one safe and one unsafe response."""
    if source.exactly_one_safe and row.flag("is_response_0_safe") == row.flag("is_response_1_safe"):
        return Deselected("not exactly one safe answer")
    preferred = row.number("better_response_id" if source.label == "helpful" else "safer_response_id")
    if preferred not in (0, 1):
        return Deselected(TIE)
    responses = [assistant(row.text("response_0")), assistant(row.text("response_1"))]
    chosen, rejected = responses[int(preferred)], responses[1 - int(preferred)]
    return make_pair(row, source, [user(row.text("prompt"))], [chosen], [rejected])


def from_alpaca_farm(row: Row, source: "Source") -> Outcome:
    """AlpacaFarm: an instruction with an optional input, two outputs, and the number (1 or 2) of the preferred one."""
    preferred = row.number("preference")
    if preferred not in (1, 2):
        return Deselected(TIE)
    prompt = row.text("instruction")
    if row.fields.get("input") is not None and row.text("input"):
        prompt += "\n\n" + row.text("input")
    outputs = [assistant(row.text("output_1")), assistant(row.text("output_2"))]
    return make_pair(row, source, [user(prompt)], [outputs[int(preferred) - 1]], [outputs[2 - int(preferred)]])


def from_arena(row: Row, source: "Source") -> Outcome:
    """Chatbot Arena: two whole conversations and the winner: model_a, model_b or some kind of tie."""
    winner = row.text("winner")
    if "tie" in winner or winner == "both_bad":
        return Deselected(TIE)
    if winner not in ("model_a", "model_b"):
        raise row.fault("field 'winner'", winner, "model_a, model_b or a tie")
    a, b = row.messages("conversation_a"), row.messages("conversation_b")
    return split_conversations(row, source, a, b) if winner == "model_a" else split_conversations(row, source, b, a)


def from_implicit_messages(row: Row, source: "Source") -> Outcome:
    """chosen and rejected are whole conversations: the prompt is what they begin with alike."""
    return split_conversations(row, source, row.messages("chosen"), row.messages("rejected"))


def from_transcripts(row: Row, source: "Source") -> Outcome:
    """Anthropic HH: chosen and rejected are transcripts, each turn begun by an empty line and "Human:" or "Assistant:".

    Consecutive turns of one speaker become one message. `source.single_turn` counts the turns before that, as the
    paper's code does.
    """
    chosen, rejected = transcript_turns(row.text("chosen")), transcript_turns(row.text("rejected"))
    if not (starts_with_user(chosen) and starts_with_user(rejected)):
        return Dropped("transcript does not start with a Human turn")
    if source.single_turn and (len(chosen) > 2 or len(rejected) > 2):
        return Deselected(MORE_TURNS)
    return split_conversations(row, source, merge_turns(chosen), merge_turns(rejected))


def from_implicit_text(row: Row, source: "Source") -> Outcome:
    """chosen and rejected are plain texts: the prompt is what they begin with alike, in whole words."""
    chosen, rejected = row.text("chosen"), row.text("rejected")
    length = common_words_length(chosen, rejected)
    prompt = chosen[:length].strip()
    if not prompt:
        return Dropped(NO_PROMPT)
    answers = ([assistant(text[length:].strip())] for text in (chosen, rejected))
    return make_pair(row, source, [user(prompt)], *answers)


def common_words_length(a: str, b: str) -> int:
    """Length of the longest common prefix of two texts that cuts no word of either."""
    length = len(os.path.commonprefix([a, b]))  # noqa: RUF071 (characters, not paths, are meant)

    def in_word(text: str) -> bool:
        return length < len(text) and text[length - 1].isalnum() and text[length].isalnum()

    while length and (in_word(a) or in_word(b)):
        length -= 1
    return length


@dataclass(frozen=True, slots=True)
class Format:
    """A known row format: the columns that announce it and the function that reads it."""

    columns: tuple[str, ...]
    convert: Callable[[Row, "Source"], Outcome]
    recognises: Callable[[dict[str, Any]], bool] = lambda fields: True
    """Tells formats with the same columns apart by the values of a row."""


FORMATS: dict[str, Format] = {
    "explicit_prompt": Format(("prompt", "chosen", "rejected"), from_explicit_prompt),
    "safe_rlhf": Format(("prompt", "response_0", "response_1"), from_safe_rlhf),
    "alpaca_farm": Format(("instruction", "output_1", "output_2", "preference"), from_alpaca_farm),
    "arena": Format(("conversation_a", "conversation_b", "winner"), from_arena),
    "implicit_messages": Format(
        ("chosen", "rejected"), from_implicit_messages, lambda fields: isinstance(fields["chosen"], list)
    ),
    "transcripts": Format(("chosen", "rejected"), from_transcripts, lambda fields: has_turns(fields["chosen"])),
    "implicit_text": Format(("chosen", "rejected"), from_implicit_text),
}
"""By name, in the order in which `detect_format` tries them."""


def detect_format(row: Row) -> str:
    """Name of the format of a row, from its columns and, where these leave a choice, its values.

    Raises:
        DataError: for columns of no known format; lists them and the known formats.
    """
    for name, known in FORMATS.items():
        if row.fields.keys() >= set(known.columns) and known.recognises(row.fields):
            return name
    formats = "\n".join(f"  {name}: {', '.join(known.columns)}" for name, known in FORMATS.items())
    raise DataError(
        f"{row.id}: the columns {', '.join(row.fields) or '(none)'} are of no known format. "
        f"Known formats and their columns:\n{formats}"
    )


def read_pair(row: Row, format_name: str, source: "Source") -> Outcome:
    """A row in a known format -> its pair, or why there is none.

    Raises:
        DataError: for a field that is missing, null or of the wrong type.
    """
    try:
        return FORMATS[format_name].convert(row, source)
    except ToolCallsError:
        return Dropped(TOOL_CALLS)


# ---- parts ---------------------------------------------------------------------------------------------------------


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def split_conversations(row: Row, source: "Source", chosen: list[Message], rejected: list[Message]) -> Outcome:
    length = common_prefix_length(chosen, rejected)
    return make_pair(row, source, chosen[:length], chosen[length:], rejected[length:])


def common_prefix_length(a: list[Message], b: list[Message]) -> int:
    """Number of messages that both conversations begin with, at least one message short of either end."""
    length = 0
    while length < min(len(a), len(b)) - 1 and a[length] == b[length]:
        length += 1
    return length


def make_pair(
    row: Row, source: "Source", prompt: list[Message], chosen: list[Message], rejected: list[Message]
) -> Outcome:
    """The pair with what every format may carry beside it, margin and source; or why there is none."""
    if not prompt:
        return Dropped(NO_PROMPT)
    if source.single_turn and not is_single_turn(prompt, chosen, rejected):
        return Deselected(MORE_TURNS)
    if any(answer[-1]["role"] in ("system", "user") for answer in (chosen, rejected)):
        return Dropped("does not end with an answer")
    return PreferencePair(prompt, chosen, rejected, margin_of(row), row.source, row.id)


def is_single_turn(prompt: list[Message], chosen: list[Message], rejected: list[Message]) -> bool:
    """One question, one answer on either side; a system message does not count."""
    turns = [message for message in prompt if message["role"] != "system"]
    return len(turns) == len(chosen) == len(rejected) == 1


def margin_of(row: Row) -> float | None:
    """The row's `margin`, else score_chosen - score_rejected, else None. A null counts as not given."""
    if row.fields.get("margin") is not None:
        return float(row.number("margin"))
    if row.fields.get("score_chosen") is not None and row.fields.get("score_rejected") is not None:
        return float(row.number("score_chosen") - row.number("score_rejected"))
    return None


# A turn of a transcript begins at the start of the text or after an empty line; "Human:" inside a line is text.
TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}


def has_turns(value: Any) -> bool:
    return isinstance(value, str) and TURN.search(value) is not None


def transcript_turns(text: str) -> list[Message]:
    """Turns of a transcript as messages, white space around them removed; none if text stands before the first turn."""
    head, *parts = TURN.split(text)
    if head.strip():
        return []
    return [
        {"role": ROLES[speaker], "content": content.strip()}
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def starts_with_user(turns: list[Message]) -> bool:
    return bool(turns) and turns[0]["role"] == "user"


def merge_turns(turns: list[Message]) -> list[Message]:
    """Consecutive turns of one speaker become one message, an empty line between them."""
    merged: list[Message] = []
    for turn in turns:
        if merged and merged[-1]["role"] == turn["role"]:
            merged[-1] = {"role": turn["role"], "content": f"{merged[-1]['content']}\n\n{turn['content']}".strip()}
        else:
            merged.append(turn)
    return merged


def prompt_from_text(text: str) -> tuple[list[Message], bool]:
    """A prompt that is a text -> (messages, whether it was a transcript that ends with an open "Assistant:")."""
    turns = transcript_turns(text)
    if starts_with_user(turns) and turns[-1] == assistant(""):
        return merge_turns(turns[:-1]), True
    return [user(text)], False
