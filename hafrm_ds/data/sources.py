"""Data sources: what a user may write under data.train and data.eval, and how its rows are read."""

from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class Source(BaseModel):
    """One data source.

    On the command line a source is one string: a path, a hub id or `preset:NAME`, with an optional row filter:
    `pairs.jsonl?split=train`. For a hub id the keys `split` and `config` choose what is loaded instead of filtering rows.
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    path: str = ""
    """A file (json, jsonl, json.gz, jsonl.gz, parquet), a folder of them, a folder written by datasets, or a hub id."""
    preset: str | None = None
    """One of the paper's sets by name; it fills every field not given here."""
    config: str | None = None
    """Configuration on the hub, as in load_dataset(path, config)."""
    data_dir: str | None = None
    """Folder inside a hub data set, as in load_dataset(path, data_dir=...)."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    split: str | None = None
    """Split expression of a hub data set (train, train[:5%], train+test) or of a saved arrow folder."""
    where: dict[str, str | int | float | bool | None] = {}
    """Keep only rows whose fields have these values (compared as text)."""
    format: str = "auto"
    """Row format; auto recognises it from the columns."""
    label: Literal["helpful", "safe"] = "safe"
    """PKU-SafeRLHF and BeaverTails rows: which of their two labels decides."""
    exactly_one_safe: bool = False
    """PKU-SafeRLHF and BeaverTails rows: keep pairs with one safe and one unsafe answer."""
    single_turn: bool = False
    """Keep pairs whose prompt is a single user message."""
    portion: str | None = None
    """Part of the pairs left after the filters above, in reading order: `:5%`, `10%:`, `:1000`."""
    max_pairs: Annotated[int, Field(ge=1)] | None = None
    """Cap: a seeded random choice of this many pairs."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """Share of this source in a mix, relative to the other weights. Without weights every pair of every source is used."""
    name: str | None = None
    """Name in reports. Default: the preset, the file's stem or the hub id."""

    @model_validator(mode="after")
    def _has_origin(self) -> "Source":
        if not self.path and not self.preset:
            raise ValueError("a source needs a path or a preset")
        return self

    @property
    def label_in_reports(self) -> str:
        return self.name or self.preset or (Path(self.path).name.split(".")[0] if Path(self.path).exists() else self.path)


def source_from_string(text: str) -> dict[str, Any]:
    """`path?field=value&field=value` -> mapping of Source fields."""
    path, _, query = text.partition("?")
    where: dict[str, Any] = dict(parse_qsl(query, keep_blank_values=True))
    fields: dict[str, Any] = {}
    if path.startswith("preset:"):
        fields["preset"] = path.removeprefix("preset:")
    else:
        fields["path"] = path
        if not Path(path).exists() and path.count("/") == 1 and not Path(path).suffix:
            fields |= {key: where.pop(key) for key in ("split", "config") if key in where}
    return fields | {"where": where}


def as_source(value: Any) -> Any:
    return source_from_string(value) if isinstance(value, str) else value


def as_source_list(value: Any) -> Any:
    return [as_source(item) for item in (value if isinstance(value, list) else [value])]


def as_eval_sets(value: Any) -> Any:
    """One source, a list of sources (a set each, named after the source), or {name: source or list} -> {name: [Source]}."""
    if value is None:
        return {}
    if isinstance(value, dict) and not value.keys() & Source.model_fields.keys():
        return {name: as_source_list(item) for name, item in value.items()}
    sources = [Source.model_validate(item) for item in as_source_list(value)]
    return {source.label_in_reports: [source] for source in sources}


TrainSources = Annotated[list[Source], BeforeValidator(as_source_list), Field(min_length=1)]
EvalSources = Annotated[dict[str, list[Source]], BeforeValidator(as_eval_sets)]
