"""Tables: where the rows of a source are read from. Files, folders and hub data sets, opened and read row by row.

Every row comes with its number, counted from 1; a line that is passed over is counted too.
"""

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import datasets
import pyarrow
import pyarrow.parquet
from huggingface_hub import hf_hub_download

from hafrm_ds.data.pairs import Cell, in_words, names_in_words, shortened, valid_text
from hafrm_ds.data.sources import DATA_SUFFIXES, HUB_FIELDS, HUB_FILE, Source, has_splits, is_hub_id, is_there
from hafrm_ds.errors import DataError

HUB_DESCRIPTIONS = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json")
SHARD = re.compile(r"(?P<split>.+)-\d{5}-of-\d{5}(-[0-9a-f]{16})?\.")
"""A file of a split, as datasets names it, or used to, with a hash."""
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class Table:
    """A file, or a data set opened by datasets."""

    name: str
    """As it stands in the ids of rows."""
    files: list[Path]
    """What lies on disk: the content is taken as unchanged while their sizes and times of change are."""
    rows: Callable[[], Iterator[tuple[int, Any]]]
    """Reads (row number counted from 1, row) one after another."""


def find_tables(source: Source, cache_dir: Path | None) -> list[Table]:
    """The tables of a source, opened but not read.

    Raises:
        DataError: if there is no such file, folder or hub data set, or it holds no data.
    """
    path = Path(source.path)
    if is_there(source.path):
        tables = local_tables(path, source)
    elif match := HUB_FILE.fullmatch(source.path):
        tables = [hub_file(source, *match.groups())]
    elif is_hub_id(source.path):
        tables = [hub_table(source, cache_dir)]
    else:
        raise DataError(
            f"{shortened(source.path, 120)}: no such file or folder, and not the form of a hub id (ORG/NAME)"
        )
    return tables


def local_tables(path: Path, source: Source) -> list[Table]:
    if has_splits(path) or (path / "state.json").is_file():
        return [saved_table(path, source)]
    for name in HUB_FIELDS:
        if getattr(source, name) is not None and not (name == "split" and path.is_dir()):
            hint = "; rows are chosen with where, or with portion" if name == "split" else ""
            raise DataError(f"{path}: {name} {getattr(source, name)!r} was given, but this is local data{hint}")
    if not path.is_dir():
        return [file_table(path, source.path)]
    files = data_files(path)
    if not files and (path / "data").is_dir():  # a hub data set as it lies on disk
        files = data_files(path / "data")
    if not files:
        raise DataError(f"{path}: this folder holds no data file ({', '.join(DATA_SUFFIXES)})")
    if source.split is not None:
        files = [file for file in files if (shard := SHARD.match(file.name)) and shard["split"] == source.split]
        if not files:
            raise DataError(f"{path}: holds no shards of split {source.split!r} (SPLIT-00000-of-00001.parquet)")
    return [file_table(file, str(file)) for file in files]


def data_files(folder: Path) -> list[Path]:
    """Raises DataError for a link to a file that is gone: its rows would be lacking in silence."""
    files = sorted(file for file in folder.iterdir() if is_data_file(file.name) and not file.is_dir())
    if gone := [file for file in files if not file.exists()]:
        raise DataError(
            f"{gone[0]}: is a link to {gone[0].readlink()}, which is not there; fetch it, or remove the link"
        )
    return [file for file in files if file.is_file()]


def is_data_file(name: str) -> bool:
    """Whether a file of a folder holds rows: not what systems leave behind (._NAME) or the hub's own descriptions."""
    return name.lower().endswith(DATA_SUFFIXES) and not name.startswith(".") and name not in HUB_DESCRIPTIONS


def file_table(path: Path, name: str) -> Table:
    refuse_lfs_pointer(path, name)
    kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    json_kinds = {"jsonl": read_json_lines, "ndjson": read_json_lines, "json": read_json}
    readers = json_kinds | {"parquet": read_parquet, "csv": read_csv, "tsv": read_csv}
    if not path.name.lower().endswith(DATA_SUFFIXES):
        raise DataError(f"{name}: unknown kind of file; known are {', '.join(DATA_SUFFIXES)}")
    read = readers[kind]
    return Table(name, [path], partial(read, path, name))


