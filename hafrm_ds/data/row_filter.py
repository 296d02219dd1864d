"""The row filter of a source (`pairs.jsonl?split=train`): which rows are looked at, and errors when it leaves none."""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from hafrm_ds.data.pairs import names_in_words
from hafrm_ds.errors import DataError


class RowFilter:
    """Tells which rows have the wanted field values, and remembers what it saw for the message when none has."""

    def __init__(self, where: Mapping[str, Any]):
        self.where = {name: as_text(value) for name, value in where.items()}
        self.description = "row filter " + "&".join(f"{name}={value}" for name, value in self.where.items())
        self._values: dict[str, Counter[str]] = {name: Counter() for name in where}
        self._fields: dict[str, None] = {}  # a set that keeps the order
        self._total = self._passed = 0

    def passes(self, fields: dict[str, Any]) -> bool:
        """Whether a row is wanted."""
        self._total += 1
        if not self.where:
            self._passed += 1
            return True
        self._fields |= dict.fromkeys(fields)
        for name, counter in self._values.items():
            if name in fields:
                counter[as_text(fields[name])] += 1
        wanted = all(as_text(fields.get(name)) == value for name, value in self.where.items())
        self._passed += wanted
        return wanted

    def check_some_passed(self, path: str) -> None:
        """Raise DataError if there were no rows, or none that passed; says what values there are."""
        if not self._total:
            raise DataError(f"{path}: holds no rows")
        for name, counter in self._values.items():
            if not counter:
                known = names_in_words(self._fields)
                raise DataError(f"{path}: no row has the field {name!r} of the row filter (fields: {known})")
        if not self._passed:
            seen = "; ".join(f"{name} is {most_common(counter)}" for name, counter in self._values.items())
            raise DataError(f"{path}: {self.description} leaves none of {self._total:,} rows ({seen})")


def as_text(value: Any) -> str:
    """A field as the row filter compares it: true, false and null as in JSON, whole numbers without a fraction."""
    match value:
        case str():
            return value
        case None | bool():
            return json.dumps(value)
        case float() if value.is_integer():
            return str(int(value))
        case _:
            return str(value)


def most_common(counter: Counter[str]) -> str:
    shown = [f"{value[:40]!r} {count:,} times" for value, count in counter.most_common(5)]
    return ", ".join(shown) + (", ..." if len(counter) > 5 else "")
