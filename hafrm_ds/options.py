"""Reading a configuration: YAML files and dotted overrides from the command line, every fault named at once.

arguments -> nested mapping -> TrainConfig (or one ConfigError), before any model is loaded
"""

import difflib
import os
import sys
import textwrap
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from hafrm_ds.config import Section, TrainConfig, contradictions, option_names
from hafrm_ds.data.presets import PRESETS
from hafrm_ds.data.sources import Source
from hafrm_ds.engine.deepspeed_config import deepspeed_contradictions, read_deepspeed_json
from hafrm_ds.errors import ConfigError


def load_config(
    arguments: list[str], schema: type[TrainConfig] = TrainConfig, *, about: str = "", own: Collection[str] = ()
) -> TrainConfig:
    """Build the configuration from command-line arguments.

    Arguments: `--config FILE` (YAML, may be left out), then any number of `--section.key value` or
    `--section.key=value`, values in YAML notation. `--help` and `--print_config` print and leave.

    Args:
        about: what `--help` says before the options.
        own: names of the options that the entry file has read itself: a mistyped one may have meant one of these.

    Raises:
        ConfigError: with all faults: unknown keys (and the nearest valid one), wrong types, contradictions between
            options or with the DeepSpeed JSON.
    """
    speaks = os.environ.get("RANK", "0") == "0"  # under a launcher every rank reads the same options
    if "--help" in arguments or "-h" in arguments:
        if speaks:
            print(f"{about.strip()}\n\n{help_text(schema)}")
        sys.exit(0)
    nearest = partial(nearest_option, schema=schema, own=own)
    tree, print_only = read_arguments(arguments, nearest)
    config = validate(tree, schema, nearest)
    if print_only:
        if speaks:
            print(config.to_yaml(), end="")
        sys.exit(0)
    return config


def read_arguments(arguments: list[str], nearest: Callable[[str], str]) -> tuple[dict, bool]:
    """Arguments -> (nested mapping of raw values, whether --print_config was given)."""
    print_only, files, overrides, problems = False, [], [], []
    words = list(reversed(arguments))
    while words:
        word = words.pop()
        if not word.startswith("--"):
            problems.append(f"{word!r} stands alone: options look like --section.key value")
            continue
        name, equals, rest = word[2:].partition("=")
        value: str | None = rest
        if name == "print_config":
            print_only = True
            continue
        if not equals:
            value = words.pop() if words and not words[-1].startswith("--") else None
        if value is None:
            is_known = name == "config" or name in option_names(TrainConfig)
            problems.append(f"--{name} has no value" if is_known else f"--{name}: unknown option; {nearest(name)}")
        elif name == "config":
            files.append(Path(value))
        elif name not in ("local_rank", "local-rank"):  # appended by the deepspeed launcher
            overrides.append((name, value))

    tree: dict[str, Any] = {}
    for file in files:
        try:
            content = yaml.safe_load(file.read_text())
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"--config {file}: cannot be read: {getattr(error, 'strerror', None) or error}")
            continue
        except yaml.YAMLError as error:
            problems.append(f"--config {file}: is not valid YAML: {' '.join(str(error).split())}")
            continue
        if not isinstance(content or {}, dict):
            problems.append(f"--config {file}: holds a {type(content).__name__}, not a mapping of options")
            continue
        merge(tree, content or {})
    for name, value in overrides:
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            parsed = value
            if value.startswith(("[", "{")):  # anything else is a text, as it stands
                problems.append(f"--{name} {value}: is no valid YAML; put texts that hold ? or : in quotes")
        *sections, key = name.split(".")
        node = {key: parsed}
        for section in reversed(sections):
            node = {section: node}
        merge(tree, node)
    if problems:
        raise ConfigError(problems)
    return tree, print_only


def merge(tree: dict, update: dict) -> None:
    """Lay `update` over `tree` in place: mappings are merged key by key, anything else replaces what was there.

    Data sources are values, not sections: a source given later replaces the whole earlier one.
    """
    for key, value in update.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict) and key not in ("train", "eval"):
            merge(tree[key], value)
        else:
            tree[key] = value


