"""From data sources to tokenised groups, cached on disk, with a report of what became of every row.

    sources -> rows -> tokenised rows -> PreparedGroups

The first process does all of it; those that come after it, and later runs, find the result by the state of the files
and map it.
"""

import hashlib
import itertools
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import datasets
import filelock
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hafrm_ds.data.comparisons import ComparisonTable
from hafrm_ds.data.content_keys import content_key, keys_of_column
from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.lengths import GroupLengths, starts_of
from hafrm_ds.data.pairs import Comparison
from hafrm_ds.data.prepared import PreparedGroups, compared, is_of_pairs, save_groups
from hafrm_ds.data.presets import Role
from hafrm_ds.data.reading import (
    ATTRIBUTE_FEATURES,
    COMPARISON_FEATURES,
    MARGIN,
    NOT_READ,
    REMARKS,
    ROLE,
    read_groups,
    selection_key,
)
from hafrm_ds.data.rendering_check import ANSWER_REASONING, is_serious
from hafrm_ds.data.report import (
    DataReport,
    Example,
    GroupFacts,
    TemplateFacts,
    count_outcomes,
    count_repeats,
    percentiles,
)
from hafrm_ds.data.sources import Source
from hafrm_ds.data.tokenization import (
    IDENTICAL_AFTER_CUT,
    LEFT_OUT,
    NOT_TOKENIZED,
    NOT_WRITTEN,
    REFUSED,
    TOKENIZATION_VERSION,
    TOO_LONG,
    Truncation,
    tokenize_groups,
)
from hafrm_ds.data.tool_calls import read_back
from hafrm_ds.errors import DataError

SMALL_SET = 2000
"""Rows below which starting worker processes takes longer than the tokenising itself."""
MAX_PROCESSES = 16
NUM_EXAMPLES = 3
PREPARED_VERSION = 4
"""Raise it whenever what is counted of a set changes."""

TOKEN_IDS = datasets.Sequence(datasets.Value("int32"))
GROUP_FEATURES = {
    "prompt_ids": TOKEN_IDS,
    "response_ids": datasets.Sequence(TOKEN_IDS),
    "comparisons": COMPARISON_FEATURES,
    "attributes": ATTRIBUTE_FEATURES,
    "trains_reward": datasets.Value("bool"),
    "source": datasets.Value("string"),
    "id": datasets.Value("string"),
}
# One row for each row read, kept in the cache: what became of it, beside the group itself.
FATE_FEATURES = {
    "format": datasets.Value("string"),
    "dropped": datasets.Value("string"),
    "deselected": datasets.Value("string"),
    "cut": datasets.Value("bool"),
    "uncut_length": datasets.Value("int64"),
    "remarks": datasets.Value("string"),
    "prompt_key": datasets.Value("binary"),
    "response_keys": datasets.Sequence(datasets.Value("binary")),
    "lost": datasets.Value("string"),
    "left_out": datasets.Value("string"),
    "marks": datasets.Value("string"),
}
CARRIED = ("trains_reward", "source", "id", "format", "dropped", "deselected", "remarks")
"""Columns of read_groups that tokenising hands on; it adds to `dropped`."""


@dataclass(frozen=True)
class PreparationOptions:
    """How rows become usable groups. The fields are those of `data.*` (`hafrm_ds.config`), where their help stands."""

    max_length: int
    truncation: Truncation
    max_dropped_share: float = 0.05
    num_proc: int | None = None
    cache_dir: Path | None = None


@contextmanager
def progress_bars_on_a_terminal() -> Iterator[None]:
    """Let datasets show progress bars only where stderr is a terminal, and from rank 0 alone."""
    wanted = sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"
    hidden = not wanted and not datasets.are_progress_bars_disabled()
    if hidden:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hidden:
            datasets.enable_progress_bars()


@contextmanager
def cache_in_words(cache_dir: Path | None) -> Iterator[None]:
    """Turn what goes wrong with the cache of prepared data into one message. datasets wraps it in errors of its own.

    Raises:
        DataError: the cache cannot be written or read, or its disk is full.
    """
    try:
        yield
    except (OSError, pa.ArrowInvalid, datasets.exceptions.DatasetGenerationError) as error:
        cause: BaseException | None = error
        while isinstance(cause, datasets.exceptions.DatasetGenerationError):
            cause = cause.__cause__
        if not isinstance(cause, OSError | pa.ArrowInvalid):
            raise
        folder = cache_dir or datasets.config.HF_DATASETS_CACHE
        reason = getattr(cause, "strerror", None) or str(cause).split("\n")[0][:200]
        raise DataError(
            f"the cache of prepared data in {folder} cannot be used: {reason}. Set --data.cache_dir (or HF_HOME) to a "
            "folder that can be written and has room; what is damaged there may be removed"
        ) from error


