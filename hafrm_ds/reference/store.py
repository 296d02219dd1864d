"""The reference store: log-probs of a frozen policy on disk, found by content.

    STORE/NAMESPACE/namespace.json       what the values belong to, in words
    STORE/NAMESPACE/SHA256.arrow         shards: Arrow files named after the SHA-256 of their bytes
    STORE/NAMESPACE/set_aside/           files that failed a check

A namespace is the fingerprint of everything that decides a value besides the tokens: the reference weights (by
content), the dtype and the version of the log-prob function. A key is a hash of one response's exact tokens in context.
So values survive any shuffling, subsetting, growing and mixing of the data.

A shard is written under another name, synced and renamed, so it exists whole or not at all; its name is its checksum.
Writers never touch each other's files, so any number of ranks and jobs may write at once. A copy of the folder is a
copy of the store. Nothing is ever unpickled.

Legend: Q queried keys.
"""

import errno
import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from hafrm_ds.data.content_keys import KEY_BYTES, KEY_DTYPE, column_view
from hafrm_ds.durability import publish, write_whole
from hafrm_ds.errors import UserError

SHARD_NAME = re.compile(r"[0-9a-f]{64}\.arrow")
DRAFT_PREFIX = ".draft-"
SET_ASIDE = "set_aside"
NAMESPACE_FILE = "namespace.json"
NAMESPACE_NAME = re.compile(r".+-\w+-v\d+-[0-9a-f]{12}")
"""The form of the folder names that `Namespace.name` makes."""
SCHEMA = pa.schema(
    [
        pa.field("key", pa.binary(KEY_BYTES), nullable=False),
        pa.field("logprob", pa.float32(), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),
    ]
)
"""Shards may have more columns, as older ones have the log-prob of each token; they are not read."""
FLUSH_VALUES = 1_000_000
BLOCK_VALUES = 1_000_000
"""Stored values that are looked at at once."""


class StoreError(UserError):
    """The reference store cannot be used."""


