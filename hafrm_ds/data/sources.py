"""Data sources: what a user may write under data.train and data.eval, and how that becomes rows and pairs.

    Source -> tables (files, hub sets) -> rows -> PreferencePair -> selection and mixing -> one data set

`read_pairs` is the whole way. Every row that was read stays in its result: those that are not used carry the reason.
"""

import codecs
import difflib
import gzip
import hashlib
import json
import math
import random
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import IO, Annotated, Any, Literal
from urllib.parse import parse_qsl

import datasets
import pyarrow
import pyarrow.parquet
from huggingface_hub import hf_hub_download
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_serializer,
    model_validator,
)

from hafrm_ds.data.pairs import FORMAT_VERSION, FORMATS, Dropped, Row, detect_format, in_words, read_pair
from hafrm_ds.errors import DataError

Role = Literal["train", "eval"]

HUB_FIELDS = ("config", "data_dir", "revision", "split")
SELECTION_FIELDS = ("portion", "max_pairs", "weight")


class Source(BaseModel):
    """One data source.

    On the command line a source is one string: a path, a hub id or `preset:NAME`, with an optional row filter:
    `pairs.jsonl?split=train`. For a hub id or a preset the keys `split` and `config` choose what is loaded instead of
    filtering rows.
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    path: str = ""
    """A file (json, jsonl, json.gz, jsonl.gz, parquet), a folder of them, a folder written by datasets' save_to_disk,
    a hub id (ORG/NAME), or a file of a hub data set (hf://datasets/ORG/NAME/FILE)."""
    preset: str | None = None
    """One of the paper's sets by name; it fills every field not given here."""
    config: str | None = None
    """Configuration on the hub, as in load_dataset(path, config)."""
    data_dir: str | None = None
    """Folder inside a hub data set, as in load_dataset(path, data_dir=...)."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    split: str | None = None
    """Split expression of a hub data set (train, train[:5%], train+test), or the split of a folder written by
    save_to_disk. Default: train."""
    where: dict[str, str | int | float | bool | None] = {}
    """Keep only rows whose fields have these values (compared as text: true, false and null are written so)."""
    format: str = "auto"
    """Row format; auto recognises it from the columns."""
    label: Literal["helpful", "safe"] = "safe"
    """PKU-SafeRLHF and BeaverTails rows: which of their two labels decides."""
    exactly_one_safe: bool = False
    """PKU-SafeRLHF and BeaverTails rows: keep pairs with one safe and one unsafe answer."""
    single_turn: bool = False
    """Keep pairs of a single user message (beside a system message) and single answers."""
    portion: str | None = None
    """Part of the pairs left after the filters above, in reading order: `:5%`, `10%:`, `5%:50%`, `:1000`. Percentages
    are rounded down. In YAML it needs quotes."""
    max_pairs: Annotated[int, Field(ge=1)] | None = None
    """Cap: a seeded random choice of this many pairs."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """Share of this source in a mix, relative to the other weights. Without weights every pair of every source is used;
    with them no pair is used twice, so the source that is scarcest for its weight sets the size of the mix."""
    name: str | None = None
    """Name in reports. Default: the preset, the file's stem or the hub id."""

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, value: Any) -> Any:
        for name in value if isinstance(value, dict) else ():
            if name not in cls.model_fields:
                raise ValueError(f"a source has no field {name!r}{suggestion(str(name), cls.model_fields)}")
        return value

    @field_validator("preset")
    @classmethod
    def _known_preset(cls, name: str | None) -> str | None:
        if name is not None and name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}{suggestion(name, PRESETS)} (known: {', '.join(PRESETS)})")
        return name

    @field_validator("format")
    @classmethod
    def _known_format(cls, name: str) -> str:
        if name != "auto" and name not in FORMATS:
            raise ValueError(f"unknown format {name!r}{suggestion(name, FORMATS)} (known: auto, {', '.join(FORMATS)})")
        return name

    @field_validator("portion", mode="before")
    @classmethod
    def _valid_portion(cls, text: Any) -> Any:
        if isinstance(text, int):
            raise ValueError("write a portion in quotes: YAML reads an unquoted 10:50 as a number in base 60")
        if isinstance(text, str):
            parse_portion(text)
        return text

    @model_validator(mode="after")
    def _has_origin(self) -> "Source":
        if not self.path and not self.preset:
            raise ValueError("a source needs a path or a preset")
        return self

    @model_serializer(mode="wrap")
    def _given_fields(self, serialise: Callable[["Source"], dict[str, Any]]) -> dict[str, Any]:
        """Only what the user gave: a default that is written out would override the preset when it is read again."""
        return {name: value for name, value in serialise(self).items() if name in self.model_fields_set}

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        return ((name, getattr(self, name)) for name in type(self).model_fields if name in self.model_fields_set)

    @property
    def label_in_reports(self) -> str:
        return report_label(self.name, self.preset, self.path)


