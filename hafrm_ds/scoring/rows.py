"""One line of a file to score: its conversations in, the same row with scores out."""

import json
import math
from dataclasses import dataclass
from typing import Any

from hafrm_ds.data.files import parse_json
from hafrm_ds.data.pairs import Message, Row, assistant, prompt_from_text
from hafrm_ds.data.tokenization import PromptWithResponses
from hafrm_ds.errors import DataError
from hafrm_ds.saved.scorer import Scorer


@dataclass(frozen=True)
class ScoredRow:
    """A line of the input, on its way to a line of the output.

    fields: of the row; {} if it could not be read. field: "score", or "scores" for a row with several answers.
    conversations: encoded; empty for a row that cannot be scored. error: why it cannot, else "".
    """

    fields: dict[str, Any]
    field: str
    conversations: list[PromptWithResponses]
    error: str = ""

    @classmethod
    def read(cls, line: bytes, place: str, model: Scorer) -> "ScoredRow":
        """A line -> its row. What is wrong with it, named by `place` (FILE:LINE), is kept, not raised."""
        fields: Any = {}
        try:
            fields = parse_json(line, place)
            if not isinstance(fields, dict):
                found, fields = fields, {}
                raise DataError(f"{place}: is a {type(found).__name__}, expected an object with fields")
            field, conversations = conversations_of(Row(fields, place, ""))
        except DataError as error:
            return cls(fields, "score", [], str(error))
        try:
            return cls(fields, field, [model.encode(conversation) for conversation in conversations])
        except DataError as error:
            return cls(fields, field, [], f"{place}: {error}")

    def written(self, scores: list[float], place: str) -> tuple[bytes, str]:
        """The scores of its conversations -> (line of the output, what is wrong with the row or "").

        A row that cannot be scored has the score null, and says why in `score_error`.
        """
        error = self.error
        if not error and not all(map(math.isfinite, scores)):
            error = f"{place}: the score is not finite"
        if error:
            result: dict[str, Any] = {self.field: None, "score_error": error}
        else:
            result = {self.field: scores if self.field == "scores" else scores[0]}
        return json_line(self.fields | result), error


def json_line(fields: dict[str, Any]) -> bytes:
    """A row as a line of a file."""
    # Half of a surrogate pair is no text, but may stand in a field that is only handed on.
    return json.dumps(fields, ensure_ascii=False).encode("utf-8", errors="backslashreplace") + b"\n"


def conversations_of(row: Row) -> tuple[str, list[list[Message]]]:
    """The name of the output field and the conversations of a row.

    A row has `messages`, or `prompt` (a text or messages) with `response` or with a list of `responses` (each a text or
    messages).

    Raises:
        DataError: naming the field.
    """
    if "messages" in row.fields:
        return "score", [row.messages("messages")]
    if "prompt" not in row.fields or not row.fields.keys() & {"response", "responses"}:
        raise DataError(
            f"{row.id}: needs messages, or prompt with response or responses (fields: "
            f"{', '.join(row.fields) or 'none'})"
        )
    prompt = prompt_of(row)
    if "responses" not in row.fields:
        return "score", [prompt + answer_of(row, "response")]
    responses = row.value("responses")
    if not isinstance(responses, list) or not responses:
        raise row.fault("field 'responses'", responses, "a list of answers")
    answers = [Row({f"responses[{n}]": response}, row.id, "") for n, response in enumerate(responses)]
    return "scores", [prompt + answer_of(answer, next(iter(answer.fields))) for answer in answers]


def prompt_of(row: Row) -> list[Message]:
    """Its `prompt`, a text or messages."""
    if isinstance(row.value("prompt"), str):
        return prompt_from_text(row.text("prompt"))[0]
    return row.messages("prompt")


def answer_of(row: Row, field: str) -> list[Message]:
    return row.messages(field) if isinstance(row.value(field), list) else [assistant(row.text(field))]
