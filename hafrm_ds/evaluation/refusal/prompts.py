"""Prompts that should be refused and prompts that should not: files of the user, and public sets by name.

Sources of the layouts: XSTest (Röttger et al., arXiv 2308.01263), OR-Bench (Cui et al., 2405.20947), JailbreakBench
(Chao et al., 2404.01318), HarmBench (Mazeika et al., 2402.04249), StrongREJECT (Souly et al., 2402.10260), SORRY-Bench
(Xie et al., 2406.14598). Each is read as it lies on the hub and as its authors' repository has it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hafrm_ds.data.files import find_tables
from hafrm_ds.data.formats import refuse_lost
from hafrm_ds.data.pairs import Message, Row, in_words, names_in_words, user
from hafrm_ds.data.row_filter import RowFilter
from hafrm_ds.data.sources import Source, source_from_string, suggestion
from hafrm_ds.errors import DataError
from hafrm_ds.scoring.prompts import key_of
from hafrm_ds.scoring.rows import BESIDE, prompt_of

HARMFUL, BENIGN = "harmful", "benign"
LABELS = {
    **dict.fromkeys((HARMFUL, "unsafe", "toxic"), True),
    **dict.fromkeys((BENIGN, "safe", "harmless"), False),
}
"""How a row's label may be written, and whether it is of a harmful prompt."""
HARMBENCH_CONTEXT = "{context}\n\n---\n\n{prompt}"
"""How HarmBench puts the context of a behaviour in front of it."""


@dataclass(frozen=True)
class PromptSet:
    """A layout of rows, and where a public set with it lies.

    source: fields of a `Source`; {} of a layout that only files of the user have.
    prompt, category, context: names that the column may have, of which the first that a row has counts; () for a prompt
    that is read as launch/score.py reads it, and for what the rows do not have.
    label: of all rows, or "" where each row has its own.
    """

    title: str
    source: Mapping[str, Any] = field(default_factory=dict)
    prompt: tuple[str, ...] = ()
    category: tuple[str, ...] = ("category",)
    context: tuple[str, ...] = ()
    label: str = ""


HARMFUL_ALONE, BENIGN_ALONE = "of harmful prompts alone", "of benign prompts alone"

PROMPT_SETS = {
    "xstest": PromptSet(
        "XSTest", {"path": "walledai/XSTest", "split": "test"}, prompt=("prompt",), category=("type", "category")
    ),
    "or-bench-hard": PromptSet(
        "OR-Bench, hard benign prompts",
        {"path": "bench-llm/or-bench", "config": "or-bench-hard-1k"},
        prompt=("prompt",),
        label=BENIGN,
    ),
    "or-bench-80k": PromptSet(
        "OR-Bench, all benign prompts",
        {"path": "bench-llm/or-bench", "config": "or-bench-80k"},
        prompt=("prompt",),
        label=BENIGN,
    ),
    "or-bench-toxic": PromptSet(
        "OR-Bench, toxic prompts",
        {"path": "bench-llm/or-bench", "config": "or-bench-toxic"},
        prompt=("prompt",),
        label=HARMFUL,
    ),
    "jailbreakbench-harmful": PromptSet(
        "JailbreakBench, harmful behaviours",
        {"path": "JailbreakBench/JBB-Behaviors", "config": "behaviors", "split": "harmful"},
        prompt=("Goal", "goal"),
        category=("Category", "category"),
        label=HARMFUL,
    ),
    "jailbreakbench-benign": PromptSet(
        "JailbreakBench, benign behaviours",
        {"path": "JailbreakBench/JBB-Behaviors", "config": "behaviors", "split": "benign"},
        prompt=("Goal", "goal"),
        category=("Category", "category"),
        label=BENIGN,
    ),
    "harmbench": PromptSet(
        "HarmBench",
        {"path": "walledai/HarmBench", "config": "standard"},
        prompt=("prompt", "Behavior"),
        category=("SemanticCategory", "category"),
        context=("context", "ContextString"),
        label=HARMFUL,
    ),
    "strongreject": PromptSet(
        "StrongREJECT", {"path": "walledai/StrongREJECT"}, prompt=("prompt", "forbidden_prompt"), label=HARMFUL
    ),
    "sorry-bench": PromptSet(
        "SORRY-Bench",
        {"path": "sorry-bench/sorry-bench-202503", "where": {"prompt_style": "base"}},
        prompt=("turns",),
        label=HARMFUL,
    ),
    HARMFUL: PromptSet(f"a file {HARMFUL_ALONE}", category=("category", "type"), label=HARMFUL),
    BENIGN: PromptSet(f"a file {BENIGN_ALONE}", category=("category", "type"), label=BENIGN),
}
TOGETHER = {
    "or-bench": ("or-bench-hard", "or-bench-toxic"),
    "jailbreakbench": ("jailbreakbench-harmful", "jailbreakbench-benign"),
}
"""Names that stand for several sets."""
LABELLED = PromptSet(f"rows with a prompt and a label ({', '.join(LABELS)})", category=("category", "type"))
"""A file of the user whose rows have labels."""


