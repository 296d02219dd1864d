"""A reward that can be verified: the share of fields of an answer that are exactly as they are known to be.

The answer holds a JSON object, or lines `name: value`. A field that is missing or other than known counts nothing.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hafrm_ds.data.files import file_table
from hafrm_ds.data.pairs import Row, parsed_messages, prompt_from_text
from hafrm_ds.errors import DataError, ModelError
from hafrm_ds.rewards.endpoint import json_object
from hafrm_ds.rewards.reward import Loader, Score
from hafrm_ds.saved.scorer import Conversation


@dataclass(frozen=True)
class FieldMatch:
    """What is known of the answers to each prompt: its key -> field -> value. Needs no loading.

    content: SHA-256 of the file.
    """

    file: Path
    known: dict[str, dict[str, str]]
    content: str

    @classmethod
    def open(cls, file: Path) -> "FieldMatch":
        """Read a file whose rows have `prompt` (a text or messages) and `fields` (an object).

        Raises:
            ModelError: it cannot be read, or a row is not so, or rows contradict each other.
        """
        try:
            rows = [Row(fields, f"{file}:{number}", "") for number, fields in file_table(file, str(file)).rows()]
            known: dict[str, dict[str, str]] = {}
            for row in rows:
                is_text = isinstance(parsed_messages(row.value("prompt")), str)
                prompt = prompt_from_text(row.text("prompt"))[0] if is_text else row.messages("prompt")
                fields = row.value("fields")
                if not isinstance(fields, dict) or not fields:
                    raise row.fault("field 'fields'", fields, "an object with the fields that are known")
                spoken = {str(name): spelled(value) for name, value in fields.items()}
                if known.setdefault(key_of(prompt), spoken) != spoken:
                    raise DataError(f"{row.id}: an earlier row has the same prompt and other fields")
            return cls(file, known, hashlib.sha256(file.read_bytes()).hexdigest())
        except (DataError, OSError) as error:
            raise ModelError(str(error)) from error

    def identity(self) -> dict[str, Any]:
        return {"fields": self.content}

    def load(self, loader: Loader) -> "FieldMatch":
        return self

    def scores(self, conversations: Sequence[Conversation]) -> list[Score]:
        return [self.of(conversation) for conversation in conversations]

    def of(self, conversation: Conversation) -> Score:
        known = self.known.get(key_of(conversation[:-1]))
        if known is None:
            return Score.none(f"{self.file.name} has no row of this prompt")
        text = conversation[-1].get("content") or ""
        found = json_object(text) or lines_of(text)
        spoken = {str(name): spelled(value) for name, value in found.items()}
        return Score(sum(spoken.get(name) == value for name, value in known.items()) / len(known))


def key_of(prompt: Conversation) -> str:
    return json.dumps([[message["role"], (message.get("content") or "").strip()] for message in prompt])


def lines_of(text: str) -> dict[str, str]:
    """Name -> value of its lines `name: value`."""
    parts = (line.partition(":") for line in text.split("\n"))
    return {name.strip(): value for name, colon, value in parts if colon and name.strip()}


def spelled(value: Any) -> str:
    """A value as it is compared: a text without white space around it, anything else as JSON."""
    return value.strip() if isinstance(value, str) else json.dumps(value, sort_keys=True)