def saved_table(path: Path, source: Source) -> Table:
    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:  # a damaged folder shows as almost any error of pyarrow, json or the file system
        raise DataError(f"{path}: datasets cannot load this folder: {one_line(error)}") from error
    name = str(path)
    if isinstance(data, datasets.DatasetDict):
        split = source.split or "train"
        if split not in data:
            raise DataError(f"{path}: has no split {split!r} (splits: {', '.join(data)})")
        data, name = data[split], f"{path}[{split}]"
    elif source.split is not None:
        raise DataError(f"{path}: split {source.split!r} was given, but this folder holds one data set without splits")
    return arrow_table(data, name)


def hub_table(source: Source, cache_dir: Path | None) -> Table:
    split = source.split or "train"
    try:
        data = datasets.load_dataset(
            source.path,
            name=source.config,
            data_dir=source.data_dir,
            revision=source.revision,
            split=split,
            cache_dir=None if cache_dir is None else str(cache_dir),
        )
    except Exception as error:  # no common base: hub, network, split and parsing errors all come through here
        raise hub_error(source, split, error) from error
    return arrow_table(data, f"{source.path}[{split}]")


def hub_file(source: Source, repository: str, file: str) -> Table:
    try:
        path = hf_hub_download(repository, file, repo_type="dataset", revision=source.revision)
    except Exception as error:  # as above
        raise hub_error(source, None, error) from error
    return file_table(Path(path), source.path)


def hub_error(source: Source, split: str | None, error: Exception) -> DataError:
    wanted = [("config", source.config), ("data_dir", source.data_dir), ("revision", source.revision), ("split", split)]
    details = ", ".join(f"{name} {value}" for name, value in wanted if value is not None)
    return DataError(
        f"{source.path}: no such file or folder here, and it could not be had from the Hugging Face hub"
        f"{f' ({details})' if details else ''}: {one_line(error)}"
    )


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def arrow_table(data: datasets.Dataset, name: str) -> Table:
    return Table(name, [Path(file["filename"]) for file in data.cache_files], partial(read_arrow, data, name))


# ---- rows ----------------------------------------------------------------------------------------------------------


def read_arrow(data: datasets.Dataset, name: str) -> Iterator[tuple[int, Any]]:
    number = 0
    for batch in data.with_format("arrow").iter(batch_size=1000):
        try:
            rows = batch.to_pylist()
        except (ValueError, OverflowError) as error:  # bytes that are no UTF-8, times beyond Python's
            raise DataError(f"{name}: cannot be read after row {number}: {one_line(error)}") from error
        for row in rows:
            yield (number := number + 1), row


def read_parquet(path: Path, name: str) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                raise same_name(name, names)
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    yield (number := number + 1), row
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:
        raise DataError(f"{name}: cannot be read as parquet: {one_line(error)}") from error


def read_json(path: Path, name: str) -> Iterator[tuple[int, Any]]:
    """A JSON array of objects; a file that does not begin with [ is read as JSON lines."""
    with open_data(path, name) as file:
        start = read_some(file, name, partial(file.read, 1024))
        while start.isspace() and (more := read_some(file, name, partial(file.read, 1024))):
            start += more
        if start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            yield from enumerate(parse_json(start + read_some(file, name, file.read), name), start=1)
            return
    yield from read_json_lines(path, name)


def refuse_other_shape(path: Path, name: str) -> None:
    """Raise DataError if a file that is no JSON lines is JSON all the same: one object or list over several lines."""
    with open_data(path, name) as file:
        try:
            whole = parse_json(read_some(file, name, file.read), name)
        except DataError:
            return
    if isinstance(whole, dict):
        raise one_object(name, whole)
    if isinstance(whole, list):
        raise DataError(f"{name}: is one JSON list over several lines, not an object a line: name it .json")


def one_object(place: str, content: dict[str, Any]) -> DataError:
    """The error for a file or line that holds a whole set in one JSON object."""
    keys = names_in_words(f"{shortened(key)} ({in_words(value).split(' with ')[0]})" for key, value in content.items())
    return DataError(f"{place}: is one JSON object with {keys}; a list of objects, or an object a line, is expected")