@dataclass(frozen=True)
class LabelledPrompt:
    """A prompt that should be refused, or one that should not.

    id: FILE:ROW. category: what its set calls its kind; "" of a row without one.
    """

    id: str
    prompt: list[Message]
    is_harmful: bool
    category: str

    @property
    def key(self) -> str:
        return key_of(self.prompt)


def with_last(prompt: list[Message], text: str) -> list[Message]:
    """The prompt with another text in its last message."""
    return [*prompt[:-1], {**prompt[-1], "content": text}]


def parts_of(words: Any) -> list[tuple[str, str]]:
    """What --prompts was given -> (name of a set or "", path or "") of each part: NAME, NAME=PATH or PATH, one or a
    list of them.

    Raises:
        ValueError: a name without a path that only a file can have, or with one that stands for several sets.
    """
    found: list[tuple[str, str]] = []
    for word in map(str, words if isinstance(words, list) else [words]):
        name, has_path, path = word.partition("=")
        if name in TOGETHER and has_path:
            raise ValueError(
                f"{name} stands for several sets: write {' and '.join(f'{n}=PATH' for n in TOGETHER[name])}"
            )
        if name in TOGETHER:
            found += [(each, "") for each in TOGETHER[name]]
        elif name in PROMPT_SETS:
            if not path and not PROMPT_SETS[name].source:
                raise ValueError(f"{name} is written with the file: {name}=PATH")
            found.append((name, path))
        else:
            found.append(("", word))
    return found


def known_parts(words: Any) -> list[str]:
    """What --prompts was given, as a list. Raises ValueError as `parts_of` does."""
    parts_of(words)
    return list(map(str, words if isinstance(words, list) else [words]))


def read_labelled(parts: Sequence[tuple[str, str]], cache_dir: Path | None) -> tuple[list[LabelledPrompt], int]:
    """The prompts of several sets in their order, and how many of these stood there before and are asked once.

    Args:
        parts: as `parts_of` gives them.

    Raises:
        DataError: a set cannot be read, a row is not in its layout, or a prompt is both harmful and benign.
    """
    found: dict[str, LabelledPrompt] = {}
    num_repeated = 0
    for name, path in parts:
        for each in read_set(name, path, cache_dir):
            first = found.setdefault(each.key, each)
            if first.is_harmful != each.is_harmful:
                labels = {True: HARMFUL, False: BENIGN}
                raise DataError(
                    f"{each.id}: the prompt is {labels[each.is_harmful]} here and {labels[first.is_harmful]} in "
                    f"{first.id}; take it out of one of them"
                )
            num_repeated += first is not each
    return list(found.values()), num_repeated


def read_set(name: str, path: str, cache_dir: Path | None) -> list[LabelledPrompt]:
    """The prompts of a set. Raises DataError as `read_labelled` does."""
    layout = PROMPT_SETS.get(name, LABELLED)
    source = Source(**(source_from_string(path) if path else layout.source))
    row_filter = RowFilter(source.where)
    # A file of a public set holds what the set leaves out, too, as SORRY-Bench's other wordings of each request.
    of_set = {field: value for field, value in layout.source.get("where", {}).items() if field not in source.where}
    prompts = []
    try:
        tables = find_tables(source, cache_dir)
    except DataError as error:
        names = (*TOGETHER, *PROMPT_SETS)
        meant = suggestion(path.partition("=")[0], names)
        if name or (not meant and (path.count("/") or Path(path).suffix)):
            raise
        raise DataError(f"--prompts {error}{meant} (sets: {', '.join(names)})") from None
    for table in tables:
        for number, content in table.rows():
            row = Row(content, f"{table.name}:{number}", name)
            if not isinstance(content, dict):
                raise DataError(f"{row.id}: is {in_words(content)}, expected an object with fields")
            if row_filter.passes(content) and all(content.get(each, value) == value for each, value in of_set.items()):
                prompts.append(read_prompt(row, layout))
    row_filter.check_some_passed(source.path)
    if not prompts:
        raise DataError(f"--prompts {source.path}: no row is of {layout.title} ({RowFilter(of_set).description})")
    return prompts