# ---- namespaces ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Namespace:
    """What the values of a namespace belong to.

    weights: SHA-256 of the reference weights (`hafrm_ds.reference.fingerprint`).
    dtype: of the weights in the forward pass.
    version: of the log-prob function.
    """

    weights: str
    dtype: str
    version: int

    @property
    def name(self) -> str:
        """Folder name: readable parts and a hash of all."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"{self.weights[:12]}-{self.dtype}-v{self.version}-{digest[:12]}"


# ---- writing -------------------------------------------------------------------------------------------------------


@dataclass
class ShardWriter:
    """Collects values and writes them as shards, every `flush_values` values or `flush_seconds` seconds.

    Args:
        folder: of the namespace that gets the shards.
        namespace: its name.
        provenance: kernel, layout, ZeRO stage and the like, noted in each shard.

    Raises:
        StoreError: a shard cannot be written (full disk, read-only folder); all earlier shards are good.
    """

    folder: Path
    namespace: str
    provenance: dict
    flush_seconds: float = 60.0
    flush_values: int = FLUSH_VALUES
    rows: list[tuple] = field(default_factory=list)
    last_flush: float = field(default_factory=time.monotonic)

    def add(self, key: bytes, logprob: float, num_tokens: int) -> None:
        if not np.isfinite(logprob):
            raise StoreError(f"a reference log-prob is {logprob}: it is not stored")
        self.rows.append((key, logprob, num_tokens))
        if len(self.rows) >= self.flush_values or time.monotonic() - self.last_flush >= self.flush_seconds:
            self.flush()

    def flush(self) -> None:
        """Write what has been collected as one shard."""
        if self.rows:
            keys, logprobs, counts = zip(*sorted(self.rows, key=lambda row: row[0]), strict=True)
            columns = [
                pa.array(keys, SCHEMA.field("key").type),
                pa.array(logprobs, pa.float32()),
                pa.array(counts, pa.int32()),
            ]
            metadata = {"namespace": self.namespace, "provenance": json.dumps(self.provenance)}
            table = pa.Table.from_arrays(columns, schema=SCHEMA.with_metadata(metadata))
            write_shard(self.folder, table)
            self.rows.clear()
        self.last_flush = time.monotonic()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        if error_type is None or issubclass(error_type, KeyboardInterrupt):
            self.flush()


def write_shard(folder: Path, table: pa.Table) -> Path:
    """Write a table as a shard: whole or not at all, named by its checksum."""
    draft = folder / f"{DRAFT_PREFIX}{uuid.uuid4().hex}"
    try:
        with pa.OSFile(str(draft), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        with draft.open("rb") as written:
            shard = folder / f"{hashlib.file_digest(written, 'sha256').hexdigest()}.arrow"
        publish(draft, shard)
    except OSError as error:
        draft.unlink(missing_ok=True)
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise StoreError(
            f"the reference store {folder} cannot be written: {reason}. What was stored before is good; "
            "the next start continues from there"
        ) from error
    return shard


# ---- reading -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """One good shard, memory-mapped. keys: [v] KEY_DTYPE; logprob: [v] fp32; num_tokens: [v] int32."""

    path: Path
    table: pa.Table

    @property
    def keys(self) -> np.ndarray:
        return column_view(self.table["key"], KEY_DTYPE)

    @property
    def logprob(self) -> np.ndarray:
        return column_view(self.table["logprob"], np.dtype(np.float32))

    @property
    def num_tokens(self) -> np.ndarray:
        return column_view(self.table["num_tokens"], np.dtype(np.int32))


def open_shard(path: Path, namespace: str) -> Shard:
    """Check a shard and map it.

    Raises:
        ValueError: with what is wrong with the file.
    """
    if not SHARD_NAME.fullmatch(path.name):
        raise ValueError("is no shard: its name is no checksum")
    with path.open("rb") as handle:
        if hashlib.file_digest(handle, "sha256").hexdigest() != path.stem:
            raise ValueError("is damaged: its content does not have the checksum in its name")
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except pa.ArrowInvalid as error:
        raise ValueError(f"is no Arrow file: {error}") from error
    types = {field.name: field.type for field in table.schema}
    if table.schema.metadata is None or any(types.get(field.name) != field.type for field in SCHEMA):
        raise ValueError("does not have the columns of a shard")
    owner = table.schema.metadata.get(b"namespace", b"").decode()
    if owner != namespace:
        raise ValueError(f"belongs to another namespace, {owner or 'unknown'}")
    return Shard(path, table)


class ReferenceStore:
    """One namespace of a store, open for look-up and for writing.

    Args:
        root: folder of the store; made if it is not there.
        namespace: what the values belong to.
        notes: put into namespace.json for people, for example the name of the model.
        warn: told about each file that is set aside.

    Raises:
        StoreError: the folder cannot be made or read.
    """

    def __init__(
        self, root: Path, namespace: Namespace, notes: dict | None = None, warn: Callable[[str], None] = print
    ):
        self.root, self.namespace, self.warn = root, namespace, warn
        self.folder = root / namespace.name
        self.shards: list[Shard] = []
        try:
            if not self.folder.is_dir():
                self.folder.mkdir(parents=True, exist_ok=True)
            write_namespace_file(self.folder, namespace, notes or {})
        except OSError as error:
            raise StoreError(f"the reference store {self.folder} cannot be made: {error.strerror}") from error
        self.refresh()

    def refresh(self) -> None:
        """Look at the folder anew: check and map every shard, set aside what fails."""
        self.shards = list(good_shards(self.folder, self.namespace.name, self.warn))

    def __len__(self) -> int:
        """The number of different keys."""
        return len(first_places(self.shards))

    @property
    def num_bytes(self) -> int:
        return sum(shard.path.stat().st_size for shard in self.shards)

    def logprobs(self, keys: np.ndarray) -> np.ndarray:
        """Stored log-probs of keys [Q] KEY_DTYPE: [Q] fp32, NaN where there is none."""
        return find_values(self.shards, keys)

    def missing(self, keys: np.ndarray) -> np.ndarray:
        """[Q] bool, True where no value is stored."""
        return np.isnan(self.logprobs(keys))


def find_values(shards: Sequence[Shard], keys: np.ndarray) -> np.ndarray:
    """Log-probs of keys [Q] KEY_DTYPE: [Q] fp32, NaN where there is none; of equal stored keys the first counts.

    The keys are sorted, and each block of stored ones is looked for among them: so memory is that of the question,
    however large the store is, and the store is read once from its beginning to its end.
    """
    values = np.full(len(keys), np.nan, dtype=np.float32)
    wanted = as_sorted(keys)
    order = np.argsort(wanted)
    wanted = wanted[order]
    for shard in reversed(shards):  # the first value of a key is written last
        every, logprobs = shard.keys, shard.logprob
        for start in reversed(range(0, len(every), BLOCK_VALUES)):
            stored, logprob = (column[start : start + BLOCK_VALUES] for column in (every, logprobs))
            by_key = np.argsort(as_sorted(stored), kind="stable")  # one pass, where a shard is in order
            high = as_sorted(stored)[by_key]
            at = np.searchsorted(wanted, high)
            # Keys with equal upper halves, and keys that are asked for several times, stand side by side.
            while len(at):
                alike = at < len(wanted)
                alike[alike] = wanted[at[alike]] == high[alike]
                at, high, by_key = at[alike], high[alike], by_key[alike]
                question = order[at]
                hit = keys["low"][question] == stored["low"][by_key]
                values[question[hit][::-1]] = logprob[by_key[hit][::-1]]
                at = at + 1
    return values


def as_sorted(keys: np.ndarray) -> np.ndarray:
    """Upper halves of keys [n] as the numbers [n] uint64 whose order is that of the keys' bytes, by which shards are
    written in order."""
    return keys["high"].astype(np.uint64).byteswap()


def first_places(shards: Sequence[Shard]) -> np.ndarray:
    """Places, ascending, among the values of all shards laid end to end, of the first of every key."""
    keys = np.concatenate([np.empty(0, KEY_DTYPE), *(shard.keys for shard in shards)])
    order = np.lexsort((keys["low"], keys["high"]))
    ordered = keys[order]
    return np.sort(order[np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(keys)]])


def shard_files(folder: Path) -> list[Path]:
    """Every file that should be a shard, in order of name."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and path.name != NAMESPACE_FILE and not path.name.startswith(".")
    )


