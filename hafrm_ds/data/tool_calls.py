"""Conversations that call tools: read from rows, kept in tables of texts, handed to a chat template.

Such a conversation has a key `tools` in its first message: the schemas of its tools, [] where none are given. Messages
may have `tool_calls`, and those of the role `tool` a `name` and a `tool_call_id`. All other conversations are texts.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

from hafrm_ds.data.pairs import (
    CALL_ROLES,
    NO_TOOLS,
    TOOL_ROLES,
    Message,
    Outcome,
    PreferenceGroup,
    Row,
    ToolCallsError,
)

Made = TypeVar("Made")
AS_JSON = "json"
"""Role of the message that stands for a conversation with tools where only texts are kept."""


# ---- from rows -----------------------------------------------------------------------------------------------------


def read_with_tools(row: Row, read: Callable[[Row], Made], ignored: Iterable[str] = ()) -> Made:
    """Read a row, as a `ToolRow` if its column `tools` or its messages ask for that. `ignored` names columns that are
    not to be read."""
    if "tools" in ignored or row.fields.get("tools") in NO_TOOLS:
        try:
            return read(row)
        except ToolCallsError:
            pass
    return read(ToolRow.of(row, ignored))


def conversation_of(messages: Any, place: str) -> list[Message]:
    """Messages from Python, read as those of a row. Raises DataError, which names them by `place`."""

    def read(row: Row) -> list[Message]:
        found = row.messages("messages")
        return row.opened(found) if isinstance(row, ToolRow) else found

    return read_with_tools(Row({"messages": messages}, place, ""), read)


class ToolRow(Row):
    """A row whose messages may call tools, and which may have a column `tools`. Rows without tools become none, so that
    reading them costs no more."""

    @classmethod
    def of(cls, row: Row, ignored: Iterable[str] = ()) -> "ToolRow":
        """The same row. `ignored` names columns that are not to be read."""
        fields = row.fields | {"tools": None} if "tools" in ignored else row.fields
        return cls(fields, row.id, row.source_name, row.roles, row.mapped_roles)

    def message(self, value: Any, place: str) -> Message:
        """As `Row.message`, with `tool_calls` (one `function_call` is such a call, and so is a message of a role like
        function_call), `tools`, and of a tool's result `name` and `tool_call_id`."""
        if not isinstance(value, dict):
            return super().message(value, place)
        role_key, content_key = ("from", "value") if "role" not in value and "from" in value else ("role", "content")
        role, content = value.get(role_key), value.get(content_key)
        calls = value.get("tool_calls") or value.get("function_call")
        if not calls and isinstance(role, str) and role not in self.roles and role.lower() in CALL_ROLES:
            calls, content = content, ""
        is_result = not calls and role_key in value and self.role(role, place) == "tool"
        if content is None and (calls or is_result):
            content = ""
        elif is_result and not isinstance(content, str) and not is_parts(content):
            content = json.dumps(self.given_in(content, f"content of {place}", "a text or JSON"), ensure_ascii=False)
        plain = {name: item for name, item in value.items() if name not in ("tool_calls", "function_call", "tools")}
        if content is not None:
            plain[content_key] = content
        message = super().message(plain, place)
        if calls:
            message["tool_calls"] = self.calls(calls, f"tool_calls of {place}")
        if is_result:
            texts = {name: value[name] for name in ("name", "tool_call_id") if value.get(name) is not None}
            message |= {name: self.as_text(text, f"{name} of {place}", "a text") for name, text in texts.items()}
        if value.get("tools"):
            message["tools"] = self.schemas(value["tools"], f"tools of {place}")
        return message

    def role(self, written: Any, place: str) -> str:
        """As `Row.role`; a call is the assistant's, and whatever gives a result is `tool`."""
        name = written.lower() if isinstance(written, str) else ""
        if name not in TOOL_ROLES or written in self.roles or name in self.roles:
            return super().role(written, place)
        role = "assistant" if name in CALL_ROLES else "tool"
        if role != written:
            self.mapped_roles[written] = role
        return role

    def calls(self, value: Any, place: str) -> list[dict[str, Any]]:
        """Calls in the form of transformers: [{"type": "function", "function": {"name": ..., "arguments": {...}}}]. The
        arguments, which are often JSON in a text, become an object, as templates expect it."""
        expected = "calls of functions, each with a name"
        calls = []
        for call in self.objects(value, place, expected):
            function = call.get("function", call if "name" in call else None)
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise self.fault(place, value, expected)
            given = function.get("arguments", function.get("parameters", {}))
            arguments = parsed(given)
            function = function | {"arguments": arguments if isinstance(arguments, dict) else given}
            calls.append((call if "function" in call else {}) | {"type": "function", "function": function})
        return self.as_json(calls, place, expected)

    def schemas(self, value: Any, place: str) -> list[dict[str, Any]]:
        """The schemas of tools: a list of objects, or one; each, or all, may be JSON in a text."""
        expected = "a list of JSON schemas (else name tools in ignore_columns of the source)"
        return self.objects(value, place, expected)

    def objects(self, value: Any, place: str, expected: str) -> list[dict[str, Any]]:
        """A list of objects, or one object, of which each or all may be JSON in a text."""
        found = parsed(self.given_in(value, place, expected))
        items = [parsed(item) for item in (found if isinstance(found, list) else [found]) if item is not None]
        if not all(isinstance(item, dict) for item in items):
            raise self.fault(place, value, expected)
        return self.as_json(items, place, expected)

    def as_json(self, value: Any, place: str, expected: str) -> Any:
        """The value, which must be what JSON can say."""
        try:
            json.dumps(value, ensure_ascii=False).encode()
            list(values_in(value))
        except (TypeError, ValueError, RecursionError):
            raise self.fault(place, value, expected) from None
        return value

    def given_in(self, value: Any, place: str, expected: str) -> Any:
        """The value, which must be what JSON can say, without the keys that are null: in tables each object has those
        of all others too. What is null inside of a text stays."""
        return without_nulls(self.as_json(value, place, expected))

    def opened(self, messages: list[Message]) -> list[Message]:
        """The messages, with the tools of the row in the first of them."""
        tools = [] if self.fields.get("tools") in NO_TOOLS else self.schemas(self.fields["tools"], "field 'tools'")
        own = [message["tools"] for message in messages if "tools" in message]
        bare = [{name: item for name, item in message.items() if name != "tools"} for message in messages]
        return [bare[0] | {"tools": tools or (own[0] if own else [])}, *bare[1:]]

    def opened_group(self, outcome: Outcome) -> Outcome:
        return replace(outcome, prompt=self.opened(outcome.prompt)) if isinstance(outcome, PreferenceGroup) else outcome