def read_prompt(row: Row, layout: PromptSet) -> LabelledPrompt:
    """A row in a layout. Raises DataError that names the row and the field."""
    if layout.prompt:
        column = named(row, layout.prompt)
        if column is None:
            raise DataError(
                f"{row.id}: has no {' or '.join(layout.prompt)}, which {layout.title} has (fields: "
                f"{names_in_words(row.fields)})"
            )
        prompt = [user(text_of(row, column))]
        if (beside := named(row, layout.context)) is not None and row.fields[beside]:
            prompt = [user(HARMBENCH_CONTEXT.format(context=row.text(beside), prompt=prompt[0]["content"]))]
        read: tuple[str, ...] = (column, *layout.context)
    else:
        prompt, read = prompt_of(row), ("prompt", "messages", *BESIDE)
    if prompt[-1]["role"] != "user" or not prompt[-1]["content"].strip():
        raise DataError(f"{row.id}: the prompt does not end with a message of the user that says something")
    refuse_lost(row, (*read, *layout.category), prompt)
    category = named(row, layout.category)
    return LabelledPrompt(row.id, prompt, label_of(row, layout), "" if category is None else str(row.fields[category]))


def named(row: Row, names: Sequence[str]) -> str | None:
    """The first of these columns that a row has."""
    return next((name for name in names if row.fields.get(name) is not None), None)


def text_of(row: Row, column: str) -> str:
    """A text, or the one text of a list, as SORRY-Bench has its turns."""
    value = row.fields[column]
    if isinstance(value, list):
        if len(value) != 1:
            raise row.fault(f"field {column!r}", value, "a text, or a list of one text")
        [value] = value
    return row.as_text(value, f"field {column!r}", "a text, or a list of one text")


def label_of(row: Row, layout: PromptSet) -> bool:
    """Whether the prompt of a row is harmful."""
    if layout.label:
        return LABELS[layout.label]
    if row.fields.get("label") is None:
        raise DataError(
            f"{row.id}: has no label, which is one of {', '.join(LABELS)} (fields: {names_in_words(row.fields)}). Of a "
            f"file {HARMFUL_ALONE} write {HARMFUL}=PATH, {BENIGN_ALONE} {BENIGN}=PATH"
        )
    label = row.text("label")
    if label.lower() not in LABELS:
        raise row.fault("field 'label'", label, f"one of {', '.join(LABELS)}")
    return LABELS[label.lower()]


# ---- given answers -------------------------------------------------------------------------------------------------

REFUSALS, COMPLIANCES = "refusals", "compliances"


@dataclass(frozen=True)
class GivenAnswers:
    """Answers to one prompt that refuse, and answers that comply; at least one of each."""

    refusals: tuple[str, ...]
    compliances: tuple[str, ...]


def read_answers(path: Path) -> dict[str, GivenAnswers]:
    """Rows of prompt, `refusal` or `refusals`, and `compliance` or `compliances` -> answers by the key of the prompt.
    Rows with the same prompt are taken together.

    Raises:
        DataError: naming the row and the field.
    """
    found: dict[str, GivenAnswers] = {}
    for table in find_tables(Source(path=str(path)), None):
        for number, content in table.rows():
            row = Row(content, f"{table.name}:{number}", "answers")
            if not isinstance(content, dict):
                raise DataError(f"{row.id}: is {in_words(content)}, expected an object with fields")
            key, answers = key_of(prompt_of(row)), [texts_of(row, each) for each in (REFUSALS, COMPLIANCES)]
            before = found.get(key, GivenAnswers((), ()))
            found[key] = GivenAnswers(before.refusals + answers[0], before.compliances + answers[1])
    if not found:
        raise DataError(f"--answers {path}: holds no rows")
    return found


def texts_of(row: Row, field: str) -> tuple[str, ...]:
    """The texts of a field, or the one text of its singular."""
    singular = field.removesuffix("s")
    if row.fields.get(field) is None and row.fields.get(singular) is None:
        raise DataError(f"{row.id}: has neither {singular} nor {field} (fields: {names_in_words(row.fields)})")
    if row.fields.get(field) is None:
        values, field = [row.fields[singular]], singular
    else:
        values = row.fields[field]
    if not isinstance(values, list) or not values:
        raise row.fault(f"field {field!r}", values, "a list of texts")
    texts = tuple(row.as_text(value, f"field {field!r}", "a text") for value in values)
    if not all(text.strip() for text in texts):
        raise DataError(f"{row.id}: field {field!r} has an empty answer")
    return texts
