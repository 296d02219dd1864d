"""Reading groups of answers: all sources of a set, from their rows to one data set of messages.

    Source -> tables -> rows -> row filter -> PreferenceGroup -> selection and mixing

`read_groups` is the whole way. Every row that was read stays in its result: those that are not used carry the reason.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets

from hafrm_ds.data.files import SHARD, Table, find_tables, holds_whole_set, one_object
from hafrm_ds.data.formats import FORMAT_VERSION, detect_format, is_filled, not_read, read_groups_of
from hafrm_ds.data.formats.parts import UNCOMPARED, best_first, distinct
from hafrm_ds.data.pairs import (
    ROLES,
    Comparison,
    Deselected,
    Dropped,
    Outcome,
    PreferenceGroup,
    Row,
    in_words,
    names_in_words,
    valid_text,
)
from hafrm_ds.data.presets import Role
from hafrm_ds.data.row_filter import RowFilter
from hafrm_ds.data.selection import SELECTION_FIELDS, mix, select
from hafrm_ds.data.sources import Source, all_or_no_weights, resolve_preset
from hafrm_ds.data.tool_calls import spelled
from hafrm_ds.errors import DataError

MESSAGES = [{"role": datasets.Value("string"), "content": datasets.Value("string")}]
COMPARISON_FEATURES = [
    {
        "better": datasets.Value("int32"),
        "worse": datasets.Value("int32"),
        "margin": datasets.Value("float32"),
        "target": datasets.Value("float32"),
        "weight": datasets.Value("float32"),
    }
]
"""The fields of `Comparison`."""
ATTRIBUTE_FEATURES = [[{"name": datasets.Value("string"), "value": datasets.Value("float32")}]]
"""Of each answer."""
FEATURES = datasets.Features(
    {
        "prompt": MESSAGES,
        "answers": [MESSAGES],
        "comparisons": COMPARISON_FEATURES,
        "attributes": ATTRIBUTE_FEATURES,
        "trains_reward": datasets.Value("bool"),
        "source": datasets.Value("string"),
        "id": datasets.Value("string"),
        "format": datasets.Value("string"),
        "dropped": datasets.Value("string"),
        "deselected": datasets.Value("string"),
        "remarks": datasets.Value("string"),
    }
)
"""One row for each row read. A group is used where both `dropped` (why the row is no usable group) and `deselected`
(why it is left out) are "". Rows that are no group have empty lists, as have those without attributes in that column;
rows outside the row filter have no format. `trains_reward` is the `reward_loss` of the source. The messages of a
conversation with tools are spelled in one (`tool_calls`). `remarks` says what else is to be told of the row, one thing
a line: REMARKS."""

NOT_READ, ROLE, MARGIN = "not read: ", "role: ", "margin: "
REMARKS = (NOT_READ, ROLE, MARGIN)
"""What a remark begins with: the name of a filled column that the format does not read; a role that was read as another
("human -> user"); why a margin could not be read."""
HELD_OUT = re.compile(r"(?<![a-z])(test|val|valid|validation|dev|eval)(?![a-z])", re.IGNORECASE)
"""A word in the names of files that are not trained on."""
JOINED = "joined into the group of its prompt"
"""Why a row of a source with group_by_prompt is left out."""


def read_groups(sources: list[Source], *, role: Role, seed: int, cache_dir: Path | None) -> datasets.Dataset:
    """Read, select and mix: all rows of all sources, one after another, with FEATURES.

    Args:
        role: which part of a preset is meant.
        seed: of the random choices of max_pairs and mixing.
        cache_dir: where rows are kept between runs; None is the cache folder of datasets.

    Raises:
        DataError: for data that cannot be read or that leaves no group.
    """
    try:
        all_or_no_weights(sources)
    except ValueError as error:
        raise DataError(str(error)) from None
    sources = [resolve_preset(source, role) for source in sources]
    read = [read_source(source, cache_dir) for source in sources]
    selections = [select(rows["deselected"][:], source, seed) for rows, source in zip(read, sources)]
    for rows, reasons, source in zip(read, selections, sources):
        check_pairs_left(reasons, rows["dropped"][:], source)
    deselected = [reason for of_source in mix(selections, sources, seed) for reason in of_source]
    # The fingerprint keys whatever is computed from these groups; the one datasets would make differs from run to run.
    fingerprint = digest([[rows._fingerprint for rows in read], deselected])
    rows = datasets.concatenate_datasets(read).remove_columns("deselected")
    return rows.add_column("deselected", deselected, feature=FEATURES["deselected"], new_fingerprint=fingerprint)


def selection_key(sources: list[Source], *, role: Role, seed: int, cache_dir: Path | None) -> str:
    """Hexadecimal key of what `read_groups` depends on, found without reading a row. Arguments and errors as there."""
    resolved = [resolve_preset(source, role) for source in sources]
    selections = [{name: getattr(source, name) for name in SELECTION_FIELDS} for source in resolved]
    contents = [content_key(find_tables(source, cache_dir), source) for source in resolved]
    return digest([contents, selections, seed])


def check_pairs_left(deselected: list[str], dropped: list[str], source: Source) -> None:
    """Raise DataError if no row of a source is both selected and usable."""
    counts = Counter(left_out or unusable for left_out, unusable in zip(deselected, dropped))
    if not counts[""]:
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in counts.most_common() if reason)
        raise DataError(f"{source.label_in_reports}: no pair is left of {len(dropped):,} rows ({reasons})")


# ---- one source ----------------------------------------------------------------------------------------------------


def read_source(source: Source, cache_dir: Path | None) -> datasets.Dataset:
    """All rows of a source with FEATURES, in reading order, before `portion`, `max_pairs` and `weight`.

    Kept on disk under a key of the files' state, the source and the version of the formats.

    Raises:
        DataError: naming file and row.
    """
    tables = find_tables(source, cache_dir)
    refuse_several_splits(tables, source)
    try:
        return datasets.Dataset.from_generator(
            partial(joined_rows if source.group_by_prompt else read_rows, tables, source),
            features=FEATURES,
            cache_dir=None if cache_dir is None else str(cache_dir),
            fingerprint=content_key(tables, source),
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from None
        raise


def refuse_several_splits(tables: list[Table], source: Source) -> None:
    """Raise DataError for a folder whose files are of training and of test alike: they are not to be read as one."""
    if len(tables) < 2:
        return
    names = [Path(table.name).name for table in tables]
    splits = sorted({shard["split"] if (shard := SHARD.match(name)) else name.split(".")[0] for name in names})
    held_out = [name for name in splits if HELD_OUT.search(name)]
    if held_out and held_out != splits:
        raise DataError(
            f"{source.path}: holds several splits ({names_in_words(splits)}): give split, for files named "
            "SPLIT-00000-of-00001, or name the files as sources of their own"
        )


def content_key(tables: list[Table], source: Source) -> str:
    """Hexadecimal key of what `read_source` depends on."""
    stamps = [[table.name, [stamp_of(file) for file in table.files]] for table in tables]
    fields = {name: getattr(source, name) for name in Source.model_fields if name not in SELECTION_FIELDS}
    return digest([FORMAT_VERSION, fields, stamps])


def stamp_of(file: Path) -> list[Any]:
    """What tells whether a file has changed, without reading it. Its time of change (ctime) cannot be set back, as the
    time of its content (mtime) is by tools that copy."""
    facts = file.stat()
    return [str(file.resolve()), facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns]


def digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def read_rows(tables: list[Table], source: Source) -> Iterator[dict[str, Any]]:
    """Rows of FEATURES. The format is recognised by the first row that passes the row filter."""
    row_filter = RowFilter(source.where)
    met: dict[str, None] = {}  # columns, in their order
    format_name = None if source.format == "auto" else source.format
    roles, label = ROLES | source.roles, source.label_in_reports
    for table in tables:
        for number, content in table.rows():
            row = Row(content, valid_text(f"{table.name}:{number}"), label, roles)
            if not isinstance(content, dict):
                raise DataError(f"{row.id}: is {in_words(content)}, expected an object with fields")
            if not row_filter.passes(content):
                yield as_features(row, "", Deselected(row_filter.description), source)
                continue
            if source.ignore_columns:
                fields = {name: value for name, value in content.items() if name not in source.ignore_columns}
                row = Row(fields, row.id, label, roles)
            if source.columns:
                met |= dict.fromkeys(row.fields)
                row = Row(renamed(row, source), row.id, label, roles)
            if format_name is None:
                if holds_whole_set(content):
                    raise one_object(row.id, content)
                format_name = detect_format(row)
            if source.exactly_one_safe and format_name != "safe_rlhf":
                raise DataError(
                    f"{row.id}: exactly_one_safe was given, but these are rows of format {format_name}, not safe_rlhf"
                )
            if format_name != "safe_rlhf" and "label" in source.model_fields_set:
                raise DataError(
                    f"{row.id}: label {source.label} was given, but these are rows of format {format_name}, not "
                    "safe_rlhf"
                )
            outcomes = read_groups_of(row, format_name, source)
            ignored = [name for name in source.ignore_columns if name not in source.columns]
            remarks = remarks_on(row, format_name, [name for name in ignored if is_filled(content.get(name))])
            for outcome in outcomes:
                yield as_features(row, format_name, outcome, source, remarks)
                remarks = ""  # of a row with several groups, once
    row_filter.check_some_passed(source.path)
    for name, theirs in source.columns.items():
        if theirs not in met:
            raise DataError(
                f"{source.path}: the source's columns read {name} from {theirs!r}, which no row has (columns: "
                f"{names_in_words(met)})"
            )


def renamed(row: Row, source: Source) -> dict[str, Any]:
    """The fields of a row under the names that `source.columns` gives them.

    Raises:
        DataError: a name is taken by another column of the row, which would be lost.
    """
    names = {theirs: ours for ours, theirs in source.columns.items()}
    taken = [
        name
        for name, theirs in source.columns.items()
        if theirs in row.fields and name in row.fields and name not in names
    ]
    if taken:
        raise DataError(
            f"{row.id}: the source's columns give the name {names_in_words(taken)} to another column, but the row has "
            "one of that name: map it too, or name it in ignore_columns"
        )
    given = {names[name]: value for name, value in row.fields.items() if name in names}
    return {name: value for name, value in row.fields.items() if name not in names and name not in given} | given


def remarks_on(row: Row, format_name: str, ignored: Iterable[str] = ()) -> str:
    """Write down the remarks on a row, a line each (`REMARKS`). `ignored` names columns that were taken out of it."""
    names = [*not_read(row, format_name), *ignored]
    if not names and not row.mapped_roles:
        return ""
    lines = [NOT_READ + " ".join(valid_text(str(name)).split()) for name in names]
    return "\n".join(lines + [f"{ROLE}{written} -> {role}" for written, role in row.mapped_roles.items()])


def as_features(row: Row, format_name: str, outcome: Outcome, source: Source, remarks: str = "") -> dict[str, Any]:
    """What became of a row -> a row of FEATURES."""
    group = outcome if isinstance(outcome, PreferenceGroup) else PreferenceGroup([], (), (), row.source, row.id)
    prompt, answers = group.prompt, list(group.answers)
    if prompt and "tools" in prompt[0]:
        prompt, answers = spelled(prompt), list(map(spelled, answers))
    return {
        "prompt": prompt,
        "answers": answers,
        "comparisons": [comparison._asdict() for comparison in group.comparisons],
        "attributes": [[{"name": name, "value": each[name]} for name in each] for each in group.attributes],
        "trains_reward": source.reward_loss,
        "source": group.source,
        "id": group.id,
        "format": format_name,
        "dropped": outcome.reason if isinstance(outcome, Dropped) else "",
        "deselected": outcome.reason if isinstance(outcome, Deselected) else "",
        "remarks": f"{remarks}\n{MARGIN}{group.margin_fault}".lstrip() if group.margin_fault else remarks,
    }


# ---- rows of one prompt --------------------------------------------------------------------------------------------


def joined_rows(tables: list[Table], source: Source) -> Iterator[dict[str, Any]]:
    """As `read_rows`, with the groups of the same prompt joined into the first of them. Holds all rows in memory.

    Their answers are those of all, each once, the best first, and their comparisons those of all, which may contradict
    one another. A row whose answers are identical stays alone: tokenising drops it.
    """
    rows = list(read_rows(tables, source))
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["comparisons"] and any(answer != row["answers"][0] for answer in row["answers"]):
            by_prompt.setdefault(json.dumps([row["source"], row["prompt"]]), []).append(row)
    for of_prompt in by_prompt.values():
        if len(of_prompt) > 1:
            join(of_prompt, source.max_answers)
    yield from rows


def join(rows: list[dict[str, Any]], max_answers: int | None) -> None:
    """Make one group of rows of FEATURES, in the first of them; the others are left out."""
    first = rows[0]
    answers: list[Any] = []
    comparisons: list[Comparison] = []
    attributes: dict[str, Any] = {}
    margin_faults: list[str] = []
    for row in rows:
        of_row = {json.dumps(answer): each for answer, each in zip(row["answers"], row["attributes"]) if each}
        attributes = of_row | attributes  # of equal answers those of the first
        places = {place: len(answers) + place for place in range(len(row["answers"]))}
        comparisons += [Comparison(**each).among(places) for each in row["comparisons"]]
        answers += row["answers"]
        lines = row["remarks"].split("\n")
        margin_faults += [line for line in lines if line.startswith(MARGIN)]
        row["remarks"] = "\n".join(line for line in lines if not line.startswith(MARGIN))
        nothing: dict[str, Any] = {"prompt": [], "answers": [], "comparisons": [], "attributes": []}
        row |= nothing | {"deselected": JOINED} if row is not first else {}
    kept, among = best_first(*distinct(tuple(answers), tuple(comparisons)), max_answers)
    first |= {"answers": list(kept), "comparisons": [comparison._asdict() for comparison in among]}
    first["attributes"] = [attributes.get(json.dumps(answer), []) for answer in kept] if attributes else []
    first["remarks"] = "\n".join(filter(None, [first["remarks"], *margin_faults]))
    if not among:
        first |= {"prompt": [], "deselected": UNCOMPARED}
