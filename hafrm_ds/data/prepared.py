"""Prepared groups on disk: what is counted of a set once, and the rows themselves, mapped by every process that uses
them, so that a host holds one copy however many processes it runs.

    CACHE/prepared-KEY/COLUMN.npy     lengths, keys and comparisons of the groups
    CACHE/prepared-KEY/kept.arrow     their places among the tokenised rows, unless all of these are groups
    CACHE/prepared-KEY/attributes.npy the attributes of responses, where there are any
    CACHE/prepared-KEY/facts.json     the report, the fingerprint of the groups, the files of the tokenised rows

Legend: G groups, R responses and C comparisons of all of them, A attributes.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets.table import MemoryMappedTable

from hafrm_ds.data.comparisons import ComparisonTable
from hafrm_ds.data.lengths import GroupLengths, places_of, starts_of
from hafrm_ds.data.report import DataReport
from hafrm_ds.data.tokenization import TokenizedGroup
from hafrm_ds.durability import whole_folder

FACTS, KEPT, ATTRIBUTES = "facts.json", "kept.arrow", "attributes.npy"
COMPARISONS = ComparisonTable._fields
FIRST = {"first_response": "num_responses", "first_comparison": "num_comparisons"}
"""Where those of each group begin, and the last ones end -> how many each has."""
COLUMNS = ("prompt", "response", *FIRST, *COMPARISONS, "trains_reward", "keys", "prompt_keys", "uncut_lengths")
GROUP_COLUMNS = ("prompt_ids", "response_ids", "source", "id")


@dataclass(frozen=True)
class PreparedGroups:
    """The usable groups of a set, in reading order. All arrays are mapped and cannot be written to.

    rows: columns prompt_ids (int32 list), response_ids (list of int32 lists), source, id.
    lengths: tokens of the prompts and responses.
    table: the comparisons, those of group g from first_comparison[g] to first_comparison[g + 1], which is [G + 1].
    trains_reward: [G] bool, whether a group trains the reward loss; else it trains that of the policy alone.
    keys: [R] KEY_DTYPE, content keys of the responses.
    prompt_keys: [G] KEY_DTYPE, keys of the prompts before any truncation: groups of one prompt share it, whatever was
        left.
    uncut_lengths: int64 tokens of the longest conversation, not truncated, for all groups that could be rendered: also
        for those that were dropped as too long.
    fingerprint: hash of the groups in order: tokens, comparisons, attributes, and which of them train the reward loss.
    attributes: [A, R] fp32, NaN where the data says nothing; None of a set without any. Their names are in the report.
    """

    rows: datasets.Dataset
    lengths: GroupLengths
    table: ComparisonTable
    first_comparison: np.ndarray
    trains_reward: np.ndarray
    keys: np.ndarray
    prompt_keys: np.ndarray
    uncut_lengths: np.ndarray
    report: DataReport
    fingerprint: str
    attributes: np.ndarray | None = None

    @classmethod
    def open(cls, folder: Path) -> "PreparedGroups | None":
        """Map what `save_groups` has written; None if it is not there, or not whole any more."""
        try:
            facts = json.loads((folder / FACTS).read_text())
            columns = {name: mapped(folder / f"{name}.npy") for name in COLUMNS}
            rows = datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in facts["files"]])
            rows = rows.select_columns(list(GROUP_COLUMNS))
            if (folder / KEPT).exists():
                places = MemoryMappedTable.from_file(str(folder / KEPT))
                rows = datasets.Dataset(rows.data, indices_table=places, fingerprint=folder.name)
            report = DataReport.from_json(facts["report"])
            fingerprint = facts["fingerprint"]
            attributes = mapped(folder / ATTRIBUTES) if report.attributes else None
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowInvalid):
            return None
        first_response, first_comparison = (columns.pop(name) for name in FIRST)
        lengths = GroupLengths(columns.pop("prompt"), columns.pop("response"), first_response)
        table = ComparisonTable(*(columns.pop(name) for name in COMPARISONS))
        said = {"report": report, "fingerprint": fingerprint, "attributes": attributes}
        groups = cls(rows, lengths, table, first_comparison, **columns | said)
        is_whole = (
            {len(rows)} == {len(lengths), len(groups.prompt_keys), len(groups.trains_reward), len(first_comparison) - 1}
            and {first_response[-1]} == {len(groups.keys), len(lengths.response)}
            and {first_comparison[-1]} == {*map(len, table)}
            and (attributes is None or attributes.shape == (len(report.attributes), len(groups.keys)))
        )
        return groups if is_whole else None

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def arrow_rows(self) -> datasets.Dataset:
        """`rows` as Arrow tables. Lists of Python numbers, which datasets makes otherwise, take many times as long to
        make and to lay out."""
        return self.rows.with_format("arrow")

    @property
    def are_pairs(self) -> bool:
        """Whether every group is a pair, as was counted once: steps ask for it."""
        return self.report.groups is None

    @property
    def unit(self) -> str:
        """The word for the groups in messages."""
        return self.report.unit

    @property
    def compared(self) -> np.ndarray:
        """[C, 2] which of all responses each comparison finds better and worse."""
        return compared(self.lengths.first, np.diff(self.first_comparison), self.table)

    def needed_tokens(self, layout: str, whole: bool) -> np.ndarray:
        """[G] tokens that a micro-batch must hold for each group: its longest comparison, or all its answers."""
        if whole:
            return self.lengths.costs(layout)
        better, worse = self.lengths.response[self.compared].T
        prompt = np.repeat(self.lengths.prompt, np.diff(self.first_comparison))
        costs = GroupLengths.of_pairs(prompt, better, worse).costs(layout)
        return np.maximum.reduceat(costs, self.first_comparison[:-1]) if len(self) else costs

    def num_comparisons(self, index: np.ndarray) -> np.ndarray:
        """[G] comparisons of each of some groups."""
        return self.first_comparison[index + 1] - self.first_comparison[index]

    def comparisons_of(self, index: np.ndarray) -> np.ndarray:
        """Positions in `table` of the comparisons of some groups, group after group."""
        return places_of(self.first_comparison, index)

    def attributes_of(self, names: Sequence[str], responses: np.ndarray) -> np.ndarray:
        """[N, A] fp32 the values of some attributes of some responses, by their positions among all; NaN where the
        data says nothing, and for a position below 0, which is a dummy."""
        found = np.full((len(responses), len(names)), np.nan, dtype=np.float32)
        known = list(self.report.attributes)
        for column, name in enumerate(names):
            if self.attributes is not None and name in known:
                values = self.attributes[known.index(name)]
                found[:, column] = np.where(responses < 0, np.nan, values[responses])
        return found

    def __getitem__(self, index: int) -> TokenizedGroup:
        index = int(index)
        row = self.arrow_rows[index]
        responses = row["response_ids"][0].values
        return TokenizedGroup(
            prompt_ids=row["prompt_ids"][0].values.to_numpy(),
            responses=tuple(responses[k].values.to_numpy() for k in range(len(responses))),
            comparisons=self.table.take(slice(*self.first_comparison[index : index + 2])).rows(),
            source=row["source"][0].as_py(),
            id=row["id"][0].as_py(),
            trains_reward=bool(self.trains_reward[index]),
        )


def compared(first_response: np.ndarray, num_comparisons: np.ndarray, table: ComparisonTable) -> np.ndarray:
    """[C, 2] which of the responses of all groups, laid end to end, each comparison finds better and worse.

    Args:
        first_response: [G + 1] where those of each group begin. num_comparisons: [G].
    """
    first = np.repeat(first_response[:-1], num_comparisons)
    return np.stack([first + table.better, first + table.worse], axis=1)


def is_of_pairs(num_responses: np.ndarray, num_comparisons: np.ndarray, table: ComparisonTable) -> bool:
    """Whether groups are pairs, whose first answer is the chosen one and certainly so."""
    is_usual = (table.better == 0) & (table.worse == 1) & (table.target == 1) & (table.weight == 1)
    return bool((num_responses == 2).all() and (num_comparisons == 1).all() and is_usual.all())


def mapped(file: Path) -> np.ndarray:
    """The array of an .npy file. Raises OSError or ValueError."""
    return np.lib.format.open_memmap(file, mode="r").view(np.ndarray)


def save_groups(
    folder: Path,
    tokenized: datasets.Dataset,
    kept: np.ndarray,
    columns: Mapping[str, np.ndarray],
    report: DataReport,
    attributes: Mapping[str, np.ndarray],
) -> None:
    """Write what `PreparedGroups.open` maps.

    Args:
        tokenized: rows on disk, of GROUP_COLUMNS and others.
        kept: [G] places of the groups among them, ascending.
        columns: those of COLUMNS, with the numbers of FIRST for its names. attributes: name -> [R], in the order of the
            report's.
    """
    facts: dict[str, Any] = {
        "fingerprint": fingerprint(columns, attributes),
        "files": [str(Path(file["filename"]).absolute()) for file in tokenized.cache_files],
        "report": report.to_json(),
    }
    with whole_folder(folder) as draft:
        for name in COLUMNS:
            np.save(draft / f"{name}.npy", starts_of(columns[FIRST[name]]) if name in FIRST else columns[name])
        if attributes:
            np.save(draft / ATTRIBUTES, np.stack(list(attributes.values())))
        if len(kept) < len(tokenized):
            places = pa.table({"indices": pa.array(kept, pa.uint64())})  # as datasets names and reads them
            with pa.ipc.new_stream(str(draft / KEPT), places.schema) as writer:
                writer.write_table(places)
        (draft / FACTS).write_text(json.dumps(facts))


def fingerprint(columns: Mapping[str, np.ndarray], attributes: Mapping[str, np.ndarray]) -> str:
    """Hash of groups in order: the keys of their responses and their margins, for what is no pair all that stands in
    its comparisons, attributes where there are any, and which groups train the reward loss where not all of them do.

    Args:
        columns: of COLUMNS, those of responses and comparisons.
    """
    digest = hashlib.sha256(np.ascontiguousarray(columns["keys"]).view(np.uint8).data)
    digest.update(np.ascontiguousarray(columns["margin"]).data)
    counts, table = ("num_responses", "num_comparisons"), ComparisonTable(*(columns[name] for name in COMPARISONS))
    if not is_of_pairs(columns["num_responses"], columns["num_comparisons"], table):
        for name in (*counts, "better", "worse", "target", "weight"):
            digest.update(np.ascontiguousarray(columns[name]).data)
    if not columns["trains_reward"].all():
        digest.update(np.packbits(columns["trains_reward"]).data)
    for name, values in attributes.items():
        digest.update(name.encode() + b"\0")
        digest.update(values.data)
    return digest.hexdigest()
