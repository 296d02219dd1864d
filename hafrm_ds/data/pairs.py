"""Groups of answers: the one form that a row of any format becomes, and the rows that they are read from.

The formats themselves are in `formats`. A row that cannot be read is a `DataError` that names file, row and field.
"""

import ast
import json
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, NamedTuple

from hafrm_ds.errors import DataError

TOOL_CALLS = "has tool calls, which are not supported"
MEDIA = "has images or other media, which are not supported"

NO_TOOLS: tuple[Any, ...] = (None, [], {}, "", "[]", "{}", "null")
"""What stands in the column `tools` of a row without any: a list, or its JSON."""

Message = dict[str, Any]
"""{"role": ..., "content": ...}, both text; of a conversation with tools more (`tool_calls`)."""


class Comparison(NamedTuple):
    """Of two answers of a group, one is better.

    better, worse: their positions among the answers of the group.
    margin: by how much, in the units of the data; None where the data does not say.
    target: the probability that `better` is preferred, above 1/2 and at most 1.
    weight: how much it counts beside the other comparisons of its group, above 0.
    """

    better: int
    worse: int
    margin: float | None = None
    target: float = 1.0
    weight: float = 1.0

    def among(self, places: dict[int, int]) -> "Comparison":
        """The same where the answers have other positions: old -> new."""
        return self._replace(better=places[self.better], worse=places[self.worse])


OF_A_PAIR = (Comparison(0, 1),)
"""The chosen answer, which stands first, is better than the rejected one."""


@dataclass(frozen=True, slots=True)
class PreferenceGroup:
    """A prompt, its answers, and which of them are better than which. A pair has the chosen and the rejected answer."""

    prompt: list[Message]
    """The conversation so far, of any number of turns, with its system message if it has one."""
    answers: tuple[list[Message], ...]
    """Two or more. Each is the messages after the prompt: as a rule one message of the assistant."""
    comparisons: tuple[Comparison, ...]
    """At least one, and none between answers that are equally good."""
    source: str
    """Name that results are grouped by: the row's own `source` field, else the name of the data source."""
    id: str
    """FILE:ROW with rows counted from 1, or hub/id[split]:ROW. For messages to the user."""
    margin_fault: str = ""
    """Why a margin that the row does give could not be read; "" where there is none or it could."""
    attributes: tuple[dict[str, float], ...] = ()
    """Of each answer, name -> value, of what the row rates besides; empty where it rates nothing."""


@dataclass(frozen=True, slots=True)
class Deselected:
    """A sound row that is left out, and why: it holds no preference, or the source's options do not ask for it."""

    reason: str


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row that was asked for but is no usable group, and why: it counts against data.max_dropped_share."""

    reason: str


Outcome = PreferenceGroup | Deselected | Dropped


class ToolCallsError(DataError):
    """A conversation calls tools, or may: to be read by `tool_calls`, where tools are expected."""


class MediaError(DataError):
    """A message holds images, sound or the like."""


ROLES = {role: role for role in ("system", "user", "assistant", "developer")} | {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
"""Role as written, in lower case -> role as the chat templates know it."""
CALL_ROLES = ("function_call", "tool_call")
"""Roles of messages whose content is a call, in JSON."""
TOOL_ROLES = ("tool", "function", "tool_response", "observation", "ipython", *CALL_ROLES)
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message under which its reasoning may stand beside the content."""
MEDIA_NAMES = frozenset(("image", "images", "audio", "audios", "video", "videos"))
"""Keys of a message, and columns of a row, that hold what is no text."""


