"""Prepared pairs on disk: what is counted of a set once, and the rows themselves, mapped by every process that uses
them, so that a host holds one copy however many processes it runs.

    CACHE/prepared-KEY/COLUMN.npy     lengths and keys of the pairs
    CACHE/prepared-KEY/kept.arrow     their places among the tokenised rows, unless all of these are pairs
    CACHE/prepared-KEY/facts.json     the report, the fingerprint of the pairs, the files of the tokenised rows

Legend: P pairs.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets.table import MemoryMappedTable

from hafrm_ds.data.report import DataReport
from hafrm_ds.data.tokenization import TokenizedPair
from hafrm_ds.durability import whole_folder

FACTS, KEPT = "facts.json", "kept.arrow"
LENGTHS = ("prompt", "chosen", "rejected")
COLUMNS = (*LENGTHS, "keys", "prompt_keys", "uncut_lengths")
ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
PAIR_COLUMNS = (*ID_COLUMNS, "margin", "source", "id")


@dataclass(frozen=True)
class PreparedPairs:
    """The usable pairs of a set, in reading order. All arrays are mapped and cannot be written to."""

    pairs: datasets.Dataset
    """Columns prompt_ids, chosen_ids, rejected_ids (int32 lists), margin (float32 or None), source, id."""
    lengths: dict[str, np.ndarray]
    """prompt, chosen, rejected -> [P] int64 tokens."""
    keys: np.ndarray
    """[P, 2] KEY_DTYPE, content keys of chosen and rejected response."""
    prompt_keys: np.ndarray
    """[P] KEY_DTYPE, keys of the prompts before any truncation: pairs of one prompt share it, whatever was left."""
    uncut_lengths: np.ndarray
    """int64 tokens of the longer conversation, not truncated, for all pairs that could be rendered: also for those that
    were dropped as too long."""
    report: DataReport
    fingerprint: str
    """Hash of the pairs in order: tokens and margins."""

    @classmethod
    def open(cls, folder: Path) -> "PreparedPairs | None":
        """Map what `save_pairs` has written; None if it is not there, or not whole any more."""
        try:
            facts = json.loads((folder / FACTS).read_text())
            columns = {name: mapped(folder / f"{name}.npy") for name in COLUMNS}
            rows = datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in facts["files"]])
            rows = rows.select_columns(list(PAIR_COLUMNS))
            if (folder / KEPT).exists():
                places = MemoryMappedTable.from_file(str(folder / KEPT))
                rows = datasets.Dataset(rows.data, indices_table=places, fingerprint=folder.name)
            report = DataReport.from_json(facts["report"])
            fingerprint = facts["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowInvalid):
            return None
        lengths = {name: columns.pop(name) for name in LENGTHS}
        pairs = cls(rows, lengths, **columns, report=report, fingerprint=fingerprint)
        return pairs if {len(rows)} == {len(pairs.keys), *map(len, lengths.values())} else None

    def __len__(self) -> int:
        return len(self.pairs)

    @cached_property
    def rows(self) -> datasets.Dataset:
        """`pairs` as Arrow tables. Lists of Python numbers, which datasets makes otherwise, take many times as long to
        make and to lay out."""
        return self.pairs.with_format("arrow")

    def margins(self, index: np.ndarray) -> np.ndarray:
        """[P] positions -> [P] fp32, 0 where the data has no margin."""
        margins = self.pairs.select(index).select_columns(["margin"])[:]["margin"]
        return np.array([margin or 0.0 for margin in margins], dtype=np.float32)

    def __getitem__(self, index: int) -> TokenizedPair:
        row = self.rows[int(index)]
        ids = {name: row[name][0].values.to_numpy() for name in ID_COLUMNS}
        return TokenizedPair(**ids, **{name: row[name][0].as_py() for name in ("margin", "source", "id")})


def mapped(file: Path) -> np.ndarray:
    """The array of an .npy file. Raises OSError or ValueError."""
    return np.lib.format.open_memmap(file, mode="r").view(np.ndarray)


def save_pairs(
    folder: Path,
    tokenized: datasets.Dataset,
    kept: np.ndarray,
    columns: Mapping[str, np.ndarray],
    report: DataReport,
) -> None:
    """Write what `PreparedPairs.open` maps.

    Args:
        tokenized: rows on disk, of PAIR_COLUMNS and others.
        kept: [P] places of the pairs among them, ascending.
        columns: those of COLUMNS.
    """
    margins = tokenized.data.table["margin"].take(pa.array(kept)).to_numpy().astype(np.float32)
    facts: dict[str, Any] = {
        "fingerprint": fingerprint(columns["keys"], margins),
        "files": [str(Path(file["filename"]).absolute()) for file in tokenized.cache_files],
        "report": report.to_json(),
    }
    with whole_folder(folder) as draft:
        for name in COLUMNS:
            np.save(draft / f"{name}.npy", columns[name])
        if len(kept) < len(tokenized):
            places = pa.table({"indices": pa.array(kept, pa.uint64())})  # as datasets names and reads them
            with pa.ipc.new_stream(str(draft / KEPT), places.schema) as writer:
                writer.write_table(places)
        (draft / FACTS).write_text(json.dumps(facts))


def fingerprint(keys: np.ndarray, margins: np.ndarray) -> str:
    """Hash of pairs in order.

    Args:
        keys: [P, 2] KEY_DTYPE, of the responses.
        margins: [P] fp32, NaN where the data has none.
    """
    digest = hashlib.sha256(np.ascontiguousarray(keys).view(np.uint8).data)
    digest.update(np.ascontiguousarray(margins).data)
    return digest.hexdigest()
