"""Looking after a store: verify, merge, prune. None of these needs the model."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from hafrm_ds.reference.store import (
    DRAFT_PREFIX,
    NAMESPACE_FILE,
    SET_ASIDE,
    StoreError,
    first_places,
    good_shards,
    open_shard,
    read_namespaces,
    shard_files,
    write_shard,
)

ABANDONED_SECONDS = 24 * 3600
"""A draft this old belongs to a writer that was killed."""


@dataclass(frozen=True)
class NamespaceReport:
    """One namespace of a store: its folder name, what namespace.json says, good shards and values, bad files."""

    name: str
    facts: dict
    shards: int
    values: int
    bytes: int
    bad: list[str]


def namespaces_of(root: Path) -> dict[str, dict]:
    """As `read_namespaces`. Raises StoreError for a folder that is no store, before anything in it is touched."""
    found = read_namespaces(root)
    if not found:
        raise StoreError(f"{root} is no reference store: it holds no folder MODEL-DTYPE-vN-HASH of log-probs")
    return found


def verify_store(root: Path) -> list[NamespaceReport]:
    """Check every file of every namespace against its checksum; nothing is moved or changed."""
    reports = []
    for name, facts in namespaces_of(root).items():
        good, bad = [], []
        for path in shard_files(root / name):
            try:
                good.append(open_shard(path, name))
            except ValueError as error:
                bad.append(f"{path} {error}")
        size = sum(shard.path.stat().st_size for shard in good)
        values = len(first_places(good))
        reports.append(NamespaceReport(name, facts, len(good), values, size, bad))
    return reports


def merge_stores(source: Path, target: Path) -> None:
    """Copy every good shard of `source` that `target` does not have. The source is only read.

    A shard's name is its checksum, so one that is there already is the same one.
    """
    for name in namespaces_of(source):
        folder = target / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if (source / name / NAMESPACE_FILE).exists() and not (folder / NAMESPACE_FILE).exists():
                (folder / NAMESPACE_FILE).write_bytes((source / name / NAMESPACE_FILE).read_bytes())
        except OSError as error:
            raise StoreError(f"the reference store {folder} cannot be written: {error.strerror}") from error
        for path in shard_files(source / name):
            try:
                shard = open_shard(path, name)
            except ValueError as error:
                print(f"{path} {error}; it was not merged")
                continue
            if not (folder / path.name).exists():
                write_shard(folder, shard.table)


def prune_store(root: Path) -> None:
    """Make a store small: one shard for each namespace, without doubles.

    Drafts of killed writers and files that were set aside are deleted. Run it when nothing else writes.
    """
    for name in namespaces_of(root):
        folder = root / name
        for draft in folder.glob(f"{DRAFT_PREFIX}*"):
            if time.time() - draft.stat().st_mtime > ABANDONED_SECONDS:
                draft.unlink()
        if (folder / SET_ASIDE).exists():
            shutil.rmtree(folder / SET_ASIDE)
        shards = list(good_shards(folder, name, warn=print))
        places = first_places(shards)
        if len(shards) <= 1 and len(places) == sum(len(shard.table) for shard in shards):
            continue
        # Per-token values stay only where every shard has them: a column may not be there for some rows.
        columns = [name for name in shards[0].table.schema.names if all(name in s.table.schema.names for s in shards)]
        table = pa.concat_tables([shard.table.select(columns).replace_schema_metadata() for shard in shards])
        kept = table.take(places).combine_chunks()
        provenances = sorted({shard.table.schema.metadata[b"provenance"] for shard in shards})
        metadata = {"namespace": name, "provenance": b"[" + b", ".join(provenances) + b"]"}
        written = write_shard(folder, kept.replace_schema_metadata(metadata))
        if len(open_shard(written, name).keys) != len(places):
            raise StoreError(f"{written} does not hold what it was made of; nothing was deleted")
        for shard in shards:
            if shard.path != written:
                shard.path.unlink()