class Cell(str):
    """A text of a CSV file, where a number, a flag and what is not given are texts too."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Row:
    """A row as it was read. The methods give one field in the type that was asked for, or raise DataError."""

    fields: dict[str, Any]
    id: str
    source_name: str
    """The group's source where the row has no `source` field of its own."""
    roles: Mapping[str, str] = field(default_factory=lambda: ROLES)
    """Role as written -> role as the chat templates know it."""
    mapped_roles: dict[str, str] = field(default_factory=dict)
    """Those of `roles` that were met under another name."""

    @property
    def source(self) -> str:
        own = self.fields.get("source")
        return valid_text(str(own)) if isinstance(own, str) and own else self.source_name

    def value(self, field: str) -> Any:
        if field not in self.fields:
            raise DataError(f"{self.id}: field {field!r} is missing (fields: {names_in_words(self.fields)})")
        return self.fields[field]

    def text(self, field: str) -> str:
        return self.as_text(self.value(field), f"field {field!r}", expected="a text")

    def flag(self, field: str) -> bool:
        value = self.value(field)
        if isinstance(value, Cell) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if not isinstance(value, bool):
            raise self.fault(f"field {field!r}", value, "true or false")
        return value

    def number(self, field: str) -> float:
        value = self.value(field)
        try:
            if isinstance(value, int | float | Decimal | Cell) and not isinstance(value, bool):
                number = float(value)
                if math.isfinite(number):
                    return value if isinstance(value, int) else number
        except (OverflowError, ValueError):  # a whole number beyond the largest float; a cell that holds words
            pass
        raise self.fault(f"field {field!r}", value, "a finite number")

    def given(self, field: str) -> bool:
        """Whether the row has a value here; null is none, nor is an empty cell."""
        value = self.fields.get(field)
        return value is not None and not (isinstance(value, Cell) and not value)

    def messages(self, field: str) -> list[Message]:
        """A list of messages, which may stand as JSON text; keys that are no part of the conversation are left out.

        Raises:
            ToolCallsError, MediaError: a message calls tools, or shows images: rendered without, it would be another.
        """
        value = parsed_messages(self.value(field))
        if not isinstance(value, list) or not value:
            raise self.fault(f"field {field!r}", value, "a list of messages")
        return [self.message(item, f"message {n} of field {field!r}") for n, item in enumerate(value, start=1)]

    def message(self, value: Any, place: str) -> Message:
        """An object with role and content, or with from and value as ShareGPT writes them. Reasoning beside the content
        is put in front of it between <think> marks, where the templates of reasoning models look for it."""
        if not isinstance(value, dict):
            raise self.fault(place, value, "an object with role and content")
        if value.get("tool_calls") or value.get("function_call"):
            raise ToolCallsError(f"{self.id}: {place} {TOOL_CALLS}")
        role_key, content_key = ("from", "value") if "role" not in value and "from" in value else ("role", "content")
        if role_key not in value or content_key not in value:
            raise self.fault(place, value, "an object with role and content")
        role = self.role(value[role_key], place)
        content = self.content(value[content_key], place)
        if len(value) > 2:
            if any(value.get(key) for key in MEDIA_NAMES):
                raise MediaError(f"{self.id}: {place} {MEDIA}")
            if value.get("tools"):
                raise ToolCallsError(f"{self.id}: {place} {TOOL_CALLS}")
            for key in REASONING_KEYS:
                if value.get(key):
                    reasoning = self.as_text(value[key], f"{key} of {place}", expected="a text").strip()
                    return {"role": role, "content": f"<think>\n{reasoning}\n</think>\n\n{content}"}
        return {"role": role, "content": content}

    def role(self, written: Any, place: str) -> str:
        """A role as the chat templates know it."""
        role = self.roles.get(written) if isinstance(written, str) else None
        if role is None:
            name = self.as_text(written, f"role of {place}", expected="a text").lower()
            role = self.roles.get(name)
            if role is None and name in TOOL_ROLES:
                raise ToolCallsError(f"{self.id}: {place} {TOOL_CALLS}")
            if role is None:
                raise self.fault(
                    f"role of {place}", written, f"one of {', '.join(self.roles)} (others: roles of the source)"
                )
        if role != written:
            self.mapped_roles[" ".join(shortened(written).split())] = role
        return role

    def content(self, value: Any, place: str) -> str:
        """A text, or a list of parts that are texts, which are joined."""
        if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
            kinds = [part.get("type", "text") for part in value]
            if any(kind != "text" for kind in kinds) and all(isinstance(kind, str) for kind in kinds):
                raise MediaError(f"{self.id}: {place} {MEDIA}")
            value = "".join(self.as_text(part.get("text"), f"text of {place}", expected="a text") for part in value)
        if isinstance(value, str) and value.isascii():
            return str(value)
        return self.as_text(value, f"content of {place}", expected="a text (other kinds of content are not supported)")

    def as_text(self, value: Any, place: str, expected: str) -> str:
        if not isinstance(value, str):
            raise self.fault(place, value, expected)
        if value.isascii():
            return str(value)
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{self.id}: {place} holds half of a surrogate pair at character {error.start + 1}, which is no text"
            ) from None
        return str(value)

    def fault(self, place: str, value: Any, expected: str) -> DataError:
        return DataError(f"{self.id}: {place} is {in_words(value)}, expected {expected}")


MESSAGES_AS_TEXT = re.compile(r"""\s*(?:\[\s*)?\{\s*["'](?:role|content|from|value)["']\s*:""")


def parsed_messages(value: Any) -> Any:
    """The messages, or the message, that a text spells in JSON or as Python prints them; any other value as it is."""
    if not isinstance(value, str) or not MESSAGES_AS_TEXT.match(value):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        try:
            with warnings.catch_warnings(action="ignore"):
                found = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return value
    messages = found if isinstance(found, list) else [found]
    is_message = [isinstance(item, dict) and ("role" in item or "from" in item) for item in messages]
    return found if is_message and all(is_message) else value


def valid_text(text: str) -> str:
    """The text with every half of a surrogate pair replaced: for names and messages that are written on."""
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()


def in_words(value: Any) -> str:
    """A value of any type, short enough for a message."""
    match value:
        case None:
            return "null"
        case str():
            return f"the text {shortened(str(value))!r}"
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
    """Names of fields, at most ten and not much more than 120 characters of them."""
    all_names = [shortened(valid_text(str(name)), 60) for name in names]
    shown = all_names[:10]
    while len(shown) > 1 and len(", ".join(shown)) > 120:
        shown.pop()
    more = len(all_names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "") or "(none)"


# ---- parts ---------------------------------------------------------------------------------------------------------


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


# A turn of a transcript begins at the start of the text, after an empty line, or with ### (OpenAssistant's guanaco);
# "Human:" inside a line is text.
TURN = re.compile(r"(?:\n\r?\n|###\s?)(Human|Assistant):")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def has_turns(value: Any) -> bool:
    if not isinstance(value, str) or ("Human:" not in value and "Assistant:" not in value):  # as most texts
        return False
    return TURN.search("\n\n" + value.lstrip()) is not None


def transcript_turns(text: str) -> list[Message]:
    """Turns of a transcript as messages, white space around them removed; text before the first turn is a system
    message. None without turns."""
    if "Human:" not in text and "Assistant:" not in text:
        return []
    head, *parts = TURN.split("\n\n" + text.lstrip())
    head = head.strip().removeprefix("System:").strip()
    turns = [
        {"role": SPEAKERS[speaker], "content": content.strip()}
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]
    return [{"role": "system", "content": head}, *turns] if head and turns else turns


def starts_with_user(turns: list[Message]) -> bool:
    """Whether the first turn, after a system message if there is one, is the user's."""
    return [turn["role"] for turn in turns if turn["role"] != "system"][:1] == ["user"]


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