def is_parts(content: Any) -> bool:
    """Whether a content is a list of parts, each with its type."""
    return isinstance(content, list) and all(isinstance(part, dict) and "type" in part for part in content)


def parsed(value: Any) -> Any:
    """What a text says in JSON, where it does; any other value as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


# ---- in tables of texts --------------------------------------------------------------------------------------------


def spelled(messages: list[Message]) -> list[Message]:
    return [{"role": AS_JSON, "content": json.dumps(messages, ensure_ascii=False)}]


def read_back(prompt: list[Message], answers: list[list[Message]]) -> tuple[list[Message], list[list[Message]]]:
    """Prompt and answers; where they are `spelled`, as they were before."""
    if prompt[0]["role"] != AS_JSON:
        return prompt, answers
    return json.loads(prompt[0]["content"]), [json.loads(answer[0]["content"]) for answer in answers]


# ---- in templates --------------------------------------------------------------------------------------------------

TOOLS, CALLS, RESULTS = KINDS = ("tools", "tool calls", "tool messages")


def template_input(messages: list[Message]) -> tuple[list[Message], dict[str, Any]]:
    """A conversation with tools as transformers takes it: (messages, the option tools)."""
    first = {name: item for name, item in messages[0].items() if name != "tools"}
    return [first, *messages[1:]], {"tools": messages[0]["tools"]} if messages[0]["tools"] else {}


def pieces_of_tools(messages: list[Message]) -> Iterator[tuple[str, str]]:
    """(text, kind) of what a template must write of the tools of a conversation: their names and what they do, and the
    name and the arguments of every call."""
    for tool in messages[0]["tools"]:
        function = tool["function"] if isinstance(tool.get("function"), dict) else tool
        yield from ((text, TOOLS) for text in values_in([function.get("name"), function.get("description")]))
    for message in messages:
        for call in message.get("tool_calls", ()):
            function = call["function"]
            yield from ((text, CALLS) for text in values_in([function["name"], function["arguments"]]))


def values_in(value: Any) -> Iterator[str]:
    """The texts and numbers of a nested value; true, false and null are spelled in too many ways."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from values_in(item)
    elif isinstance(value, str):
        if text := value.strip():
            yield text
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)


def as_written(piece: str, text: str) -> str:
    """A piece as `text` holds it, which may be as JSON spells it."""
    spellings = (piece, json.dumps(piece, ensure_ascii=False)[1:-1], json.dumps(piece)[1:-1])
    return next((each for each in spellings if each in text), piece)