def good_shards(folder: Path, namespace: str, warn: Callable[[str], None]) -> Iterator[Shard]:
    """Open the shards of a folder, checksums in parallel; a file that fails is set aside and told to `warn`."""

    def attempt(path: Path) -> Shard | ValueError | None:
        try:
            return open_shard(path, namespace)
        except ValueError as error:
            return error
        except FileNotFoundError:  # another job has set it aside meanwhile
            return None

    try:
        files = shard_files(folder)
    except OSError as error:
        raise StoreError(f"the reference store {folder} cannot be read: {error.strerror}") from error
    with ThreadPoolExecutor() as pool:
        for path, outcome in zip(files, pool.map(attempt, files), strict=True):
            if isinstance(outcome, Shard):
                yield outcome
            elif outcome is not None:
                set_aside(path, str(outcome), warn)


def set_aside(path: Path, reason: str, warn: Callable[[str], None]) -> None:
    """Move a file out of the way, so that its values are computed anew and nothing is lost."""
    place = path.parent / SET_ASIDE / path.name
    try:
        place.parent.mkdir(exist_ok=True)
        os.rename(path, place)
        warn(f"reference store: {path} {reason}; it was moved to {place.parent}, its values count as missing")
    except OSError as error:
        warn(f"reference store: {path} {reason}; it is passed over (and cannot be moved: {error.strerror})")


def write_namespace_file(folder: Path, namespace: Namespace, notes: dict) -> None:
    """Say in words what a namespace is. Only people read it: a lost file loses nothing and is written again."""
    file = folder / NAMESPACE_FILE
    if file.exists():
        return
    write_whole(file, (json.dumps(asdict(namespace) | notes, indent=2) + "\n").encode())


def read_namespaces(root: Path) -> dict[str, dict]:
    """Folder name -> content of namespace.json ({} where it is lost), for every namespace of a store; other folders
    that lie beside them are no part of it."""
    namespaces = {}
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        if folder.is_dir() and NAMESPACE_NAME.fullmatch(folder.name):
            try:
                namespaces[folder.name] = json.loads((folder / NAMESPACE_FILE).read_text())
            except (OSError, ValueError):
                namespaces[folder.name] = {}
    return namespaces


def describe_namespaces(root: Path, besides: Namespace) -> str:
    """The namespaces of a store but one, each with how it differs from that one; empty when there is no other."""
    parts = []
    for name, facts in read_namespaces(root).items():
        if name == besides.name:
            continue
        differences = [key for key, value in asdict(besides).items() if facts.get(key) != value]
        parts.append(f"{facts.get('model', name)} ({name}; other {', '.join(differences)})")
    return "; ".join(parts)
