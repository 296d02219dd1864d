"""Data sources: what a user may write under data.train and data.eval.

Importing this loads nothing heavy: the configuration does so before anything is read.
"""

import difflib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl

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

from hafrm_ds.data.formats import COMMON_COLUMNS, FORMATS
from hafrm_ds.data.formats.ranked import Ranking
from hafrm_ds.data.portions import parse_portion
from hafrm_ds.data.presets import PRESETS, Role
from hafrm_ds.errors import DataError

DATA_SUFFIXES = (
    *(".jsonl", ".json", ".jsonl.gz", ".json.gz", ".ndjson", ".ndjson.gz", ".parquet"),
    *(".csv", ".tsv", ".csv.gz", ".tsv.gz"),
)
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
HUB_FILE = re.compile(r"hf://datasets/([^/]+/[^/]+)/(.+)")
HUB_FIELDS = ("config", "data_dir", "revision", "split")
"""Fields of a `Source` that say which part of a hub data set is meant."""


class Source(BaseModel):
    """One data source.

    On the command line a source is one string: a path, a hub id or `preset:NAME`, with an optional row filter:
    `pairs.jsonl?split=train`. For a hub id or a preset the keys `split` and `config` choose what is loaded instead of
    filtering rows.
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    path: str = ""
    """A file (json, jsonl or ndjson, csv, tsv, also with .gz; parquet), a folder of them, a folder written by datasets'
    save_to_disk, a hub id (ORG/NAME), or a file of a hub data set (hf://datasets/ORG/NAME/FILE)."""
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
    save_to_disk (default for both: train), or of a folder of shards named SPLIT-00000-of-00001."""
    where: dict[str, str | int | float | bool | None] = {}
    """Keep only rows whose fields have these values (compared as text: true, false and null are written so)."""
    format: str = "auto"
    """Row format; auto recognises it from the columns."""
    columns: dict[str, str] = {}
    """What columns are called in this source, for layouts that auto does not know: {prompt: question, chosen: good,
    rejected: bad}. The names on the left are those of a known format."""
    roles: dict[str, Literal["system", "user", "assistant", "developer"]] = {}
    """Names of roles in this source beside the known ones: {customer: user, agent: assistant}."""
    ignore_columns: list[str] = []
    """Columns to leave unread, though the format would read them or their names speak of the conversation."""
    ranking: Ranking = "all"
    """Rows that rank or rate several answers: which are compared. All of different rank; the best with each other one;
    or each with those of the next rank."""
    min_score_gap: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Compare two answers only where their scores differ by this much at least, or their margin is as large; without
    scores and margin nothing is compared."""
    max_answers: Annotated[int, Field(ge=2)] | None = None
    """Cap of the answers to a prompt: the best, the worst and a choice of others, which depends on the row alone."""
    group_by_prompt: bool = False
    """Join the rows of this source with the same prompt (and the same `source`) into one group, which takes as much
    memory as the source."""
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
    reward_loss: bool = True
    """false: the pairs of this training source train the policy loss alone, as pairs that the reward head has labelled
    should."""
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

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, columns: dict[str, str]) -> dict[str, str]:
        known = {*COMMON_COLUMNS, *(name for each in FORMATS.values() for name in (*each.columns, *each.also_reads))}
        for name in columns:
            if name not in known:
                raise ValueError(f"no format has a column {name!r}{suggestion(name, known)} (write {{prompt: COLUMN}})")
        for column in columns.values():
            if len(names := [name for name, theirs in columns.items() if theirs == column]) > 1:
                raise ValueError(f"{' and '.join(names)} cannot both be read from the column {column!r}")
        return columns

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


def is_hub_id(path: str) -> bool:
    return HUB_ID.fullmatch(path) is not None and not path.lower().endswith(DATA_SUFFIXES) and not is_there(path)


def is_there(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # a name too long for the file system
        return False


def has_splits(path: Path) -> bool:
    """Whether save_to_disk wrote this folder from a DatasetDict."""
    return (path / "dataset_dict.json").is_file()


def report_label(name: str | None, preset: str | None, path: str) -> str:
    return name or preset or (Path(path).name.split(".")[0] if is_there(path) else path)


def suggestion(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def resolve_preset(source: Source, role: Role) -> Source:
    """The source with the fields of its preset for this role filled in, wherever the user gave none.

    When the user points the preset at local data, what names a place on the hub is left out: a local file has no split.
    A folder that holds several splits keeps it.
    """
    if source.preset is None:
        return source
    preset = PRESETS[source.preset]
    fields = preset.both | (preset.train if role == "train" else preset.eval)
    if source.path and is_there(source.path):
        kept = ("split",) if has_splits(Path(source.path)) else ()
        fields = {name: value for name, value in fields.items() if name not in HUB_FIELDS or name in kept}
    given = {name: getattr(source, name) for name in source.model_fields_set}
    return type(source).model_validate(fields | given)


# ---- how it may be written -----------------------------------------------------------------------------------------


def source_from_string(text: str) -> dict[str, Any]:
    """`path?field=value&field=value` -> mapping of Source fields. Raises DataError for a field that is given twice."""
    path, _, query = text.partition("?")
    wanted = parse_qsl(query.replace("+", "%2B"), keep_blank_values=True)  # a plus is none of a web form's spaces
    where: dict[str, Any] = dict(wanted)
    if len(where) < len(wanted):
        raise DataError(f"{text!r} gives a field of its row filter twice, and a row has one value of it")
    fields: dict[str, Any] = {}
    if path.startswith("preset:"):
        fields["preset"] = path.removeprefix("preset:")
    else:
        fields["path"] = path
    if "preset" in fields or is_hub_id(path):
        fields |= {key: where.pop(key) for key in ("split", "config") if key in where}
    return fields | ({"where": where} if where else {})


def as_source(value: Any) -> Any:
    try:
        return source_from_string(value) if isinstance(value, str) else value
    except DataError as error:
        raise ValueError(str(error)) from None


def as_source_list(value: Any) -> Any:
    return [as_source(item) for item in (value if isinstance(value, list) else [value])]


def as_eval_sets(value: Any) -> Any:
    """One source (a set named after it), {name: source or list}, or a list of these -> {name: list of sources}."""
    if value is None or value == {}:
        return {}
    sets: dict[str, list[Any]] = {}
    for item in as_source_list(value):
        parts = item if isinstance(item, dict) else {}
        if parts and not parts.keys() & Source.model_fields.keys():
            named = {name: as_source_list(sources) for name, sources in parts.items()}
        else:
            named = {report_label(parts.get("name"), parts.get("preset"), str(parts.get("path", ""))): [item]}
        for name in named.keys() & sets.keys():
            raise ValueError(f"two evaluation sets are called {name!r}: give each a name, as in {{NAME: SOURCE, ...}}")
        sets |= named
    return sets


def all_or_no_weights(sources: list[Source]) -> list[Source]:
    without = [source.label_in_reports for source in sources if source.weight is None]
    if without and len(without) < len(sources):
        raise ValueError(f"either all sources of a mix have a weight or none has; without one: {', '.join(without)}")
    return sources


Mix = Annotated[list[Source], Field(min_length=1), AfterValidator(all_or_no_weights)]
TrainSources = Annotated[Mix, BeforeValidator(as_source_list)]
EvalSources = Annotated[dict[str, Mix], BeforeValidator(as_eval_sets)]
