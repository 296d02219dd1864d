"""Files of rows to be read, and what was read of them in short."""

import gzip
import json
from collections import Counter
from pathlib import Path

import datasets
import pytest

from hafrm_ds.errors import DataError


def rows_of(count, **fields):
    return [{"prompt": f"p{n}", "chosen": "a", "rejected": "b"} | fields for n in range(count)]


def write_lines(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_rows(path, rows):
    """Rows in the format that the name of the file says; "saved" and "splits" are folders of save_to_disk."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.endswith(".jsonl"):
        Path(path).write_text("\n" + lines)
    elif path.endswith(".json.gz"):
        Path(path).write_bytes(gzip.compress(json.dumps(rows, indent=1).encode("utf-8-sig")))
    elif path.endswith(".jsonl.gz"):
        Path(path).write_bytes(gzip.compress(lines.encode()))
    elif path.endswith(".json"):
        Path(path).write_text("\ufeff" + json.dumps(rows), encoding="utf-8")
    elif path.endswith(".parquet"):
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif path == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(path)
    elif path == "splits":
        data = datasets.Dataset.from_list(rows)
        datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(path)


def outcomes(pairs):
    """Why rows are not used -> how many; the pairs that are used stand under the empty text."""
    return Counter(left_out or dropped for left_out, dropped in zip(pairs["deselected"][:], pairs["dropped"][:]))


def prompts(pairs):
    return [row["prompt"][0]["content"] for row in pairs if not row["deselected"] and not row["dropped"]]


def margins(pairs):
    return [comparison["margin"] for (comparison,) in pairs["comparisons"]]


def error_of(read, *given, **options):
    with pytest.raises(DataError) as caught:
        read(*given, **options)
    return str(caught.value)
