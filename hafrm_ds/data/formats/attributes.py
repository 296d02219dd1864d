"""Attributes of answers: what a row rates besides which of them is better, such as helpfulness from 0 to 4."""

import json
from dataclasses import replace
from typing import Any

from hafrm_ds.data.formats.parts import Made, Parts
from hafrm_ds.data.formats.ranked import answer_at, items_of, number_in
from hafrm_ds.data.pairs import Outcome, PreferenceGroup, Row, valid_text
from hafrm_ds.errors import DataError

ATTRIBUTES = "attributes"
"""The column, a list with one object {name: number or null} for each answer."""


def with_attributes(outcome: Outcome, made: Made, row: Row, listed: str | None) -> Outcome:
    """A group with the attributes of its answers, which it may have in another order than the row.

    Args:
        made: what the group was made of.
        listed: the column that lists the answers; "" in rows of pairs, whose answers are chosen and rejected; None in
            rows that have their answers elsewhere.
    """
    if not (isinstance(outcome, PreferenceGroup) and isinstance(made, Parts)):
        return outcome
    if listed is None:
        raise DataError(
            f"{row.id}: field {ATTRIBUTES!r} is read of pairs and beside responses or generations, not in rows of this "
            "format: name it in ignore_columns of the source"
        )
    values, number = row.value(ATTRIBUTES), len(items_of(row, listed)) if listed else 2
    if not isinstance(values, list) or len(values) != number:
        expected = f"a list of {number} objects, one for each answer (else name it in ignore_columns of the source)"
        raise row.fault(f"field {ATTRIBUTES!r}", values, expected)
    known: dict[str, dict[str, float]] = {}
    for place, value in enumerate(values):
        if found := attributes_of(row, f"{ATTRIBUTES}[{place}]", value):
            answer = answer_at(row, listed, place) if listed else made.answers[place]
            known.setdefault(json.dumps(answer), found)  # of equal answers those of the first
    of_answers = tuple(known.get(json.dumps(answer), {}) for answer in outcome.answers)
    return replace(outcome, attributes=of_answers if any(of_answers) else ())


def attributes_of(row: Row, name: str, value: Any) -> dict[str, float]:
    """The numbers of an object; those that are null or NaN are left out."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise row.fault(f"field {name!r}", value, "an object of names and numbers")
    numbers = {valid_text(str(key)): number_in(row, f"{name}.{key}", each) for key, each in value.items()}
    return {key: number for key, number in numbers.items() if number is not None}
