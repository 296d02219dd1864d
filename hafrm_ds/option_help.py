"""All options in words: what `--help` prints, from the types, defaults and docstrings of the configuration."""

import textwrap
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from hafrm_ds.config import Section
from hafrm_ds.data.presets import PRESETS
from hafrm_ds.data.sources import Source

WIDTH = 100
INDENT = " " * 8
KINDS = {str: "text", bool: "true | false", Path: "path", Source: "source"}
"""Types by the names that users have for them; others keep their own."""


def help_text(schema: type[BaseModel]) -> str:
    """The options section by section, then how a source of data may be written."""
    lines = [
        "Options of a run:",
        "",
        "  --config FILE.yaml  options from a file; options after it override",
        "  --print_config      print the resolved options and leave",
        *section_lines(schema, ""),
        "",
        *wrapped(
            "source: PATH, a hub id or preset:NAME, with a row filter where wanted (pairs.jsonl?split=test), or "
            f"in YAML a mapping of the fields below. Presets: {', '.join(PRESETS)}."
        ),
    ]
    for name, field in Source.model_fields.items():
        lines += option_lines(f"  {name}", field)
    return "\n".join(lines)


def section_lines(section: type[BaseModel], prefix: str) -> list[str]:
    lines = []
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            lines += ["", *wrapped(f"{prefix}{name}: {field.annotation.__doc__}")]
            lines += section_lines(field.annotation, f"{prefix}{name}.")
        else:
            lines += option_lines(f"  --{prefix}{name}", field)
    return lines


def option_lines(title: str, field: Any) -> list[str]:
    default = "required" if field.is_required() else f"default: {value_in_words(field.default)}"
    return [f"{title}  {in_words(field.annotation)}  ({default})", *wrapped(field.description or "", INDENT)]


def wrapped(text: str, indent: str = "") -> list[str]:
    text = " ".join(text.split())
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def value_in_words(value: Any) -> str:
    """As YAML has it."""
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value in (None, "") else str(value)


def in_words(annotation: Any) -> str:
    """A type as its values are written: `int`, `linear | cosine`, `[float, float]`."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return in_words(inner[0])
    if origin is Literal:
        return " | ".join(map(str, inner))
    if origin in (Union, UnionType):
        return " | ".join(in_words(each) for each in inner if each is not NoneType)
    if origin is list:
        return f"[{in_words(inner[0])}, ...]"
    if origin is tuple:
        return f"[{', '.join(map(in_words, inner))}]"
    if origin is dict:
        return f"{{NAME: {in_words(inner[1])}, ...}}"
    return KINDS.get(annotation, getattr(annotation, "__name__", str(annotation)))
