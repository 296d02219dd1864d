"""Row formats: how a row of each published layout becomes a group of answers, and the contract for all of them.

A format is a declaration (`FORMATS`): the columns that announce it, those it reads besides, and a pure function from a
row to `Parts` (prompt, answers and comparisons, made by `pair` for a better and a worse answer), or to a list of them
where a row holds several prompts; to `Deselected` when the row is sound but holds no preference (a tie) or is not one
that the source asks for; or to `Dropped` when the row was asked for but is no usable group.

The contract is `read_groups_of`: nothing of a conversation is lost in silence. A filled column that speaks of the
conversation but is read by nobody refuses the file by name, one with images drops the row, and every other column that
is not read is told by `not_read`.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

from hafrm_ds.data.formats.answers import EARLIER, answers_to, is_prose, of_ms_swift, without_question
from hafrm_ds.data.formats.attributes import ATTRIBUTES, with_attributes
from hafrm_ds.data.formats.labelled import (
    of_alpaca_farm,
    of_arena,
    of_helpsteer2,
    of_helpsteer3,
    of_kaggle_arena,
    of_safe_rlhf,
    of_shp,
    of_summaries,
    of_webgpt,
)
from hafrm_ds.data.formats.parts import Made, finished
from hafrm_ds.data.formats.ranked import (
    JUDGEMENTS,
    of_best_of_n,
    of_groups,
    of_lists,
    of_nectar,
    of_stack_exchange,
    of_tree,
    of_ultrafeedback,
)
from hafrm_ds.data.pairs import (
    MEDIA,
    MEDIA_NAMES,
    ROLES,
    Dropped,
    MediaError,
    Message,
    Outcome,
    PreferenceGroup,
    Row,
    has_turns,
    names_in_words,
    parsed_messages,
)
from hafrm_ds.data.tool_calls import ToolRow, read_with_tools
from hafrm_ds.errors import DataError

if TYPE_CHECKING:
    from hafrm_ds.data.sources import Source

FORMAT_VERSION = 10
"""Part of the cache key of read data: raise it whenever a format makes another outcome of the same row."""


# ---- the formats ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """A known row format: the columns that announce it and the function that reads it."""

    columns: tuple[str, ...]
    make: Callable[[Row, "Source"], Made | list[Made]]
    whose: str
    """Who publishes rows of this layout."""
    also_reads: tuple[str, ...] = ()
    """Columns that a row may have besides."""
    recognises: Callable[[dict[str, Any]], bool] = lambda fields: True
    """Tells formats with the same columns apart by the values of a row."""
    listed: str | None = ""
    """The column that lists the answers, in the order of `attributes`; "" for pairs, None where there is no such."""


def answered(
    question: str, whose: str, *also_reads: str, answers: tuple[str, str] = ("chosen", "rejected"), **how: Any
) -> Format:
    """The format of rows with a question, a better and a worse answer."""
    make = partial(answers_to, question=question, better=answers[0], worse=answers[1])
    return Format((question, *answers), make, whose, (*also_reads, *EARLIER), **how)


def lists(question: str, answers: str, numbers: str, whose: str, *also_reads: str) -> Format:
    """The format of rows with a question, a list of answers and one of their values."""
    make = partial(of_lists, question=question, answers=answers, numbers=numbers)
    return Format((question, answers, numbers), make, whose, also_reads, listed=answers)


def is_whole(answer: Any) -> bool:
    """Whether an answer is a list of messages that the assistant does not begin."""
    messages = parsed_messages(answer)
    first = messages[0] if isinstance(messages, list) and messages else None
    role = first.get("role", first.get("from")) if isinstance(first, dict) else None
    return isinstance(role, str) and ROLES.get(role.lower()) != "assistant"


COMMON_COLUMNS = ("margin", "score_chosen", "score_rejected", "probability", "source", "tools", ATTRIBUTES)
"""Read of the rows of every format."""

FORMATS: dict[str, Format] = {
    "explicit_prompt": answered("prompt", "TRL, UltraFeedback binarized, Tulu 3, Capybara, most others"),
    "alpaca_preference": answered("instruction", "Alpaca preferences, as LLaMA-Factory lays them out", "input"),
    "question": answered("question", "Orca DPO pairs (Intel)"),
    "conversations": answered("conversations", "ShareGPT (`from`, `value`), as LLaMA-Factory lays it out"),
    "ultra_interact": answered("trajectory", "UltraInteract (openbmb)"),
    "query": answered("query", "queries with two answers"),
    "input": answered("input", "Orca DPO pairs (argilla)"),
    "messages": answered("messages", "axolotl", recognises=lambda fields: not is_whole(fields["chosen"])),
    "ms_swift": Format(("messages", "rejected_response"), of_ms_swift, "ms-swift", EARLIER),
    "argilla": answered("instruction", "argilla", "input", answers=("chosen_response", "rejected_response")),
    "clair": answered("task", "CLAIR (distilabel)", answers=("revision", "student_solution")),
    "stack_paired": answered("question", "Stack Exchange paired (lvwerra)", answers=("response_j", "response_k")),
    "safe_rlhf": Format(
        ("prompt", "response_0", "response_1"),
        of_safe_rlhf,
        "PKU-SafeRLHF, BeaverTails",
        ("better_response_id", "safer_response_id", "is_response_0_safe", "is_response_1_safe"),
    ),
    "alpaca_farm": Format(
        ("instruction", "output_1", "output_2", "preference"), of_alpaca_farm, "AlpacaFarm, AlpacaEval", ("input",)
    ),
    "arena": Format(
        ("conversation_a", "conversation_b", "winner"),
        of_arena,
        "Chatbot Arena (33k, 140k), MT-bench; ties are left out",
        ("turn", "full_conversation"),
    ),
    "kaggle_arena": Format(
        ("prompt", "response_a", "response_b", "winner_model_a", "winner_model_b", "winner_tie"),
        of_kaggle_arena,
        "Chatbot Arena 55k",
    ),
    "helpsteer3": Format(("context", "response1", "response2", "overall_preference"), of_helpsteer3, "HelpSteer3"),
    "helpsteer2": Format(
        ("prompt", "response_1", "response_2", "preference_strength"), of_helpsteer2, "HelpSteer2, its preferences"
    ),
    "summaries": Format(("info", "summaries", "choice"), of_summaries, "summarize_from_feedback (OpenAI)"),
    "shp": Format(("history", "human_ref_A", "human_ref_B", "labels"), of_shp, "SHP (Stanford)"),
    "webgpt": Format(
        ("question", "answer_0", "answer_1", "score_0", "score_1"), of_webgpt, "WebGPT comparisons (OpenAI)"
    ),
    "nectar": Format(("prompt", "answers"), of_nectar, "Nectar (berkeley-nest)", listed=None),
    "ultrafeedback": Format(("instruction", "completions"), of_ultrafeedback, "UltraFeedback (openbmb)", listed=None),
    "stack_exchange": Format(
        ("question", "answers"), of_stack_exchange, "Stack Exchange preferences (HuggingFaceH4)", listed=None
    ),
    "ratings": lists("instruction", "generations", "ratings", "distilabel", "input"),
    "groups": Format(
        ("prompt", "responses"),
        of_groups,
        "groups of answers with scores (as score.py writes them), ranks or comparisons",
        (*JUDGEMENTS, *EARLIER),
        lambda fields: not fields.keys().isdisjoint(JUDGEMENTS),
        "responses",
    ),
    "best_of_n": Format(
        ("prompt", "pick", "candidates"), of_best_of_n, "ranked.jsonl of best_of_n.py, with gold", listed=None
    ),
    "oasst": Format(("message_tree_id", "prompt"), of_tree, "OpenAssistant, its trees", listed=None),
    "implicit_messages": Format(
        ("chosen", "rejected"),
        without_question,
        "Skywork-Reward-Preference: whole conversations",
        (),
        lambda fields: isinstance(parsed_messages(fields["chosen"]), list),
    ),
    "transcripts": Format(
        ("chosen", "rejected"),
        without_question,
        "HH-RLHF (Anthropic): `Human:` and `Assistant:`",
        (),
        lambda fields: has_turns(fields["chosen"]),
    ),
    "implicit_text": Format(("chosen", "rejected"), without_question, "two texts with the same beginning"),
}
"""By name, in the order in which `detect_format` tries them."""

NO_PAIRS = {
    "PRM800K": (("question", "label", "labeler"), "it labels the steps of one solution"),
    "steps of solutions (PRM)": (("prompt", "completions", "labels"), "it labels the steps of one solution"),
    "Math-Shepherd": (("input", "label", "task"), "it labels the steps of one solution"),
    "KTO": (("prompt", "completion", "label"), "it labels single answers"),
    "HelpSteer": (
        ("prompt", "response", "helpfulness"),
        "it rates single answers (HelpSteer2 has pairs in preference/)",
    ),
    "OpenAssistant, message by message": (("message_id", "parent_id", "text"), "its pairs are in the files of trees"),
    "BeaverTails, answer by answer": (("prompt", "response", "is_safe"), "it labels single answers"),
    "answers that nobody judged": (("prompt", "responses"), "it has neither scores nor ranks nor comparisons"),
    "fine-tuning": (("messages",), "it holds one answer"),
    "fine-tuning with prompts": (("prompt", "completion"), "it holds one answer"),
    "Alpaca, for fine-tuning": (("instruction", "output"), "it holds one answer"),
}
"""Published layouts that are no comparisons: their columns, and why no pair can be made."""


# ---- which format --------------------------------------------------------------------------------------------------


def detect_format(row: Row) -> str:
    """Name of the format of a row, from its columns and, where these leave a choice, its values.

    Raises:
        DataError: for columns of no known format; names the nearest.
    """
    fields = row.fields
    found = [
        name for name, known in FORMATS.items() if fields.keys() >= set(known.columns) and known.recognises(fields)
    ]
    for name in found:  # of two formats in one file, the one whose question this row has
        if len(FORMATS[name].columns) > 2 and all(row.given(column) for column in FORMATS[name].columns):
            return name
    if found:
        return found[0]
    for name, (columns, reason) in NO_PAIRS.items():
        if fields.keys() >= set(columns):
            raise DataError(
                f"{row.id}: these are rows of {name} ({', '.join(columns)}): {reason}, so no pair can be made of a row"
            )
    nearest, known = max(
        FORMATS.items(), key=lambda item: len(fields.keys() & set(item[1].columns)) / len(item[1].columns)
    )
    lacking = [name for name in known.columns if name not in fields]
    needs = (
        f"needs {names_in_words(lacking)} too" if lacking else f"has {names_in_words(known.columns)} of another type"
    )
    raise DataError(
        f"{row.id}: the columns {names_in_words(fields)} are of no known format; the nearest is {nearest}, which "
        f"{needs}. Name the columns in the source: {{path: ..., columns: {{prompt: COLUMN, chosen: COLUMN, "
        f"rejected: COLUMN}}}}"
    )


# ---- the contract --------------------------------------------------------------------------------------------------


def read_groups_of(row: Row, format_name: str, source: "Source") -> list[Outcome]:
    """A row in a known format -> its groups, one but for trees, or why there is none.

    Raises:
        DataError: for a field that is missing, null or of the wrong type, and for a column that speaks of the
            conversation but is not read.
    """
    return read_with_tools(row, partial(groups_of, format_name=format_name, source=source), source.ignore_columns)


def groups_of(row: Row, format_name: str, source: "Source") -> list[Outcome]:
    """As `read_groups_of`; raises ToolCallsError for messages that only a `ToolRow` reads."""
    unread, ignored = unread_columns(format_name, tuple(row.fields)), source.ignore_columns
    if any(is_filled(row.fields[name]) and name not in ignored for name in unread.media):
        return [Dropped(MEDIA)]
    try:
        made = FORMATS[format_name].make(row, source)
    except MediaError:
        return [Dropped(MEDIA)]
    all_made = made if isinstance(made, list) else [made]
    outcomes = [finished(each, row, source) for each in all_made]
    if is_filled(row.fields.get(ATTRIBUTES)) and ATTRIBUTES not in ignored:
        listed = FORMATS[format_name].listed
        outcomes = [with_attributes(outcome, each, row, listed) for outcome, each in zip(outcomes, all_made)]
    lost = [name for name in unread.of_conversation if name not in ignored and may_be_lost(name, row.fields[name])]
    groups = [outcome for outcome in outcomes if isinstance(outcome, PreferenceGroup)]
    if lost and groups:
        said = [message for group in groups for part in (group.prompt, *group.answers) for message in part]
        if isinstance(row, ToolRow):  # calls are no contents of messages
            said += [{"content": text} for name in row.fields.keys() - {*lost} for text in texts_in(row.fields[name])]
        if lost := [name for name in lost if not repeats(row.fields[name], said)]:
            raise DataError(
                f"{row.id}: {names_in_words(lost)}: filled, but not read in rows of format {format_name}; if nothing "
                f"of the conversation is lost without, name it in ignore_columns of the source"
            )
    return list(map(row.opened_group, outcomes)) if isinstance(row, ToolRow) else outcomes


def refuse_lost(row: Row, read: Iterable[str], said: Iterable[Message]) -> None:
    """The contract for rows of one fixed layout, which reads the columns `read`: raises DataError for another one that
    speaks of the conversation, unless it repeats what is `said`."""
    names = [name for name in row.fields if name not in read and speaks_of_conversation(name)]
    lost = [name for name in names if may_be_lost(name, row.fields[name])]
    if lost and (lost := [name for name in lost if not repeats(row.fields[name], said)]):
        raise DataError(f"{row.id}: {names_in_words(lost)}: filled, but not read; take it out of the row")


def not_read(row: Row, format_name: str) -> list[str]:
    """Columns that are filled in a row but not read in its format."""
    names = unread_columns(format_name, tuple(row.fields)).all
    return [name for name in names if is_filled(row.fields[name])]


class Unread(NamedTuple):
    """Columns that a format does not read: all, and of these the ones whose names speak of the conversation, and of
    images and the like."""

    all: tuple[str, ...]
    of_conversation: tuple[str, ...]
    media: tuple[str, ...]


@lru_cache(maxsize=1000)  # of the handful of different sets of columns that millions of rows have
def unread_columns(format_name: str, columns: tuple[str, ...]) -> Unread:
    known = FORMATS[format_name]
    read = {*known.columns, *known.also_reads, *COMMON_COLUMNS}
    names = [name for name in columns if name not in read]
    return Unread(
        tuple(names),
        tuple(name for name in names if speaks_of_conversation(name)),
        tuple(name for name in names if str(name).lower() in MEDIA_NAMES),
    )


def is_filled(value: Any) -> bool:
    return value is not None and value not in ("", [], {})


CONVERSATION_WORD = re.compile(
    "prompts?|instructions?|inputs?|query|queries|questions?|system|history|context|messages?|conversations?|"
    "trajectory|turns?|dialog(ue)?s?|tools?|functions|reasoning|thinking|passages?|documents?|background|persona"
)
TEXT_WORDS = ("content", "text", "str", "raw", "json", "list")
"""Words that may follow one of CONVERSATION_WORD in the name of a column, as in prompt_text."""
MADE_WITH = ("generation_prompt", "raw_generation_prompt", "labelling_prompt")
"""Columns in which distilabel keeps how the answers were generated and judged: no part of the conversation."""


def speaks_of_conversation(name: str) -> bool:
    """Whether a column's name says that it holds a part of the conversation."""
    snake_case = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", str(name)).lower()
    words = [word for word in re.split(r"[^a-z]+", snake_case) if word]
    while len(words) > 1 and words[-1] in TEXT_WORDS:
        words.pop()
    if not words or name in MADE_WITH:
        return False
    return CONVERSATION_WORD.fullmatch(words[-1]) is not None or words[0] == "system"


def may_be_lost(name: str, value: Any) -> bool:
    """Whether a value under such a name may be a part of the conversation. A count is none."""
    return is_filled(value) and (isinstance(value, str | list | dict) or name == "turn")


def repeats(value: Any, said: Iterable[Message]) -> bool:
    """Whether every text in a value is a message that is read, or stands in one and is no mere word. UltraFeedback's
    `messages` are such."""
    contents = [message["content"].strip() for message in said]
    whole = "\n".join(contents)
    texts = [text.strip() for text in texts_in(value)]
    return all(not text or text in contents or (is_prose(text) and text in whole) for text in texts)


def texts_in(value: Any) -> Iterator[str]:
    """The texts of a nested value, but for who speaks and of what kind a part is."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from texts_in(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            if name not in ("role", "from", "type"):
                yield from texts_in(item)
