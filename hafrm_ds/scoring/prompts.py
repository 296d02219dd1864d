"""A file of prompts, for all that lets a policy answer."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hafrm_ds.data.files import file_table
from hafrm_ds.data.formats import refuse_lost
from hafrm_ds.data.pairs import Message, Row
from hafrm_ds.errors import DataError
from hafrm_ds.scoring.rows import BESIDE, prompt_of


class Prompt(NamedTuple):
    """row: as it stands in the file. messages: what is asked."""

    row: Row
    messages: list[Message]

    @property
    def key(self) -> str:
        return key_of(self.messages)


def key_of(prompt: Sequence[Message]) -> str:
    """Equal for prompts that differ in the white space around their messages at most."""
    return json.dumps([{**each, "content": (each["content"] or "").strip()} for each in prompt])


def read_prompts(option: str, file: Path) -> list[Prompt]:
    """The prompts of a file in their order.

    Args:
        option: that names the file, as it is written, for messages.

    Raises:
        DataError: naming a row that has no prompt, or fields that would be lost; or the file is empty.
    """
    prompts = []
    for number, fields in file_table(file, str(file)).rows():
        row = Row(fields, f"{file}:{number}", "")
        if not isinstance(fields, dict):
            raise row.fault("the row", fields, "an object with a prompt")
        prompts.append(Prompt(row, prompt_of(row)))
        refuse_lost(row, ("prompt", "messages", *BESIDE), prompts[-1].messages)
    if not prompts:
        raise DataError(f"{option} {file} is empty")
    return prompts
