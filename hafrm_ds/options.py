"""Reading options: YAML files and a command line become an instance of a schema, every fault named at once.

arguments -> nested mapping -> instance of the schema (or one ConfigError), before any model is loaded. A schema is a
`Section`: its fields are the options, their types the rules, and the docstrings under them the help.
"""

import copy
import difflib
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Generic, Literal, NoReturn, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from hafrm_ds.data.presets import PRESETS
from hafrm_ds.data.sources import Source
from hafrm_ds.errors import ConfigError


class YamlLoader(yaml.SafeLoader):
    """YAML as `yaml.safe_load` reads it, except that a key which stands twice in a mapping is an error: it takes the
    last one in silence."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        met = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in met:
                problem = f"{key.value!r} stands twice in one mapping"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
            met.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return node


def from_yaml(text: str) -> Any:
    """Raises yaml.YAMLError."""
    return yaml.load(text, YamlLoader)


class Section(BaseModel):
    """One group of options. Unknown keys are refused; the docstring under a field is its help."""

    model_config = ConfigDict(
        extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )

    def contradictions(self) -> list[str]:
        """Rules between options: one message for each that is broken."""
        return []

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


S = TypeVar("S", bound=Section)


def read(
    schema: type[S],
    arguments: Sequence[str],
    *,
    about: str = "",
    positional: Sequence[str] = (),
    short: Mapping[str, str] | None = None,
    rules: Callable[[S], list[str]] = lambda options: [],
) -> S:
    """Read the options of a schema from command-line arguments.

    Arguments: `--config FILE` (YAML, may be left out), then any number of `--section.key value` or
    `--section.key=value`, values in YAML notation. A list may also be written as several words, a switch as its name
    alone. `--help` and `--print_config` print and leave.

    Args:
        about: what `--help` says before the options.
        positional: options that are given by words without a name, in this order; a list takes all that are left.
        short: a name that the entry file gives to an option -> its dotted name in the schema.
        rules: says what is wrong with options that are sound by themselves, beside `schema.contradictions`.

    Raises:
        ConfigError: with all faults: unknown keys (and the nearest valid one), wrong types, contradictions.
    """
    line = CommandLine(schema, positional, short or {})
    if "--help" in arguments or "-h" in arguments:
        leave_with(f"{about.strip()}\n\n{line.help_text()}\n")
    tree, print_only = line.tree_of(arguments)
    options, problems = line.validate(tree)
    if options is not None:
        problems = options.contradictions() + rules(options)
    if options is None or problems:
        raise ConfigError(problems)
    if print_only:
        leave_with(options.to_yaml())
    return options


@dataclass(frozen=True)
class CommandLine(Generic[S]):
    """The options of an entry file, and the names that they have there (see `read`)."""

    schema: type[S]
    positional: Sequence[str]
    short: Mapping[str, str]

    # ---- words ------------------------------------------------------------------------------------------------------

    def tree_of(self, arguments: Sequence[str]) -> tuple[dict[str, Any], bool]:
        """Arguments -> (nested mapping of raw values, whether --print_config was given)."""
        fields = dict(option_fields(self.schema))
        print_only, problems = False, []
        files: list[Path] = []
        overrides: list[tuple[str, list[str]]] = []  # dotted name, words of the value
        groups: list[list[str]] = [[""]]  # a name and the words up to the next
        for word in arguments:
            if word.startswith("--"):
                groups.append([word.removeprefix("--")])
            else:
                groups[-1].append(word)
        alone = groups[0][1:]
        for option, *words in groups[1:]:
            name, equals, inline = option.partition("=")
            name = self.short.get(name, name)
            field = fields.get(name)
            most = 0 if equals or name == "print_config" else 1
            if most and field is not None and takes_several(field.annotation):
                most = len(words)
            given = [inline] if equals else words[:most]
            alone += words[most:]
            if not given and field is not None and bool in members(field.annotation):
                given = ["true"]
            if name == "print_config":
                print_only = True
            elif not given and (name == "config" or field is not None):
                problems.append(f"--{self.shown(name)} has no value")
            elif not given:
                problems.append(f"--{self.shown(name)}: unknown option; {self.nearest(name)}")
            elif name == "config":
                files.append(Path(given[0]))
            elif name not in ("local_rank", "local-rank"):  # appended by the deepspeed launcher
                overrides.append((name, given))
        for name in self.positional:
            if alone:
                number = len(alone) if takes_several(fields[name].annotation) else 1
                overrides.append((name, alone[:number]))
                alone = alone[number:]
        problems[:0] = [f"{word!r} stands alone: options look like {self.example()}" for word in alone]

        tree: dict[str, Any] = {}
        for file in files:
            content, more = read_mapping(file)
            problems += more
            merge(tree, content)
        for name, spelled in overrides:
            values = []
            for word in spelled:
                try:
                    values.append(value_of(word, name in fields and takes_text(fields[name].annotation)))
                except yaml.YAMLError as error:
                    fault = "is no valid YAML; put texts that hold ? or : in quotes"
                    if isinstance(error, yaml.constructor.ConstructorError):
                        fault = str(error.problem)
                    problems.append(f"--{self.shown(name)} {word}: {fault}")
            node: Any = values[0] if len(values) == 1 else values
            for key in reversed(name.split(".")):
                node = {key: node}
            merge(tree, node)
        if problems:
            raise ConfigError(problems)
        return tree, print_only

    def example(self) -> str:
        has_sections = any(section_of(field.annotation) for field in self.schema.model_fields.values())
        return "--section.key value" if has_sections else "--name value"

    # ---- faults -----------------------------------------------------------------------------------------------------

    def validate(self, tree: dict[str, Any]) -> tuple[S | None, list[str]]:
        """Check types and names. With faults: (None, their messages and those of contradictions in the sound rest)."""
        try:
            return self.schema.model_validate(tree), []
        except ValidationError as error:
            faults = error.errors()
        # A faulty option now has its default: a contradiction with that would be none of the user's.
        faulty = {".".join(map(str, fault["loc"][:2])) for fault in faults if fault["type"] != "extra_forbidden"}
        rest = self.sound_rest(tree, faults)
        contradictions = [] if rest is None else rest.contradictions()
        return None, [
            *(problem for fault in faults for problem in self.describe(fault)),
            *(each for each in contradictions if not any(option in each for option in faulty)),
        ]

    def sound_rest(self, tree: dict[str, Any], faults: Sequence[Any]) -> S | None:
        """The options without the faulty ones; what is required and lacking is filled, if a text will do."""
        rest = copy.deepcopy(tree)
        for _ in range(2):  # what is required and faulty is lacking in the second round
            for fault in faults:
                if fault["type"] != "missing":
                    remove(rest, fault["loc"])
                    continue
                for option in required_options(self.schema, ".".join(map(str, fault["loc"]))):
                    *sections, key = option.split(".")
                    node = rest
                    for section in sections:
                        node = node.setdefault(section, {})
                    node[key] = "."
            try:
                return self.schema.model_validate(rest)
            except ValidationError as error:
                faults = error.errors()
        return None  # what can be named has been

    def describe(self, fault: Any) -> list[str]:
        """One fault of pydantic in words: the option, what is wrong, and the nearest valid name or the given value. A
        section that is missing stands for each of its required options."""
        name = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            return [f"{self.shown(name)}: unknown option; {self.nearest(name)}"]
        if fault["type"] == "missing":
            missing = map(self.shown, required_options(self.schema, name))
            return [f"{option}: is required and was not given" for option in missing]
        message = fault["msg"].removeprefix("Value error, ")
        given = fault["input"]
        is_named = isinstance(given, str) and repr(given) in message
        said = f"{message[0].lower() + message[1:]}" + ("" if is_named else f" (given: {given!r})")
        return [f"{self.shown(name)}: {said}" if name else message]

    def shown(self, name: str) -> str:
        """An option by the name that it has in this entry file."""
        for short, full in self.short.items():
            if name == full or name.startswith(f"{full}."):
                return short + name.removeprefix(full)
        return name

    def nearest(self, name: str) -> str:
        """The option that an unknown name may have meant: a sibling with a like name first, then any option or
        section."""
        section, _, leaf = name.lstrip("-").rpartition(".")
        known = [self.shown(option) for option in (*self.schema.model_fields, *option_names(self.schema))]
        # Deepest first, so that of two options with the same last part the one with the shorter name counts.
        options = sorted(dict.fromkeys(known), key=lambda option: option.count("."))
        everywhere = {option.split(".")[-1]: option for option in reversed(options)}
        siblings = {option.split(".")[-1]: option for option in options if option.rpartition(".")[0] == section}
        for names, cutoff in ((siblings, 0.6), (everywhere, 0.8)):
            if near := difflib.get_close_matches(leaf, names, n=1, cutoff=cutoff):
                return f"did you mean {names[near[0]]}?"
        return f"{section} has {', '.join(siblings)}" if section and siblings else "--help lists all options"

    # ---- help -------------------------------------------------------------------------------------------------------

    def help_text(self) -> str:
        """The options section by section, then how a source of data may be written, if there are any."""
        lines = [
            "Options:",
            "",
            "  --config FILE.yaml  options from a file; options after it override",
            "  --print_config      print the resolved options and leave",
            *self.section_lines(self.schema, ""),
        ]
        if any(" source" in line or "source," in line for line in lines if line.startswith("  --")):
            lines += ["", *wrapped(ABOUT_SOURCES)]
            for name, field in Source.model_fields.items():
                lines += option_lines(f"  {name}", field)
        return "\n".join(lines)

    def section_lines(self, section: type[BaseModel], prefix: str) -> list[str]:
        lines = []
        # What must be given comes first, and the sections inside this one last.
        fields = sorted(section.model_fields.items(), key=lambda item: not item[1].is_required())
        for name, field in fields:
            if not section_of(field.annotation):
                shown = self.shown(prefix + name)
                title = f"  {shown.upper()}" if name in self.positional else f"  --{shown}"
                lines += option_lines(title, field)
        for name, field in section.model_fields.items():
            if inner := section_of(field.annotation):
                lines += ["", *wrapped(f"{prefix}{name}: {inner.__doc__}")]
                lines += self.section_lines(inner, f"{prefix}{name}.")
        return lines


def leave_with(text: str) -> NoReturn:
    """Print and end the program; under a launcher, where every rank reads the same options, one of them prints."""
    if os.environ.get("RANK", "0") == "0":
        print(text, end="")
    sys.exit(0)


def read_mapping(file: Path) -> tuple[dict[str, Any], list[str]]:
    """A YAML file -> (its mapping, what is wrong with it)."""
    try:
        content = from_yaml(file.read_text()) or {}
    except (OSError, UnicodeDecodeError) as error:
        return {}, [f"--config {file}: cannot be read: {getattr(error, 'strerror', None) or error}"]
    except yaml.YAMLError as error:
        return {}, [f"--config {file}: is not valid YAML: {' '.join(str(error).split())}"]
    if not isinstance(content, dict):
        return {}, [f"--config {file}: holds a {type(content).__name__}, not a mapping of options"]
    return content, []


def value_of(word: str, is_text: bool) -> Any:
    """A word in YAML notation -> its value. What YAML takes for a number, a date or true stays as it is written where a
    text is wanted, and so does everywhere what it takes for a comment.

    Raises:
        yaml.YAMLError: it looks like a list or mapping and is none.
    """
    try:
        value = from_yaml(word)
    except yaml.YAMLError:
        if word.startswith(("[", "{")):
            raise
        return word
    if "#" in word and not word.startswith(("[", "{", "'", '"')):
        return word
    return word if is_text and not isinstance(value, str | list | dict | None) else value


def merge(tree: dict[str, Any], update: dict[str, Any]) -> None:
    """Lay `update` over `tree` in place: mappings are merged key by key, anything else replaces what was there.

    Data sources are values, not sections: a source given later replaces the whole earlier one.
    """
    for key, value in update.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict) and key not in ("train", "eval"):
            merge(tree[key], value)
        else:
            tree[key] = value


def remove(tree: Any, location: tuple) -> None:
    """Delete the deepest key of `location` that exists in `tree`; tags of unions in the location are passed over."""
    parent, key = None, None
    for part in location:
        if isinstance(tree, dict) and part in tree:
            parent, key, tree = tree, part, tree[part]
    if parent is not None:
        del parent[key]


# ---- what a schema has -----------------------------------------------------------------------------------------------


def section_of(annotation: Any) -> type[Section] | None:
    """The section that a field is, or may be if it is given."""
    return next((kind for kind in members(annotation) if isinstance(kind, type) and issubclass(kind, Section)), None)


def option_fields(schema: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(dotted name, field) of all options of a section and those inside it."""
    for name, field in schema.model_fields.items():
        if inner := section_of(field.annotation):
            yield from option_fields(inner, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def option_names(schema: type[BaseModel]) -> list[str]:
    """Dotted names of all options of a section and those inside it."""
    return [name for name, _ in option_fields(schema)]


def required_options(schema: type[BaseModel], name: str) -> list[str]:
    """An option itself; of a section those inside it that have no default."""
    field = schema.model_fields.get(name)
    inner = None if field is None else section_of(field.annotation)
    if inner is None:
        return [name]
    return [f"{name}.{key}" for key, each in inner.model_fields.items() if each.is_required()]


def members(annotation: Any) -> list[Any]:
    """The types that a value may have, without None."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return members(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [kind for each in get_args(annotation) if each is not NoneType for kind in members(each)]
    return [annotation]


def takes_several(annotation: Any) -> bool:
    """Whether a value may be written as several words."""
    return any(get_origin(kind) in (list, tuple, dict) for kind in members(annotation))


def takes_text(annotation: Any) -> bool:
    """Whether an option is a text, a path, or a list of these."""
    return all(
        takes_text(get_args(kind)[0]) if get_origin(kind) is list else kind in (str, Path)
        for kind in members(annotation)
    )


# ---- types and defaults in words -------------------------------------------------------------------------------------

WIDTH = 100
"""Of lines in a terminal that is as wide."""
INDENT = " " * 8
KINDS = {str: "text", bool: "true | false", Path: "path", Source: "source"}
"""Types by the names that users have for them; others keep their own."""
ABOUT_SOURCES = (
    "source: PATH, a hub id or preset:NAME, with a row filter where wanted (pairs.jsonl?split=test), or in YAML a "
    f"mapping of the fields below. Presets: {', '.join(PRESETS)}."
)


def option_lines(title: str, field: FieldInfo) -> list[str]:
    default = "required" if field.is_required() else f"default: {value_in_words(field.default)}"
    return [f"{title}  {in_words(field.annotation)}  ({default})", *wrapped(field.description or "", INDENT)]


def wrapped(text: str, indent: str = "") -> list[str]:
    text = " ".join(text.split())
    width = min(WIDTH, shutil.get_terminal_size((WIDTH, 1)).columns)
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def value_in_words(value: Any) -> str:
    """As YAML has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(value_in_words, value))}]"
    return "none" if value in (None, "", {}) else str(value)


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


def as_list(value: Any) -> Any:
    """One value may stand for a list of one (a validator of pydantic, before the type is checked)."""
    return value if isinstance(value, list) else [value]
