"""Preference pairs: the one form that a row of any format becomes, and the rows that they are read from.

The formats themselves are in `formats`. A row that cannot be read is a `DataError` that names file, row and field.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from hafrm_ds.errors import DataError

TOOL_CALLS = "has tool calls, which are not supported"
MEDIA = "has images or other media, which are not supported"

NO_TOOLS: tuple[Any, ...] = (None, [], {}, "", "[]", "{}", "null")
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
    margin_fault: str = ""
    """Why a margin that the row does give could not be read; "" where there is none or it could."""


@dataclass(frozen=True, slots=True)
class Deselected:
    """A sound row that is left out, and why: it holds no preference, or the source's options do not ask for it."""

    reason: str


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row that was asked for but is no usable pair, and why: it counts against data.max_dropped_share."""

    reason: str


Outcome = PreferencePair | Deselected | Dropped


class UnsupportedRowError(DataError):
    """A sound conversation holds what would be lost: rendered without it, it would be another one."""

    reason: str


class ToolCallsError(UnsupportedRowError):
    """A conversation calls tools, or may."""

    reason = TOOL_CALLS


class MediaError(UnsupportedRowError):
    """A message holds images, sound or the like."""

    reason = MEDIA


ROLES = {role: role for role in ("system", "user", "assistant", "developer")} | {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
"""Role as written, in lower case -> role as the chat templates know it."""
TOOL_ROLES = ("tool", "function", "function_call", "tool_call", "tool_response", "observation", "ipython")


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
            raise DataError(f"{self.id}: field {field!r} is missing (fields: {names_in_words(self.fields)})")
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
        try:
            if isinstance(value, int | float | Decimal) and not isinstance(value, bool) and math.isfinite(value):
                return float(value) if isinstance(value, Decimal) else value
        except OverflowError:  # a whole number beyond the largest float
            pass
        raise self.fault(f"field {field!r}", value, "a finite number")

    def given(self, field: str) -> bool:
        """Whether the row has a value here; null is none."""
        return self.fields.get(field) is not None

    def messages(self, field: str) -> list[Message]:
        """A list of messages, which may stand as JSON text; keys other than role and content are left out.

        Raises:
            UnsupportedRowError: a message calls tools or shows images, or the row has `tools`.
        """
        value = parsed_messages(self.value(field))
        if self.fields.get("tools") not in NO_TOOLS:
            raise ToolCallsError(f"{self.id}: {TOOL_CALLS} (field 'tools')")
        if not isinstance(value, list) or not value:
            raise self.fault(f"field {field!r}", value, "a list of messages")
        return [self.message(item, f"message {n} of field {field!r}") for n, item in enumerate(value, start=1)]

    def message(self, value: Any, place: str) -> Message:
        """An object with role and content, or with from and value as ShareGPT writes them."""
        if isinstance(value, dict) and (value.get("tool_calls") or value.get("function_call")):
            raise ToolCallsError(f"{self.id}: {place} {TOOL_CALLS}")
        if not isinstance(value, dict):
            raise self.fault(place, value, "an object with role and content")
        role_key, content_key = ("from", "value") if "role" not in value and "from" in value else ("role", "content")
        if not {role_key, content_key} <= value.keys():
            raise self.fault(place, value, "an object with role and content")
        written = self.as_text(value[role_key], f"{role_key} of {place}", expected="a text")
        role = ROLES.get(written) or ROLES.get(written.lower())
        if role is None:
            if written.lower() in TOOL_ROLES:
                raise ToolCallsError(f"{self.id}: {place} {TOOL_CALLS}")
            raise self.fault(f"{role_key} of {place}", written, f"one of {', '.join(ROLES)}")
        return {"role": role, "content": self.content(value[content_key], f"{content_key} of {place}")}

    def content(self, value: Any, place: str) -> str:
        """A text, or a list of parts that are texts, which are joined."""
        if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
            kinds = [part.get("type", "text") for part in value]
            if any(kind != "text" for kind in kinds) and all(isinstance(kind, str) for kind in kinds):
                raise MediaError(f"{self.id}: {place} {MEDIA}")
            value = "".join(self.as_text(part.get("text"), f"text of {place}", expected="a text") for part in value)
        return self.as_text(value, place, expected="a text (other kinds of content are not supported)")

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


def parsed_messages(value: Any) -> Any:
    """The list of messages that a JSON text spells; any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[{", "[ {", "[\n")):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    is_message = [isinstance(item, dict) and ("role" in item or "from" in item) for item in found]
    return found if is_message and all(is_message) else value


def in_words(value: Any) -> str:
    """A value of any type, short enough for a message."""
    match value:
        case None:
            return "null"
        case str():
            return f"the text {shortened(value)!r}"
        case list():
            return f"a list of {len(value)}"
        case dict():
            return f"an object with the keys {names_in_words(value)}"
        case bool():
            return "true" if value else "false"
        case int() if abs(value) >= 10**40:
            return "a whole number of more than 40 digits"
        case _:
            return f"the {type(value).__name__} {shortened(repr(value))}"


def shortened(text: str, length: int = 40) -> str:
    return text if len(text) <= length else text[:length] + "..."


def names_in_words(names: Iterable[Any]) -> str:
    """Names of fields, at most ten, each shortened."""
    shown = [shortened(str(name)) for name in names]
    return ", ".join(shown[:10]) + (f" and {len(shown) - 10} more" if len(shown) > 10 else "") or "(none)"


# ---- parts ---------------------------------------------------------------------------------------------------------


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


# A turn of a transcript begins at the start of the text or after an empty line; "Human:" inside a line is text.
TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def has_turns(value: Any) -> bool:
    return isinstance(value, str) and TURN.search(value) is not None


def transcript_turns(text: str) -> list[Message]:
    """Turns of a transcript as messages, white space around them removed; none if text stands before the first turn."""
    head, *parts = TURN.split(text)
    if head.strip():
        return []
    return [
        {"role": SPEAKERS[speaker], "content": content.strip()}
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