def report_label(name: str | None, preset: str | None, path: str) -> str:
    return name or preset or (Path(path).name.split(".")[0] if Path(path).exists() else path)


def suggestion(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


# ---- the paper's sets ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preset:
    """Fields of a `Source`: those of both roles and those of each."""

    both: dict[str, Any]
    train: dict[str, Any] = field(default_factory=dict)
    eval: dict[str, Any] = field(default_factory=dict)


OFFICIAL_SPLITS = {"train": {"split": "train"}, "eval": {"split": "test"}}

PRESETS = {
    "hh_helpful": Preset(
        {"path": "Anthropic/hh-rlhf", "data_dir": "helpful-base", "single_turn": True}, **OFFICIAL_SPLITS
    ),
    "hh_harmless": Preset(
        {"path": "Anthropic/hh-rlhf", "data_dir": "harmless-base", "single_turn": True}, **OFFICIAL_SPLITS
    ),
    "chatbot_arena": Preset(
        {"path": "lmsys/chatbot_arena_conversations", "split": "train", "single_turn": True},
        train={"portion": "5%:"},
        eval={"portion": ":5%"},
    ),
    "beaver_safe": Preset(
        {"path": "PKU-Alignment/PKU-SafeRLHF", "exactly_one_safe": True, "label": "safe"},
        train={"split": "train"},
        eval={"split": "test", "portion": ":1000"},
    ),
    # Read as a file: the hub's load_dataset entry for this set is a script, which datasets no longer runs.
    "alpaca_human_preference": Preset(
        {"path": "hf://datasets/tatsu-lab/alpaca_farm/alpaca_human_preference.json"},
        train={"portion": "10%:"},
        eval={"portion": ":10%"},
    ),
}


def resolve_preset(source: Source, role: Role) -> Source:
    """The source with the fields of its preset for this role filled in, wherever the user gave none.

    When the user points the preset at local data, what names a place on the hub is left out: a local file has no split.
    A folder that holds several splits keeps it.
    """
    if source.preset is None:
        return source
    preset = PRESETS[source.preset]
    fields = preset.both | (preset.train if role == "train" else preset.eval)
    if source.path and Path(source.path).exists():
        kept = ("split",) if has_splits(Path(source.path)) else ()
        fields = {name: value for name, value in fields.items() if name not in HUB_FIELDS or name in kept}
    given = {name: getattr(source, name) for name in source.model_fields_set}
    return Source.model_validate(fields | given)


# ---- what a user may write -----------------------------------------------------------------------------------------

DATA_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
HUB_FILE = re.compile(r"hf://datasets/([^/]+/[^/]+)/(.+)")


def source_from_string(text: str) -> dict[str, Any]:
    """`path?field=value&field=value` -> mapping of Source fields."""
    path, _, query = text.partition("?")
    where: dict[str, Any] = dict(parse_qsl(query, keep_blank_values=True))
    fields: dict[str, Any] = {}
    if path.startswith("preset:"):
        fields["preset"] = path.removeprefix("preset:")
    else:
        fields["path"] = path
    if "preset" in fields or is_hub_id(path):
        fields |= {key: where.pop(key) for key in ("split", "config") if key in where}
    return fields | ({"where": where} if where else {})


def is_hub_id(path: str) -> bool:
    return HUB_ID.fullmatch(path) is not None and not path.endswith(DATA_SUFFIXES) and not Path(path).exists()


def as_source(value: Any) -> Any:
    return source_from_string(value) if isinstance(value, str) else value


def as_source_list(value: Any) -> Any:
    return [as_source(item) for item in (value if isinstance(value, list) else [value])]


def as_eval_sets(value: Any) -> Any:
    """One source, a list of sources (a set each, named after its source) or {name: source or list} -> {name: list}."""
    if value is None:
        return {}
    if isinstance(value, dict) and not value.keys() & Source.model_fields.keys():
        return {name: as_source_list(item) for name, item in value.items()}
    sets: dict[str, list[Any]] = {}
    for item in as_source_list(value):
        parts = item if isinstance(item, dict) else {}
        name = report_label(parts.get("name"), parts.get("preset"), str(parts.get("path", "")))
        if name in sets:
            raise ValueError(f"two evaluation sets are called {name!r}: give each a name, as in {{NAME: SOURCE, ...}}")
        sets[name] = [item]
    return sets


def all_or_no_weights(sources: list[Source]) -> list[Source]:
    without = [source.label_in_reports for source in sources if source.weight is None]
    if without and len(without) < len(sources):
        raise ValueError(f"either all sources of a mix have a weight or none has; without one: {', '.join(without)}")
    return sources


Mix = Annotated[list[Source], Field(min_length=1), AfterValidator(all_or_no_weights)]
TrainSources = Annotated[Mix, BeforeValidator(as_source_list)]
EvalSources = Annotated[dict[str, Mix], BeforeValidator(as_eval_sets)]


# ---- portions ------------------------------------------------------------------------------------------------------

BOUND = r"(?:(\d+(?:\.\d+)?)(%?))?"
PORTION = re.compile(f"{BOUND}:{BOUND}")


@dataclass(frozen=True)
class Bound:
    """One end of a portion: a share of the whole (between 0 and 1), or a number of pairs."""

    amount: Fraction
    is_share: bool

    def position(self, total: int) -> int:
        return min(total, math.floor(self.amount * total if self.is_share else self.amount))


def parse_portion(text: str) -> tuple[Bound, Bound]:
    """`START:STOP`, each a percentage, a number of pairs or nothing -> bounds. Raises ValueError."""
    match = PORTION.fullmatch(text)
    if match is None or text == ":":
        raise ValueError(f"{text!r} is no portion: write START:STOP, each a percentage or a count: :5%, 10%: or :1000")

    def bound(number: str | None, percent: str | None, default: int) -> Bound:
        if number is None:
            return Bound(Fraction(default), is_share=True)
        return Bound(Fraction(number) / 100, is_share=True) if percent else Bound(Fraction(number), is_share=False)

    start, stop = bound(*match.group(1, 2), default=0), bound(*match.group(3, 4), default=1)
    if any(end.is_share and end.amount > 1 for end in (start, stop)):
        raise ValueError(f"portion {text!r} goes beyond 100%")
    if any(not end.is_share and end.amount.denominator > 1 for end in (start, stop)):
        raise ValueError(f"portion {text!r} asks for a part of a pair")
    if stop.amount == 0 or (start.is_share == stop.is_share and start.amount >= stop.amount):
        raise ValueError(f"portion {text!r} is empty: its start is not before its stop")
    return start, stop


def portion_range(text: str, total: int) -> range:
    """Positions of a portion of `total` pairs; percentages are rounded down."""
    start, stop = parse_portion(text)
    return range(start.position(total), stop.position(total))


# ---- tables: where rows are read from ------------------------------------------------------------------------------


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
    if path.exists():
        tables = local_tables(path, source)
    elif match := HUB_FILE.fullmatch(source.path):
        tables = [hub_file(source, *match.groups())]
    elif is_hub_id(source.path):
        tables = [hub_table(source, cache_dir)]
    else:
        raise DataError(f"{source.path}: no such file or folder, and not the form of a hub id (ORG/NAME)")
    return tables


def local_tables(path: Path, source: Source) -> list[Table]:
    if has_splits(path) or (path / "state.json").is_file():
        return [saved_table(path, source)]
    for name in HUB_FIELDS:
        if getattr(source, name) is not None:
            hint = "; rows are chosen with where, or with portion" if name == "split" else ""
            raise DataError(f"{path}: {name} {getattr(source, name)!r} was given, but this is local data{hint}")
    if not path.is_dir():
        return [file_table(path, source.path)]
    files = sorted(file for file in path.iterdir() if file.is_file() and file.name.endswith(DATA_SUFFIXES))
    if not files:
        raise DataError(f"{path}: this folder holds no data file ({', '.join(DATA_SUFFIXES)})")
    return [file_table(file, str(file)) for file in files]


def file_table(path: Path, name: str) -> Table:
    if path.name.endswith(".parquet"):
        read = read_parquet
    elif path.name.endswith((".json", ".json.gz")):
        read = read_json
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        read = read_json_lines
    else:
        raise DataError(f"{name}: unknown kind of file; known are {', '.join(DATA_SUFFIXES)}")
    return Table(name, [path], partial(read, path, name))


def has_splits(path: Path) -> bool:
    """Whether save_to_disk wrote this folder from a DatasetDict."""
    return (path / "dataset_dict.json").is_file()


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
    return Table(name, [Path(file["filename"]) for file in data.cache_files], partial(read_arrow, data))


# ---- rows ----------------------------------------------------------------------------------------------------------


def read_arrow(data: datasets.Dataset) -> Iterator[tuple[int, Any]]:
    number = 0
    for batch in data.with_format("arrow").iter(batch_size=1000):
        for row in batch.to_pylist():
            yield (number := number + 1), row


def read_parquet(path: Path, name: str) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    yield (number := number + 1), row
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{name}: cannot be read as parquet: {one_line(error)}") from error


def read_json(path: Path, name: str) -> Iterator[tuple[int, Any]]:
    """A JSON array of objects; a file that does not begin with [ is read as JSON lines."""
    with open_data(path, name) as file:
        start = read_some(file, name, partial(file.read, 1024))
        if start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            yield from enumerate(parse_json(start + read_some(file, name, file.read), name), start=1)
            return
    yield from read_json_lines(path, name)


def read_json_lines(path: Path, name: str) -> Iterator[tuple[int, Any]]:
    """One JSON object a line; empty lines are passed over but counted."""
    with open_data(path, name) as file:
        number = 0
        while line := read_some(file, name, file.readline):
            number += 1
            if line.strip():
                yield number, parse_json(line.rstrip(), f"{name}:{number}")


def open_data(path: Path, name: str) -> IO[bytes]:
    try:
        return gzip.open(path) if path.name.endswith(".gz") else path.open("rb")
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from error


def read_some(file: IO[bytes], name: str, read: Callable[[], bytes]) -> bytes:
    try:
        return read()
    except (OSError, EOFError, zlib.error) as error:  # damaged or cut-off gzip shows only while reading
        raise DataError(f"{name}: cannot be read: {error}") from error


def parse_json(data: bytes, place: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: is not UTF-8 (byte {error.start + 1} is {data[error.start]:#04x})") from error
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise DataError(f"{place}: is not valid JSON: {error.msg} ({line}column {error.colno})") from error


# ---- pairs of one source -------------------------------------------------------------------------------------------

MESSAGES = [{"role": datasets.Value("string"), "content": datasets.Value("string")}]
FEATURES = datasets.Features(
    {
        "prompt": MESSAGES,
        "chosen": MESSAGES,
        "rejected": MESSAGES,
        "margin": datasets.Value("float32"),
        "source": datasets.Value("string"),
        "id": datasets.Value("string"),
        "outcome": datasets.Value("string"),
    }
)
"""`outcome` is "" for a pair that is used, else the reason why it is not. Rows that are no pair have empty messages."""


def read_source(source: Source, cache_dir: Path | None) -> datasets.Dataset:
    """All rows of a source as pairs with the outcome of the row filters: FEATURES, in reading order, before `portion`,
    `max_pairs` and `weight`. Kept on disk under a key of the files' state, the source and the version of the formats.

    Raises:
        DataError: naming file and row.
    """
    tables = find_tables(source, cache_dir)
    try:
        return datasets.Dataset.from_generator(
            partial(outcomes_of_rows, tables, source),
            features=FEATURES,
            cache_dir=None if cache_dir is None else str(cache_dir),
            fingerprint=content_key(tables, source),
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from None
        raise


def content_key(tables: list[Table], source: Source) -> str:
    """Hexadecimal key of what `read_source` depends on."""
    stamps = [
        [table.name, [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in table.files]]
        for table in tables
    ]
    fields = {name: getattr(source, name) for name in Source.model_fields if name not in SELECTION_FIELDS}
    return digest([FORMAT_VERSION, fields, stamps])


def digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def outcomes_of_rows(tables: list[Table], source: Source) -> Iterator[dict[str, Any]]:
    """Rows of FEATURES. The format is recognised by the first row that passes the row filter."""
    format_name = None if source.format == "auto" else source.format
    filter_outcome = "row filter " + "&".join(f"{name}={as_text(value)}" for name, value in source.where.items())
    values: dict[str, Counter[str]] = {name: Counter() for name in source.where}
    fields: dict[str, None] = {}  # a set that keeps the order
    total = passed = 0
    for table in tables:
        for number, content in table.rows():
            row_id = f"{table.name}:{number}"
            if not isinstance(content, dict):
                raise DataError(f"{row_id}: is {in_words(content)}, expected an object with fields")
            row = Row(content, row_id, source.label_in_reports)
            total += 1
            fields |= dict.fromkeys(content)
            for name, counter in values.items():
                if name in content:
                    counter[as_text(content[name])] += 1
            if any(as_text(content.get(name)) != as_text(value) for name, value in source.where.items()):
                yield unused(row, filter_outcome)
                continue
            passed += 1
            format_name = format_name or detect_format(row)
            if source.exactly_one_safe and format_name != "safe_rlhf":
                raise DataError(
                    f"{row_id}: exactly_one_safe was given, but these are rows of format {format_name}, not safe_rlhf"
                )
            pair = read_pair(row, format_name, source)
            if isinstance(pair, Dropped):
                yield unused(row, pair.reason)
            else:
                yield {name: getattr(pair, name) for name in pair.__slots__} | {"outcome": ""}
    name = source.path
    if not total:
        raise DataError(f"{name}: holds no rows")
    for field_name, counter in values.items():
        if not counter:
            known = ", ".join(fields)
            raise DataError(f"{name}: no row has the field {field_name!r} of the row filter (fields: {known})")
    if not passed:
        seen = "; ".join(f"{field_name} is {most_common(counter)}" for field_name, counter in values.items())
        raise DataError(f"{name}: {filter_outcome} leaves none of {total:,} rows ({seen})")


def unused(row: Row, reason: str) -> dict[str, Any]:
    source = row.fields.get("source")
    return {
        "prompt": [],
        "chosen": [],
        "rejected": [],
        "margin": None,
        "source": source if isinstance(source, str) and source else row.source_name,
        "id": row.id,
        "outcome": reason,
    }


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


# ---- selection and mixing: functions on lists of outcomes ----------------------------------------------------------


def usable(outcomes: list[str]) -> list[int]:
    """Positions of the pairs that are still in use."""
    return [position for position, outcome in enumerate(outcomes) if not outcome]


def keep_only(outcomes: list[str], kept: set[int], reason: str) -> list[str]:
    """Outcomes in which the pairs in use that are not in `kept` have `reason`."""
    return [outcome or ("" if n in kept else reason) for n, outcome in enumerate(outcomes)]


def take_portion(outcomes: list[str], portion: str) -> list[str]:
    positions = usable(outcomes)
    chosen = portion_range(portion, len(positions))
    return keep_only(outcomes, set(positions[chosen.start : chosen.stop]), "outside portion")


def take_random(outcomes: list[str], count: int, reason: str, seed: str) -> list[str]:
    """A random choice of `count` pairs in use that depends on `seed` alone."""
    positions = usable(outcomes)
    return keep_only(outcomes, set(random.Random(seed).sample(positions, min(count, len(positions)))), reason)


def select(outcomes: list[str], source: Source, seed: int) -> list[str]:
    """Apply a source's portion, then its max_pairs. Raises DataError if no pair is left."""
    if source.portion is not None:
        outcomes = take_portion(outcomes, source.portion)
    if source.max_pairs is not None:
        outcomes = take_random(outcomes, source.max_pairs, "over max_pairs", f"max_pairs {seed}")
    if not usable(outcomes):
        counts = ", ".join(f"{reason}: {count:,}" for reason, count in Counter(outcomes).most_common())
        raise DataError(f"{source.label_in_reports}: no pair is left of {len(outcomes):,} rows ({counts})")
    return outcomes


def mixed_counts(available: list[int], weights: list[float]) -> list[int]:
    """Pairs to take of each source so that their shares are the weights' and the scarcest source is used in full."""
    scarcest = min(range(len(weights)), key=lambda n: available[n] / weights[n])
    unit = Fraction(available[scarcest]) / Fraction(weights[scarcest])
    return [min(count, round(Fraction(weight) * unit)) for count, weight in zip(available, weights)]


def mix(outcomes: list[list[str]], sources: list[Source], seed: int) -> list[list[str]]:
    """Apply the weights, if there are any: no pair is used twice. Raises DataError if a source would get no pair."""
    if any(source.weight is None for source in sources):
        return outcomes
    available = [len(usable(of_source)) for of_source in outcomes]
    counts = mixed_counts(available, [source.weight for source in sources])
    if 0 in counts:
        raise DataError(
            "the weights leave a source without pairs: "
            + ", ".join(
                f"{source.label_in_reports} (weight {source.weight:g}) gets {count:,} of {total:,}"
                for source, count, total in zip(sources, counts, available)
            )
        )
    return [
        take_random(of_source, count, "over mixing weight", f"mix {seed} {n}")
        for n, (of_source, count) in enumerate(zip(outcomes, counts))
    ]


def read_pairs(sources: list[Source], *, role: Role, seed: int, cache_dir: Path | None) -> datasets.Dataset:
    """Read, select and mix: all rows of all sources, one after another, with FEATURES.

    Args:
        role: which part of a preset is meant.
        seed: of the random choices of max_pairs and mixing.
        cache_dir: where rows are kept between runs; None is the cache folder of datasets.

    Raises:
        DataError: for data that cannot be read or that leaves no pair.
    """
    try:
        all_or_no_weights(sources)
    except ValueError as error:
        raise DataError(str(error)) from None
    sources = [resolve_preset(source, role) for source in sources]
    tables = [read_source(source, cache_dir) for source in sources]
    selected = [select(table["outcome"][:], source, seed) for table, source in zip(tables, sources)]
    outcomes = [outcome for of_source in mix(selected, sources, seed) for outcome in of_source]
    # The fingerprint keys whatever is computed from these pairs; the one datasets would make differs from run to run.
    fingerprint = digest([[table._fingerprint for table in tables], outcomes])
    rows = datasets.concatenate_datasets(tables).remove_columns("outcome")
    return rows.add_column("outcome", outcomes, feature=FEATURES["outcome"], new_fingerprint=fingerprint)