def validate(tree: dict, schema: type[TrainConfig], nearest: Callable[[str], str]) -> TrainConfig:
    """Raw mapping -> configuration; raises ConfigError with every fault.

    After the first round of faults the faulty values are left out and the rest is checked once more, so that
    contradictions elsewhere are named in the same message.
    """
    config, problems = try_schema(tree, schema, nearest)
    if config is not None:
        deepspeed_json, more = read_deepspeed_json(config.deepspeed)
        problems = contradictions(config) + more
        if deepspeed_json is not None:
            problems += deepspeed_contradictions(deepspeed_json, config)
    if config is None or problems:
        raise ConfigError(problems)
    return config


PLACEHOLDERS = {("output_dir",): ".", ("model", "name_or_path"): ".", ("data", "train"): "."}


def try_schema(
    tree: dict, schema: type[TrainConfig], nearest: Callable[[str], str]
) -> tuple[TrainConfig | None, list[str]]:
    """Validate types and names. With faults: (None, their messages and those of contradictions in the sound rest)."""
    try:
        return schema.model_validate(tree), []
    except ValidationError as error:
        faults = error.errors()
    problems = [problem for fault in faults for problem in describe(dict(fault), schema, nearest)]
    sound = yaml.safe_load(yaml.safe_dump(tree))
    for fault in faults:
        remove(sound, fault["loc"])
    for location, value in PLACEHOLDERS.items():
        node = sound
        for key in location[:-1]:
            node = node.setdefault(key, {})
        node.setdefault(location[-1], value)
    # A faulty option now has its default: a contradiction with that would be none of the user's.
    faulty = {".".join(map(str, fault["loc"][:2])) for fault in faults if fault["type"] != "extra_forbidden"}
    try:
        for problem in contradictions(schema.model_validate(sound)):
            if not any(option in problem for option in faulty):
                problems.append(problem)
    except ValidationError:
        pass  # the first round has named what can be named
    return None, problems


def remove(tree: Any, location: tuple) -> None:
    """Delete the deepest key of `location` that exists in `tree`; tags of unions in the location are passed over."""
    parent, key = None, None
    for part in location:
        if isinstance(tree, dict) and part in tree:
            parent, key, tree = tree, part, tree[part]
    if parent is not None:
        del parent[key]


def describe(fault: dict[str, Any], schema: type[BaseModel], nearest: Callable[[str], str]) -> list[str]:
    """One fault of pydantic in words: the option, what is wrong, and the nearest valid name or the given value. A
    section that is missing stands for each of its required options."""
    name = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return [f"{name}: unknown option; {nearest(name)}"]
    if fault["type"] == "missing":
        return [f"{option}: is required and was not given" for option in required_options(schema, name)]
    message = fault["msg"].removeprefix("Value error, ")
    given = fault["input"]
    is_named = isinstance(given, str) and repr(given) in message
    return [f"{name}: {message[0].lower() + message[1:]}" + ("" if is_named else f" (given: {given!r})")]


def required_options(schema: type[BaseModel], name: str) -> list[str]:
    """An option itself; of a section those inside it that have no default."""
    field = schema.model_fields.get(name)
    if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, Section)):
        return [name]
    return [f"{name}.{key}" for key, inner in field.annotation.model_fields.items() if inner.is_required()]


def nearest_option(name: str, schema: type[BaseModel], own: Collection[str]) -> str:
    """The option that an unknown name may have meant: a sibling with a like name first, then any option or section."""
    section, _, leaf = name.rpartition(".")
    # Deepest first, so that of two options with the same last part the one with the shorter name counts.
    options = sorted([*own, *schema.model_fields, *option_names(schema)], key=lambda option: option.count("."))
    everywhere = {option.split(".")[-1]: option for option in reversed(options)}
    siblings = {option.split(".")[-1]: option for option in options if option.rpartition(".")[0] == section}
    for known, cutoff in ((siblings, 0.6), (everywhere, 0.8)):
        if near := difflib.get_close_matches(leaf, known, n=1, cutoff=cutoff):
            return f"did you mean {known[near[0]]}?"
    return f"{section} has {', '.join(siblings)}" if section and siblings else "--help lists all options"


# ---- help -----------------------------------------------------------------------------------------------------------

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