@contextmanager
def one_at_a_time(result: Path) -> Iterator[None]:
    """Let one of the processes that share the cache work on a result; the others wait here, and then find it there.

    What is locked is a file beside `result`, as datasets locks its own; the end of a process frees it, however it ends.
    """
    result.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(result.with_name(f".{result.name}.lock"))
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        print(f"waiting for another process that prepares the same data: {result}", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@progress_bars_on_a_terminal()
def prepare_groups(
    sources: list[Source],
    *,
    formatter: ChatFormatter,
    options: PreparationOptions,
    role: Role,
    seed: int,
) -> PreparedGroups:
    """Read, tokenise and check the pairs of `sources`.

    The result is cached by state of the files, sources, formatter, max_length and truncation. `seed` decides caps
    and mixes of training sources and the examples in the report. An evaluation set is the same under every seed: runs
    are compared on it.

    Raises:
        DataError: a source cannot be read, more than options.max_dropped_share of the selected pairs is unusable, or no
            pair is left.
    """
    seed_of_choices = seed if role == "train" else 0
    with cache_in_words(options.cache_dir):
        rows_key = selection_key(sources, role=role, seed=seed_of_choices, cache_dir=options.cache_dir)
        key = tokenization_cache_key(
            f"{PREPARED_VERSION} {role} {rows_key}", formatter.fingerprint, options.max_length, options.truncation
        )
        folder = cache_folder(options) / f"prepared-{key}"
        prepared = PreparedGroups.open(folder)
        if prepared is None:
            with one_at_a_time(folder):
                prepared = PreparedGroups.open(folder)
                if prepared is None:
                    prepared = prepare_anew(folder, sources, formatter, options, role, seed_of_choices)
    report = prepared.report
    report.template = TemplateFacts.of(formatter)  # a file of the same content may have moved
    check_enough_left(report, options)
    for index in choose_examples(len(prepared), NUM_EXAMPLES, seed):
        report.examples.append(Example.of(prepared[index], formatter.tokenizer))
    return prepared


def prepare_anew(
    folder: Path, sources: list[Source], formatter: ChatFormatter, options: PreparationOptions, role: Role, seed: int
) -> PreparedGroups:
    """Read and tokenise what `prepare_groups` has not found in `folder`, and leave it there. Errors as there."""
    rows = read_groups(sources, role=role, seed=seed, cache_dir=options.cache_dir)
    try:
        tokenized = tokenize_rows(rows, formatter, options)
    except pa.ArrowInvalid:  # what the cache holds is damaged
        tokenized = tokenize_rows(rows, formatter, options, anew=True)
    count_groups(tokenized, folder, formatter, options, role)
    prepared = PreparedGroups.open(folder)
    if prepared is None:
        raise DataError(f"{folder} was written, and cannot be read: does something else clear the cache?")
    return prepared


def cache_folder(options: PreparationOptions) -> Path:
    return Path(options.cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "hafrm_ds")


def count_groups(
    tokenized: datasets.Dataset, folder: Path, formatter: ChatFormatter, options: PreparationOptions, role: Role
) -> None:
    """Find the usable pairs among tokenised rows, and leave in `folder` what PreparedGroups says of them.

    Raises:
        DataError: too many are unusable, or the template writes a part of none.
    """
    table = tokenized.data.table
    kept = np.flatnonzero(pc.and_(pc.equal(table["deselected"], ""), pc.equal(table["dropped"], "")).to_numpy())
    responses, comparisons = table["response_ids"], table["comparisons"]  # empty in rows that are not kept
    uncut = table["uncut_length"].to_numpy()

    def sizes(lists: pa.ChunkedArray) -> np.ndarray:  # read from the offsets of the lists
        return pc.list_value_length(lists).to_numpy().astype(np.int64)

    columns = {
        "prompt": sizes(table["prompt_ids"])[kept],
        "response": sizes(pc.list_flatten(responses)),
        "num_responses": sizes(responses)[kept],
        "num_comparisons": sizes(comparisons)[kept],
        **columns_of(pc.list_flatten(comparisons)),
        "trains_reward": table["trains_reward"].to_numpy()[kept],
        "keys": keys_of_column(pc.list_flatten(table["response_keys"])),
        "prompt_keys": keys_of_column(table["prompt_key"])[kept],
        "uncut_lengths": uncut[uncut > 0],
    }
    report = summarize(table, kept, columns, formatter, options, role)
    attributes = attribute_table(pc.list_flatten(table["attributes"]))
    report.attributes = {name: int((~np.isnan(values)).sum()) for name, values in attributes.items()}
    check_enough_left(report, options)
    check_written(report, table["left_out"].take(kept), formatter)
    save_groups(folder, tokenized, kept, columns, report, attributes)


def columns_of(comparisons: pa.ChunkedArray) -> dict[str, np.ndarray]:
    """Comparisons as Arrow has them -> the columns of a ComparisonTable."""
    wanted = {"better": np.int32, "worse": np.int32, "margin": np.float32, "target": np.float32, "weight": np.float32}
    return {
        name: pc.struct_field(comparisons, name).to_numpy().astype(dtype)  # a margin that is not given becomes NaN
        for name, dtype in wanted.items()
    }


def attribute_table(of_responses: pa.ChunkedArray) -> dict[str, np.ndarray]:
    """Attributes of responses as Arrow has them -> name -> [R] fp32, NaN where a response has none of that name."""
    values = pc.list_flatten(of_responses)
    names, column = np.unique(pc.struct_field(values, "name").to_numpy().astype(str), return_inverse=True)
    numbers = pc.struct_field(values, "value").to_numpy()
    owner = np.repeat(np.arange(len(of_responses)), pc.list_value_length(of_responses).to_numpy())
    found = {str(name): np.full(len(of_responses), np.nan, dtype=np.float32) for name in names}
    for place, of_name in enumerate(found.values()):
        of_name[owner[column == place]] = numbers[column == place]
    return found


def choose_examples(num_pairs: int, num_examples: int, seed: int) -> list[int]:
    """A seeded choice of pairs to show, in order."""
    chosen = np.random.default_rng(seed).choice(num_pairs, size=min(num_examples, num_pairs), replace=False)
    return sorted(chosen.tolist())


# ---- tokenising all rows -------------------------------------------------------------------------------------------


def tokenize_rows(
    rows: datasets.Dataset, formatter: ChatFormatter, options: PreparationOptions, anew: bool = False
) -> datasets.Dataset:
    """Tokenise every selected row -> Dataset of GROUP_FEATURES and FATE_FEATURES, one row for each row read.

    Loaded from the cache when the same rows were tokenised before under the same formatter, length and policy, unless
    it is to be done `anew`.
    """
    fingerprint = tokenization_cache_key(
        rows._fingerprint, formatter.fingerprint, options.max_length, options.truncation
    )
    file = cache_folder(options) / f"tokenized-{fingerprint}.arrow"
    with one_at_a_time(file):  # runs with other seeds share it
        return rows.map(
            tokenize_batch,
            batched=True,
            fn_kwargs={"formatter": formatter, "max_length": options.max_length, "truncation": options.truncation},
            remove_columns=rows.column_names,
            features=datasets.Features(GROUP_FEATURES | FATE_FEATURES),
            num_proc=num_processes(len(rows), options.num_proc),
            load_from_cache_file=not anew,
            cache_file_name=str(file),
            # Given, because datasets would else hash the pickled formatter, whose bytes differ between processes.
            new_fingerprint=fingerprint,
            desc="Tokenising",
        )


def tokenization_cache_key(rows_fingerprint: str, formatter_fingerprint: str, max_length: int, truncation: str) -> str:
    """Hash (32 hex digits, which datasets lengthens by the rank of a worker) of all that decides the tokenised rows."""
    everything = (rows_fingerprint, formatter_fingerprint, max_length, truncation, TOKENIZATION_VERSION)
    return hashlib.sha256(repr(everything).encode()).hexdigest()[:32]


def num_processes(num_rows: int, wanted: int | None) -> int | None:
    """Worker processes for map; None means this process alone."""
    if wanted is None and num_rows >= SMALL_SET:
        wanted = min(len(os.sched_getaffinity(0)), MAX_PROCESSES)
    return min(wanted, num_rows) if wanted is not None and wanted > 1 else None


def tokenize_batch(batch: dict[str, list], formatter: ChatFormatter, max_length: int, truncation: Truncation) -> dict:
    """Columns as read_groups gives them -> columns of GROUP_FEATURES and FATE_FEATURES. Unused rows get no ids."""
    columns: dict[str, list] = {name: [] for name in GROUP_FEATURES | FATE_FEATURES}
    is_used = [not (deselected or lost) for deselected, lost in zip(batch["deselected"], batch["dropped"])]
    comparisons = ([Comparison(**each) for each in group] for group in batch["comparisons"])
    groups = itertools.compress(zip(batch["prompt"], batch["answers"], comparisons), is_used)
    read = ((*read_back(prompt, answers), comparisons) for prompt, answers, comparisons in groups)
    tokenizations = iter(tokenize_groups(formatter, read, max_length, truncation))
    for number, used in enumerate(is_used):
        row = {name: batch[name][number] for name in CARRIED}
        tokenization = NOT_TOKENIZED
        if used:
            tokenization = next(tokenizations)
            row["dropped"] = tokenization.outcome
        prompt_ids, responses = tokenization.ids
        attributes = batch["attributes"][number]  # [] of a row without
        row |= {
            "prompt_ids": prompt_ids,
            "response_ids": list(responses),
            "comparisons": [each._asdict() for each in tokenization.comparisons],
            "attributes": [attributes[place] if attributes else [] for place in tokenization.places],
            "cut": tokenization.cut,
            "uncut_length": tokenization.uncut_length,
            "prompt_key": content_key(tokenization.rendered_prompt, []),
            "response_keys": [content_key(prompt_ids, response) for response in responses],
            "lost": "\n".join(tokenization.lost),
            "left_out": "\n".join(tokenization.left_out),
            "marks": "\n".join(tokenization.marks),
        }
        for name, value in row.items():
            columns[name].append(value)
    return columns


# ---- the report and its limits -------------------------------------------------------------------------------------


def summarize(
    table: pa.Table,
    kept: np.ndarray,
    columns: Mapping[str, np.ndarray],
    formatter: ChatFormatter,
    options: PreparationOptions,
    role: str,
) -> DataReport:
    """The report of a tokenised table, without examples.

    Args:
        kept: [G] places of the usable groups. columns: what is counted of them, as `save_groups` takes it.
    """
    total, by_source = count_outcomes(table)
    lengths = GroupLengths(columns["prompt"], columns["response"], starts_of(columns["num_responses"]))
    comparisons = ComparisonTable(*(columns[name] for name in ComparisonTable._fields))
    are_pairs = is_of_pairs(columns["num_responses"], columns["num_comparisons"], comparisons)
    duplicates, both_orders = count_repeats(
        columns["keys"][compared(lengths.first, columns["num_comparisons"], comparisons)]
    )
    tokens = {"prompt": lengths.prompt}
    tokens |= {name: lengths.response[side::2] for side, name in enumerate(("chosen", "rejected")) if are_pairs}
    tokens |= {} if are_pairs else {"answer": lengths.response}
    tokens |= {"conversation": lengths.longest_conversation, "conversation_before_cut": columns["uncut_lengths"]}
    usable = table.select(["remarks", "lost", "left_out", "marks"]).take(kept)
    remarks, margin_faults = counted_remarks(table["remarks"]), counted_remarks(usable["remarks"])[MARGIN]
    with_margin = np.logical_or.reduceat(~np.isnan(comparisons.margin), starts_of(columns["num_comparisons"])[:-1])
    return DataReport(
        role=role,
        max_length=options.max_length,
        truncation=options.truncation,
        total=total,
        by_source=by_source,
        first_dropped={reason: first_id(table, reason) for reason in total.dropped},
        duplicates=duplicates,
        both_orders=both_orders,
        tokens={name: percentiles(values) for name, values in tokens.items()},
        template=TemplateFacts.of(formatter),
        examples=[],
        with_margin=int(with_margin.sum()),
        policy_alone=int((~columns["trains_reward"]).sum()),
        not_read=list(remarks[NOT_READ]),
        mapped_roles=remarks[ROLE],
        margin_faults=sum(margin_faults.values()),
        first_margin_fault=next(iter(margin_faults), ""),
        left_out=lines_of(usable["left_out"]),
        marks=lines_of(usable["marks"]),
        with_marks=len(kept) - (pc.sum(pc.equal(usable["marks"], "")).as_py() or 0),
        groups=None if are_pairs else GroupFacts.of(columns, lines_of(usable["lost"])),
    )


def lines_of(column: pa.ChunkedArray) -> dict[str, int]:
    """Each line of the texts of a column -> rows that have it, in order of appearance."""
    lines: dict[str, int] = {}
    for text in pc.value_counts(column).to_pylist():
        for line in filter(None, text["values"].split("\n")):
            lines[line] = lines.get(line, 0) + text["counts"]
    return lines


def counted_remarks(column: pa.ChunkedArray) -> dict[str, dict[str, int]]:
    """What a remark begins with -> the rest of it -> rows that have it, in order of appearance."""
    found: dict[str, dict[str, int]] = {kind: {} for kind in REMARKS}
    for line, num_rows in lines_of(column).items():
        kind = next(kind for kind in REMARKS if line.startswith(kind))
        found[kind][line.removeprefix(kind)] = num_rows
    return found


def first_id(table: pa.Table, reason: str) -> str:
    """Id of the first selected row dropped for `reason`."""
    matches = pc.and_(pc.equal(table["deselected"], ""), pc.equal(table["dropped"], reason))
    return table["id"][pc.index(matches, True).as_py()].as_py()


def check_enough_left(report: DataReport, options: PreparationOptions) -> None:
    """Raise DataError when more was dropped than the user allows, or when nothing is left."""
    total = report.total
    if total.dropped_share <= options.max_dropped_share and total.kept:
        return
    # Rounded up, so that the number named here does let this very set through.
    share = math.ceil(total.dropped_share * 1000) / 1000
    head = (
        f"{report.role} data: {sum(total.dropped.values())} of {total.selected} selected pairs ({share:.1%}) would be "
        f"dropped, {total.kept} are left; data.max_dropped_share is {options.max_dropped_share}:"
    )
    lines = [head, *counted(total.dropped, report.first_dropped)]
    if uncut := report.tokens["conversation_before_cut"]:
        lines.append(
            f"Longer conversation of a pair: {uncut['p90']} tokens at the 90th percentile, {uncut['p99']} at the 99th, "
            f"{uncut['max']} at most. data.max_length is {options.max_length}, data.truncation {options.truncation}."
        )
    by_length = TOO_LONG in total.dropped or IDENTICAL_AFTER_CUT in total.dropped
    remedy = "Repair these rows, or take them out"
    if by_length:
        remedy = "Raise data.max_length, choose another data.truncation, or repair the data"
    elif any(reason == LEFT_OUT or reason.startswith(REFUSED) or NOT_WRITTEN in reason for reason in total.dropped):
        template = "the tokenizer's own" if report.template.origin == "tokenizer" else report.template.origin
        remedy = f"Give a template that takes these rows whole (--data.chat_template, now {template}), or take them out"
    lines.append(remedy + (f"; data.max_dropped_share {share} lets this set through." if total.kept else "."))
    raise DataError("\n".join(lines))


def check_written(report: DataReport, column: pa.ChunkedArray, formatter: ChatFormatter) -> None:
    """Raise DataError when the template leaves out a part of every pair.

    Args:
        column: of the kept pairs, what is left out of them (`Tokenization.left_out`), in lines.
    """
    shares = pc.value_counts(column).to_pylist()
    serious = [each for each in shares if each["values"] and is_serious(each["values"].split("\n"))]
    if not report.total.kept or sum(each["counts"] for each in serious) < report.total.kept:
        return
    kinds = list(dict.fromkeys(kind for each in serious for kind in each["values"].split("\n")))
    total = report.total.kept
    message = (
        f"{report.role} data: {total:,} of {total:,} pairs hold text that {formatter.template_name} does not write: it "
        f"leaves out {', '.join(kinds)}. Give a template that writes it (--data.chat_template FILE.jinja)"
    )
    if ANSWER_REASONING in kinds:
        message += ", or say that reasoning is no part of an answer: --data.reasoning drop"
    raise DataError(message)


def counted(reasons: dict[str, int], first: dict[str, str]) -> Iterable[str]:
    """One line for each reason, the most frequent first."""
    for reason, number in sorted(reasons.items(), key=lambda item: -item[1]):
        yield f"  {number:>8}  {reason} (first: {first[reason]})"


def fingerprints_of(sets: Mapping[str, PreparedGroups]) -> dict[str, str]:
    """Name of a set -> hash of its pairs in order: tokens and margins."""
    return {name: pairs.fingerprint for name, pairs in sets.items()}
