"""One line of a file to score: its conversations in, the same row with scores out."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hafrm_ds.data.files import parse_json
from hafrm_ds.data.formats import refuse_lost
from hafrm_ds.data.formats.answers import EARLIER, after, earlier_turns
from hafrm_ds.data.pairs import (
    MEDIA,
    MEDIA_NAMES,
    MediaError,
    Message,
    Row,
    assistant,
    names_in_words,
    parsed_messages,
    prompt_from_text,
)
from hafrm_ds.data.tool_calls import ToolRow, read_with_tools
from hafrm_ds.errors import DataError
from hafrm_ds.rewards.reward import Score
from hafrm_ds.saved.scorer import Conversation

BESIDE = (*EARLIER, "tools")
"""Columns that are read beside a prompt."""
SCORES = ("score", "scores")
"""Fields that the output adds, one of them to each row."""
ATTRIBUTES = "attributes"
"""What it adds besides for a model that has them: {name: value}, or with `scores` a list of these."""


@dataclass(frozen=True)
class ScoredRow:
    """A line of the input, on its way to a line of the output.

    fields: of the row; {} if it could not be read. field: "score", or "scores" for a row with several answers.
    conversations: those to score; empty for a row that cannot be read. error: why it cannot, else "".
    """

    fields: dict[str, Any]
    field: str
    conversations: list[Conversation]
    error: str = ""

    @classmethod
    def read(cls, line: bytes, place: str) -> "ScoredRow":
        """A line -> its row. What is wrong with it, named by `place` (FILE:LINE), is kept, not raised."""
        try:
            return cls.of(parse_json(line, place), place)
        except DataError as error:
            return cls({}, "score", [], str(error))

    @classmethod
    def of(cls, fields: Any, place: str) -> "ScoredRow":
        """As `read`, of a line that has been parsed."""
        if not isinstance(fields, dict):
            return cls({}, "score", [], f"{place}: is a {type(fields).__name__}, expected an object with fields")
        try:
            field, conversations = conversations_of(Row(fields, place, ""))
        except DataError as error:
            return cls(fields, "score", [], str(error))
        return cls(fields, field, conversations)

    def written(self, scores: list[Score], place: str, attributes: Sequence[str] = ()) -> tuple[bytes, str]:
        """As `scored`, with the row as a line of the output."""
        fields, error = self.scored(scores, place, attributes)
        return json_line(fields), error

    def scored(self, scores: list[Score], place: str, attributes: Sequence[str] = ()) -> tuple[dict[str, Any], str]:
        """The scores of its conversations, with attributes of these names -> (the row with them, what is wrong with
        the row or "").

        A row that cannot be scored has the score null, and says why in `score_error`.
        """
        error = self.error or next((f"{place}: {score.error}" for score in scores if score.error), "")
        # A file that was scored before: its scores are kept under another name, its errors are made up for.
        added = (*SCORES, ATTRIBUTES) if attributes else SCORES
        fields = {name: value for name, value in self.fields.items() if name not in (*added, "score_error")}
        fields |= {f"input_{name}": self.fields[name] for name in added if name in self.fields}
        if error:
            result: dict[str, Any] = {self.field: None, "score_error": error}
        else:
            result = {self.field: [score.value for score in scores]}
            if attributes:
                result[ATTRIBUTES] = [dict(zip(attributes, score.attributes, strict=True)) for score in scores]
            if self.field == "score":
                result = {name: values[0] for name, values in result.items()}
        return fields | result, error


def json_line(fields: dict[str, Any]) -> bytes:
    """A row as a line of a file."""
    # Half of a surrogate pair is no text, but may stand in a field that is only handed on.
    return json.dumps(fields, ensure_ascii=False).encode("utf-8", errors="backslashreplace") + b"\n"


def conversations_of(row: Row) -> tuple[str, list[list[Message]]]:
    """The name of the output field and the conversations of a row.

    A row has `messages`, or `prompt` (a text or messages) with `response` or with a list of `responses` (each a text or
    messages), and perhaps `system` and `history` before the prompt, and `tools`. What is null is not given. Where
    answers are given but no prompt, messages that end with the user are the prompt.

    Raises:
        DataError: naming the field.
    """
    return read_with_tools(row, read_conversations)


def read_conversations(row: Row) -> tuple[str, list[list[Message]]]:
    """As `conversations_of`; raises ToolCallsError for messages that only a `ToolRow` reads."""
    if media := [name for name in MEDIA_NAMES if row.fields.get(name)]:
        raise MediaError(f"{row.id}: {names_in_words(media)}: {MEDIA}")
    read: tuple[str, ...]
    answers = next((name for name in ("responses", "response") if row.given(name)), None)
    whole = after(earlier_turns(row), row.messages("messages")) if row.given("messages") else []
    if whole and not (answers and not row.given("prompt") and whole[-1]["role"] == "user"):
        field, conversations, read = "score", [whole], ("messages",)
    else:
        field = "scores" if answers == "responses" else "score"
        conversations, read = answered(row, answers), ("prompt", "messages")
    refuse_lost(row, (*read, *BESIDE), [message for conversation in conversations for message in conversation])
    return field, [opened(row, conversation) for conversation in conversations]


def opened(row: Row, messages: list[Message]) -> list[Message]:
    return row.opened(messages) if isinstance(row, ToolRow) else messages


def answered(row: Row, answers: str | None) -> list[list[Message]]:
    """Conversations of a prompt with its answers, which stand in the field `answers`."""
    if answers is None and "response" in row.fields:
        answers = "response"  # which is null, and is said to be
    if answers is None or not (row.given("messages") or "prompt" in row.fields):
        raise DataError(
            f"{row.id}: needs messages, or prompt with response or responses (fields: {names_in_words(row.fields)})"
        )
    prompt = read_prompt(row)
    if answers == "response":
        return [prompt + answer_of(row, answers)]
    responses = row.value(answers)
    if not isinstance(responses, list) or not responses:
        raise row.fault(f"field {answers!r}", responses, "a list of answers")
    each = [type(row)({f"responses[{n}]": response}, row.id, "") for n, response in enumerate(responses)]
    return [prompt + answer_of(answer, next(iter(answer.fields))) for answer in each]


def prompt_of(row: Row) -> list[Message]:
    """Its `prompt`, a text or messages (or, where there is none, its `messages`), after `system` and `history`."""
    return read_with_tools(row, lambda row: opened(row, read_prompt(row)))


def prompt_as_written(row: Row) -> Any:
    """Its prompt as it stands in the file; as `prompt_of` reads it where other columns belong to it."""
    prompt = prompt_of(row)
    is_whole = row.given("prompt") and not earlier_turns(row) and "tools" not in prompt[0]
    return row.fields["prompt"] if is_whole else prompt


def read_prompt(row: Row) -> list[Message]:
    """As `prompt_of`; raises ToolCallsError for messages that only a `ToolRow` reads."""
    field = "prompt" if row.given("prompt") or not row.given("messages") else "messages"
    value = parsed_messages(row.value(field))
    prompt = prompt_from_text(row.text(field))[0] if isinstance(value, str) else row.messages(field)
    return after(earlier_turns(row), prompt)


def answer_of(row: Row, field: str) -> list[Message]:
    return row.messages(field) if isinstance(row.value(field), list) else [assistant(row.text(field))]