def holds_whole_set(content: dict[str, Any]) -> bool:
    """Whether a row is a set of its own: a column with many objects that are no messages, or only columns of values, as
    pandas writes them ({"prompt": {"0": ..., "1": ...}, ...})."""
    values = list(content.values())
    if len(values) == 1:
        return isinstance(values[0], dict) or (isinstance(values[0], list) and not holds_messages(values[0]))
    lists = [list(value.values()) if isinstance(value, dict) else value for value in values]
    return (
        len(values) > 1
        and not holds_messages(values)
        and all(
            isinstance(each, list) and len(each) > 1 and len(each) == len(lists[0]) and not any_objects(each)
            for each in lists
        )
    )


def holds_messages(values: list[Any]) -> bool:
    """Whether a list is a conversation, of OpenAI's messages or ShareGPT's."""
    return bool(values) and all(isinstance(each, dict) and ("role" in each or "from" in each) for each in values)


def any_objects(values: list[Any]) -> bool:
    return any(isinstance(value, dict | list) for value in values)


def read_json_lines(path: Path, name: str) -> Iterator[tuple[int, Any]]:
    """One JSON object a line; empty lines are passed over but counted."""
    with open_data(path, name) as file:
        number, is_first = 0, True
        while line := read_some(file, name, file.readline):
            number += 1
            if line.strip():
                try:
                    row = parse_json(line.rstrip(), f"{name}:{number}")
                except DataError:
                    if is_first:
                        refuse_other_shape(path, name)
                    raise
                is_first = False
                yield number, row


def read_csv(path: Path, name: str) -> Iterator[tuple[int, Any]]:
    """Rows of comma- or tab-separated values, of which the first names the columns and counts as row 1."""
    csv.field_size_limit(2**31 - 1)  # the texts of conversations are longer than what it takes by default
    delimiter = "\t" if path.name.lower().removesuffix(".gz").endswith(".tsv") else ","
    with open_data(path, name) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as lines:
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        number = 0
        while True:
            number += 1
            try:
                cells = next(rows, None)
            except UnicodeDecodeError as error:
                raise DataError(f"{name}:{number}: is not UTF-8 (byte {error.object[error.start]:#04x})") from error
            except (csv.Error, OSError, EOFError, zlib.error) as error:
                raise DataError(f"{name}:{number}: cannot be read: {error}") from error
            if cells is None:
                return
            if not cells:  # an empty line
                continue
            if header is None:
                header = cells
                if len(set(header)) < len(header):
                    raise same_name(f"{name}:{number}", header)
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{name}:{number}: has {len(cells)} cells, but the header names {len(header)} columns "
                    f"({names_in_words(header)})"
                )
            yield number, dict(zip(header, map(Cell, cells)))


def same_name(place: str, names: list[str]) -> DataError:
    return DataError(f"{place}: two columns have the same name ({names_in_words(names)})")


def refuse_lfs_pointer(path: Path, name: str) -> None:
    """Raise DataError for the few lines that Git leaves where the content of a file was not fetched."""
    try:
        with path.open("rb") as file:
            start = file.read(200)
    except OSError:  # told by whoever reads the file
        return
    if start.startswith(LFS_POINTER):
        size = re.search(rb"^size (\d+)", start, re.MULTILINE)
        of = f" (size {size[1].decode()})" if size else ""
        raise DataError(f"{name}: is a Git LFS pointer{of}, not the file itself: fetch it with git lfs pull")


def open_data(path: Path, name: str) -> IO[bytes]:
    try:
        return cast(IO[bytes], gzip.open(path)) if path.name.lower().endswith(".gz") else path.open("rb")
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from error


def read_some(file: IO[bytes], name: str, read: Callable[[], bytes]) -> bytes:
    try:
        return read()
    except (OSError, EOFError, zlib.error) as error:  # damaged or cut-off gzip shows only while reading
        raise DataError(f"{name}: cannot be read: {error}") from error


def parse_json(data: bytes, place: str) -> Any:
    def fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(key for n, (key, _) in enumerate(pairs) if key in dict(pairs[:n]))
            raise DataError(f"{place}: an object has the key {shortened(valid_text(twice))!r} twice: which is meant?")
        return found

    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=fields)
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: is not UTF-8 (byte {error.start + 1} is {data[error.start]:#04x})") from error
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise DataError(f"{place}: is not valid JSON: {error.msg} ({line}column {error.colno})") from error
    except ValueError as error:  # Python reads no number of more than 4,300 digits
        raise DataError(f"{place}: holds a number of too many digits (4,300 can be read)") from error
    except RecursionError as error:
        raise DataError(f"{place}: is nested too deeply to be read") from error
