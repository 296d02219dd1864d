"""Row formats: how a row of each published layout becomes a preference pair.

A format is a pure function from a row to a `PreferencePair`, or to a list of them where a row ranks several answers; to
`Deselected` when the row is sound but holds no preference (a tie) or is not one that the source asks for; or to
`Dropped` when the row was asked for but is no usable pair. Each format says which columns it reads, and a column that
speaks of the conversation but is read by nobody refuses the file: nothing of a conversation is lost in silence.
"""

import json
import os.path
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from hafrm_ds.data.pairs import (
    NO_TOOLS,
    TOOL_CALLS,
    Deselected,
    Dropped,
    Message,
    Outcome,
    PreferencePair,
    Row,
    UnsupportedRowError,
    assistant,
    has_turns,
    merge_turns,
    names_in_words,
    parsed_messages,
    prompt_from_text,
    starts_with_user,
    transcript_turns,
    user,
)
from hafrm_ds.errors import DataError

if TYPE_CHECKING:
    from hafrm_ds.data.sources import Source

FORMAT_VERSION = 4
"""Part of the cache key of read data: raise it whenever a format makes another outcome of the same row."""

# Outcomes that several formats share.
TIE = "tie"
NO_PREFERENCE = "no preference is given"
MORE_TURNS = "more than one turn"
NO_PROMPT = "no common prompt"

Outcomes = Outcome | list[Outcome]


# ---- chosen and rejected -------------------------------------------------------------------------------------------


def from_preference(row: Row, source: "Source", question: str = "prompt") -> Outcome:
    """A question, chosen and rejected, with an optional system message and earlier turns (`history`).

    Question and answers are each a text or messages. An answer is a text, a message, the messages after the prompt, or
    a whole conversation. Whole conversations (UltraFeedback binarized) are read as such, and the prompt must be part of
    their common beginning. Answers that repeat a prompt of text lose it.
    """
    if not row.given(question):
        return without_question(row, source)
    value = parsed_messages(row.value(question))
    if isinstance(value, str):
        prompt, from_transcript = prompt_from_text(row.text(question))
        if question == "instruction":
            prompt[-1] = user(joined_instruction(row))
    else:
        prompt, from_transcript = row.messages(question), False
    answers = []
    for field in ("chosen", "rejected"):
        answer = parsed_messages(row.value(field))
        if isinstance(answer, list):
            answers.append(row.messages(field))
        elif isinstance(answer, dict):
            answers.append([row.message(answer, f"field {field!r}")])
        else:
            text = row.as_text(answer, f"field {field!r}", expected="a text or a list of messages")
            answers.append([assistant(text.strip() if from_transcript else text)])
    if isinstance(value, str):
        prompt, answers = without_repeated_prompt(value, prompt, answers)
    prompt = earlier_turns(row) + prompt
    if prompt[-1]["role"] in ("system", "developer"):
        return Dropped("a system message alone is no prompt")

    chosen, rejected = answers
    repeats_prompt = [is_conversation(answer, prompt) for answer in answers]
    if not any(repeats_prompt):
        return make_pair(row, source, prompt, chosen, rejected)
    if not all(repeats_prompt):
        which, other = ("chosen", "rejected") if repeats_prompt[0] else ("rejected", "chosen")
        raise DataError(f"{row.id}: field {which!r} is a whole conversation, but field {other!r} is an answer alone")
    length = common_prefix_length(chosen, rejected)
    if not contains(chosen[:length], prompt):
        raise DataError(
            f"{row.id}: fields 'chosen' and 'rejected' are whole conversations, but the prompt is not part of their "
            f"common beginning ({length} messages)"
        )
    return make_pair(row, source, chosen[:length], chosen[length:], rejected[length:])


def joined_instruction(row: Row) -> str:
    """Instruction and, where there is one, its input, as AlpacaFarm joins them."""
    prompt = row.text("instruction")
    return f"{prompt}\n\n{row.text('input')}" if row.given("input") and row.text("input") else prompt


def earlier_turns(row: Row) -> list[Message]:
    """What stands before the question in columns of its own: a system message, and `history` as messages or as
    [question, answer] lists."""
    turns = []
    if row.given("system") and row.text("system"):
        turns.append({"role": "system", "content": row.text("system")})
    history = parsed_messages(row.fields.get("history"))
    if history in (None, "", []):
        return turns
    if not isinstance(history, list) or not all(isinstance(turn, list) for turn in history):
        return turns + row.messages("history")
    for number, turn in enumerate(history, start=1):
        place = f"turn {number} of field 'history'"
        if len(turn) != 2:
            raise row.fault(place, turn, "a question with its answer")
        question, answer = (row.as_text(text, place, expected="two texts") for text in turn)
        turns += [user(question), assistant(answer)]
    return turns


def without_repeated_prompt(
    text: str, prompt: list[Message], answers: list[list[Message]]
) -> tuple[list[Message], list[list[Message]]]:
    """Prompt and answers, where both answers repeat the prompt's `text` or open a turn of their own, without that."""
    if not all(len(answer) == 1 and answer[0]["role"] == "assistant" for answer in answers):
        return prompt, answers
    start, texts = text.strip(), [answer[0]["content"].strip() for answer in answers]
    turns = transcript_turns(text)
    is_transcript = starts_with_user(turns)
    # Two words may begin both answers by chance.
    if (is_transcript or len(start.split()) > 2) and all(
        answer.startswith(start) and answer[len(start) :][:1].isspace() for answer in texts
    ):
        texts = [answer[len(start) :].strip() for answer in texts]
        answers = [[assistant(answer)] for answer in texts]
    if is_transcript and turns[-1]["role"] == "user":
        opened = [transcript_turns(answer) for answer in texts]
        if all(found and found[0]["role"] == "assistant" for found in opened):
            return merge_turns(turns), [merge_turns(found) for found in opened]
    return prompt, answers


def is_conversation(answer: list[Message], prompt: list[Message]) -> bool:
    return answer[: len(prompt)] == prompt or answer[0]["role"] in ("system", "user")


def contains(conversation: list[Message], part: list[Message]) -> bool:
    """Whether `part` stands somewhere in `conversation`; white space around contents does not count."""

    def bare(messages: list[Message]) -> list[tuple[str, str]]:
        return [(message["role"], message["content"].strip()) for message in messages]

    whole, wanted = bare(conversation), bare(part)
    return any(whole[start : start + len(wanted)] == wanted for start in range(len(whole) - len(wanted) + 1))


def without_question(row: Row, source: "Source") -> Outcome:
    """A row whose prompt is null: chosen and rejected hold the whole of their conversations."""
    row.value("chosen")
    if isinstance(parsed_messages(row.value("chosen")), list):
        return from_implicit_messages(row, source)
    return from_transcripts(row, source) if has_turns(row.value("chosen")) else from_implicit_text(row, source)


def from_implicit_messages(row: Row, source: "Source") -> Outcome:
    """chosen and rejected are whole conversations: the prompt is what they begin with alike."""
    return split_conversations(row, source, row.messages("chosen"), row.messages("rejected"))


def from_transcripts(row: Row, source: "Source") -> Outcome:
    """Anthropic HH: chosen and rejected are transcripts, each turn begun by an empty line and "Human:" or "Assistant:".

    Consecutive turns of one speaker become one message. `source.single_turn` counts the turns before that, as the
    paper's code does.
    """
    chosen, rejected = transcript_turns(row.text("chosen")), transcript_turns(row.text("rejected"))
    if not (starts_with_user(chosen) and starts_with_user(rejected)):
        return Dropped("transcript does not start with a Human turn")
    if source.single_turn and (len(chosen) > 2 or len(rejected) > 2):
        return Deselected(MORE_TURNS)
    return split_conversations(row, source, merge_turns(chosen), merge_turns(rejected))


TURN_ENDS = tuple(".?!:;>…。\uff1f\uff01\uff1a\"')]}")
"""What a prompt may end with where only the common words of two answers tell it; else it ends with its line."""


def is_prose(value: Any) -> bool:
    return isinstance(value, str) and len(value.split()) > 2


def from_implicit_text(row: Row, source: "Source") -> Outcome:
    """chosen and rejected are plain texts: the prompt is what they begin with alike, if that ends a turn.

    Raises:
        DataError: the row has other text: what two answers begin with alike is then most likely no prompt.
    """
    others = [name for name, value in row.fields.items() if is_prose(value) and name not in ("chosen", "rejected")]
    others = [name for name in others if name not in source.ignore_columns and name not in COMMON_COLUMNS]
    if others:
        raise DataError(
            f"{row.id}: chosen and rejected are texts without a prompt, and the row holds other text in "
            f"{names_in_words(others)}: call the prompt's column prompt, or name these in ignore_columns of the source"
        )
    chosen, rejected = row.text("chosen"), row.text("rejected")
    length = common_words_length(chosen, rejected)
    prompt = chosen[:length].strip()
    if not prompt or not (prompt.endswith(TURN_ENDS) or chosen[:length].rstrip(" ").endswith("\n")):
        return Dropped(NO_PROMPT)
    answers = [[assistant(text[length:].strip())] for text in (chosen, rejected)]
    return make_pair(row, source, [user(prompt)], answers[0], answers[1])


def common_words_length(a: str, b: str) -> int:
    """Length of the longest common prefix of two texts that cuts no word of either."""
    length = len(os.path.commonprefix([a, b]))  # noqa: RUF071 (characters, not paths, are meant)

    def in_word(text: str) -> bool:
        return length < len(text) and text[length - 1].isalnum() and text[length].isalnum()

    while length and (in_word(a) or in_word(b)):
        length -= 1
    return length


def from_conversations(row: Row, source: "Source") -> Outcome:
    """ShareGPT as LLaMA-Factory lays it out: conversations with the answers chosen and rejected."""
    return from_preference(row, source, question="conversations")


def from_ms_swift(row: Row, source: "Source") -> Outcome:
    """ms-swift: messages that end with the chosen answer, and the text rejected_response."""
    messages = row.messages("messages")
    rejected = assistant(row.text("rejected_response"))
    return make_pair(row, source, earlier_turns(row) + messages[:-1], messages[-1:], [rejected])


# ---- two answers and a label ---------------------------------------------------------------------------------------


def from_two(
    row: Row,
    source: "Source",
    prompt: list[Message],
    answers: tuple[str, str],
    better: int,
    margin: float | None = None,
) -> Outcome:
    """The pair of two text fields, of which the one at place `better` is preferred by `margin`."""
    texts = [[assistant(row.text(field))] for field in answers]
    return make_pair(row, source, prompt, texts[better], texts[1 - better], margin)


def has_number(row: Row, field: str) -> bool:
    """Whether a label is there; an error if the column is not."""
    return row.value(field) is not None


def from_safe_rlhf(row: Row, source: "Source") -> Outcome:
    """PKU-SafeRLHF and BeaverTails: two responses, the number (0 or 1) of the better and of the safer, and whether each
    is safe. `source.label` says which number decides, also between one safe and one unsafe response."""
    if source.exactly_one_safe and row.flag("is_response_0_safe") == row.flag("is_response_1_safe"):
        return Deselected("not exactly one safe answer")
    label = "better_response_id" if source.label == "helpful" else "safer_response_id"
    if not has_number(row, label):
        return Deselected(NO_PREFERENCE)
    preferred = row.number(label)
    if preferred not in (0, 1):
        return Deselected(TIE)
    responses = [assistant(row.text("response_0")), assistant(row.text("response_1"))]
    chosen, rejected = responses[int(preferred)], responses[1 - int(preferred)]
    return make_pair(row, source, [user(row.text("prompt"))], [chosen], [rejected])


def from_alpaca_farm(row: Row, source: "Source") -> Outcome:
    """AlpacaFarm and annotations of AlpacaEval: an instruction with an optional input, two outputs, and a preference
    from 1 (the first) to 2 (the second), of which 1.5 and all else is a tie."""
    if not has_number(row, "preference"):
        return Deselected(NO_PREFERENCE)
    preferred = row.number("preference")
    if preferred == 1.5 or not 1 <= preferred <= 2:
        return Deselected(TIE)
    prompt = [user(joined_instruction(row))]
    return from_two(row, source, prompt, ("output_1", "output_2"), int(preferred > 1.5))


def from_arena(row: Row, source: "Source") -> Outcome:
    """Chatbot Arena and MT-bench: two whole conversations and the winner: model_a, model_b or some kind of tie.

    A number in `turn` says how many turns were judged; later ones are left out.
    """
    if not has_number(row, "winner"):
        return Deselected(NO_PREFERENCE)
    winner = row.text("winner")
    if "tie" in winner or winner == "both_bad":
        return Deselected(TIE)
    if winner not in ("model_a", "model_b"):
        raise row.fault("field 'winner'", winner, "model_a, model_b or a tie")
    a, b = row.messages("conversation_a"), row.messages("conversation_b")
    if row.given("turn"):
        turn = row.number("turn")
        a, b = first_turns(a, turn), first_turns(b, turn)
    return split_conversations(row, source, a, b) if winner == "model_a" else split_conversations(row, source, b, a)


def first_turns(conversation: list[Message], turns: float) -> list[Message]:
    """The conversation up to the last answer to its first `turns` questions."""
    questions = [place for place, message in enumerate(conversation) if message["role"] == "user"]
    return conversation[: questions[int(turns)]] if 0 < turns < len(questions) else conversation


def from_kaggle_arena(row: Row, source: "Source") -> Outcome:
    """Chatbot Arena 55k: JSON lists of questions and of each model's answers, and a flag for the winner."""
    flags = [row.number(f"winner_{name}") for name in ("model_a", "model_b", "tie")]
    if flags[2] or flags[0] == flags[1]:
        return Deselected(TIE)
    questions, a, b = (json_texts(row, field) for field in ("prompt", "response_a", "response_b"))
    if not len(questions) == len(a) == len(b):
        raise DataError(f"{row.id}: fields 'prompt', 'response_a' and 'response_b' hold different numbers of turns")
    if any(text is None for text in (*questions, *a, *b)):
        return Dropped("an answer is null")
    conversations = [
        [message for question, answer in zip(questions, answers) for message in (user(question), assistant(answer))]
        for answers in (a, b)
    ]
    if flags[1]:
        conversations.reverse()
    return split_conversations(row, source, *conversations)


def json_texts(row: Row, field: str) -> list[Any]:
    """A JSON list of texts, of which some may be null."""
    try:
        found = json.loads(row.text(field))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not found or not all(text is None or isinstance(text, str) for text in found):
        raise row.fault(f"field {field!r}", row.value(field), "a list of texts in JSON")
    return found


def from_helpsteer3(row: Row, source: "Source") -> Outcome:
    """HelpSteer3 preference: messages as context, two responses, a preference from -3 (the first is better) to 3."""
    if not has_number(row, "overall_preference"):
        return Deselected(NO_PREFERENCE)
    strength = row.number("overall_preference")
    if not strength:
        return Deselected(TIE)
    context = parsed_messages(row.value("context"))
    prompt = row.messages("context") if not isinstance(context, str) else [user(row.text("context"))]
    return from_two(row, source, prompt, ("response1", "response2"), int(strength > 0), abs(strength))


def from_summaries(row: Row, source: "Source") -> Outcome:
    """OpenAI's summarize_from_feedback, comparisons: a post or an article, two summaries, and the number of the better.
    The prompt is laid out as in the paper (Stiennon et al. 2020)."""
    if not has_number(row, "choice"):
        return Deselected(NO_PREFERENCE)
    info, summaries, choice = row.value("info"), row.value("summaries"), row.number("choice")
    if not isinstance(info, dict) or not isinstance(summaries, list) or len(summaries) != 2:
        raise DataError(f"{row.id}: expected info with a post or an article, and two summaries")
    if choice not in (0, 1):
        raise row.fault("field 'choice'", choice, "0 or 1")
    heads = {"subreddit": "SUBREDDIT: r/", "title": "TITLE: ", "post": "POST: ", "article": ""}
    parts = Row({name: info[name] for name in heads if info.get(name)}, row.id, "")
    if not parts.given("post") and not parts.given("article"):
        raise DataError(f"{row.id}: field 'info' holds neither a post nor an article")
    text = "\n".join(heads[name] + parts.text(name) for name in parts.fields) + "\nTL;DR:"
    answers = [[assistant(inner_text(row, summary, "summaries", "text").strip())] for summary in summaries]
    return make_pair(row, source, [user(text)], answers[int(choice)], answers[1 - int(choice)])


def inner_text(row: Row, value: Any, field: str, key: str) -> str:
    """The text under `key` of an object in `field`."""
    if not isinstance(value, dict) or key not in value:
        raise row.fault(f"an item of field {field!r}", value, f"an object with {key}")
    return row.as_text(value[key], f"{key} of field {field!r}", expected="a text")


def from_shp(row: Row, source: "Source") -> Outcome:
    """Stanford Human Preferences: a post (`history`), two comments, and labels: 1 where the first is preferred."""
    if not has_number(row, "labels"):
        return Deselected(NO_PREFERENCE)
    label = row.number("labels")
    if label not in (0, 1):
        raise row.fault("field 'labels'", label, "0 or 1")
    return from_two(row, source, [user(row.text("history"))], ("human_ref_A", "human_ref_B"), 1 - int(label))


def from_webgpt(row: Row, source: "Source") -> Outcome:
    """WebGPT comparisons: a question (an object with full_text), two answers and a score for each."""
    question = row.value("question")
    text = row.text("question") if isinstance(question, str) else inner_text(row, question, "question", "full_text")
    difference = row.number("score_0") - row.number("score_1")
    if not difference:
        return Deselected(TIE)
    return from_two(row, source, [user(text)], ("answer_0", "answer_1"), int(difference < 0), abs(difference))


# ---- rankings ------------------------------------------------------------------------------------------------------


def best_against_each(
    row: Row, source: "Source", prompt: list[Message], ranked: list[tuple[float, str]], *, with_margin: bool
) -> Outcomes:
    """(value, answer), higher better -> the best answer against each other; those as good as it are ties."""
    if len(ranked) < 2:
        return Deselected("fewer than two answers")
    ranked = sorted(ranked, key=lambda item: -item[0])  # stable: of equals the first is the best
    best, answer = ranked[0]
    return [
        make_pair(row, source, prompt, [assistant(answer)], [assistant(other)], best - value if with_margin else None)
        if value < best
        else Deselected(TIE)
        for value, other in ranked[1:]
    ]


def ranked_answers(row: Row, field: str, answer: str, number: str) -> list[tuple[float, str]]:
    """Objects of `field` -> (their number, their answer); those without a number are left out."""
    items = row.value(field)
    if not isinstance(items, list):
        raise row.fault(f"field {field!r}", items, "a list of answers")
    texts = [inner_text(row, item, field, answer) for item in items]
    numbers = [Row({number: item.get(number)}, f"{row.id}: {field}", "") for item in items]
    return [(float(found.number(number)), text) for found, text in zip(numbers, texts) if found.given(number)]


def from_nectar(row: Row, source: "Source") -> Outcomes:
    """Nectar: a transcript as prompt, and answers with their rank, the lowest the best."""
    ranked = [(-rank, answer) for rank, answer in ranked_answers(row, "answers", "answer", "rank")]
    return best_against_each(row, source, prompt_from_text(row.text("prompt"))[0], ranked, with_margin=False)


def from_ultrafeedback(row: Row, source: "Source") -> Outcomes:
    """UltraFeedback as it was published: an instruction, and completions with an overall_score."""
    ranked = ranked_answers(row, "completions", "response", "overall_score")
    return best_against_each(row, source, [user(row.text("instruction"))], ranked, with_margin=True)


# ---- which format --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """A known row format: the columns that announce it and the function that reads it."""

    columns: tuple[str, ...]
    convert: Callable[[Row, "Source"], Outcomes]
    recognises: Callable[[dict[str, Any]], bool] = lambda fields: True
    """Tells formats with the same columns apart by the values of a row."""
    also_reads: tuple[str, ...] = ()
    """Columns that a row may have besides."""


EARLIER = ("system", "history")
COMMON_COLUMNS = ("margin", "score_chosen", "score_rejected", "source", "tools")
"""Read of the rows of every format."""

FORMATS: dict[str, Format] = {
    "explicit_prompt": Format(("prompt", "chosen", "rejected"), from_preference, also_reads=EARLIER),
    "alpaca_preference": Format(
        ("instruction", "chosen", "rejected"),
        partial(from_preference, question="instruction"),
        also_reads=("input", *EARLIER),
    ),
    "question": Format(
        ("question", "chosen", "rejected"), partial(from_preference, question="question"), also_reads=EARLIER
    ),
    "conversations": Format(("conversations", "chosen", "rejected"), from_conversations, also_reads=EARLIER),
    "ms_swift": Format(("messages", "rejected_response"), from_ms_swift, also_reads=EARLIER),
    "safe_rlhf": Format(
        ("prompt", "response_0", "response_1"),
        from_safe_rlhf,
        also_reads=("better_response_id", "safer_response_id", "is_response_0_safe", "is_response_1_safe"),
    ),
    "alpaca_farm": Format(
        ("instruction", "output_1", "output_2", "preference"), from_alpaca_farm, also_reads=("input",)
    ),
    "arena": Format(
        ("conversation_a", "conversation_b", "winner"), from_arena, also_reads=("turn", "full_conversation")
    ),
    "kaggle_arena": Format(
        ("prompt", "response_a", "response_b", "winner_model_a", "winner_model_b", "winner_tie"), from_kaggle_arena
    ),
    "helpsteer3": Format(("context", "response1", "response2", "overall_preference"), from_helpsteer3),
    "summaries": Format(("info", "summaries", "choice"), from_summaries),
    "shp": Format(("history", "human_ref_A", "human_ref_B", "labels"), from_shp),
    "webgpt": Format(("question", "answer_0", "answer_1", "score_0", "score_1"), from_webgpt),
    "nectar": Format(("prompt", "answers"), from_nectar),
    "ultrafeedback": Format(("instruction", "completions"), from_ultrafeedback),
    "implicit_messages": Format(
        ("chosen", "rejected"),
        from_implicit_messages,
        lambda fields: isinstance(parsed_messages(fields["chosen"]), list),
    ),
    "transcripts": Format(("chosen", "rejected"), from_transcripts, lambda fields: has_turns(fields["chosen"])),
    "implicit_text": Format(("chosen", "rejected"), from_implicit_text),
}
"""By name, in the order in which `detect_format` tries them."""


def detect_format(row: Row) -> str:
    """Name of the format of a row, from its columns and, where these leave a choice, its values.

    Raises:
        DataError: for columns of no known format; lists them and the known formats.
    """
    for name, known in FORMATS.items():
        if row.fields.keys() >= set(known.columns) and known.recognises(row.fields):
            return name
    formats = "\n".join(f"  {name}: {', '.join(known.columns)}" for name, known in FORMATS.items())
    raise DataError(
        f"{row.id}: the columns {names_in_words(row.fields)} are of no known format. "
        f"Known formats and their columns:\n{formats}"
    )


def read_pairs_of(row: Row, format_name: str, source: "Source") -> list[Outcome]:
    """A row in a known format -> its pairs, one but for rankings, or why there is none.

    Raises:
        DataError: for a field that is missing, null or of the wrong type, and for a column that speaks of the
            conversation but is not read.
    """
    known = FORMATS[format_name]
    if row.fields.get("tools") not in NO_TOOLS:
        return [Dropped(TOOL_CALLS)]
    try:
        outcomes = known.convert(row, source)
    except UnsupportedRowError as error:
        return [Dropped(error.reason)]
    found = outcomes if isinstance(outcomes, list) else [outcomes]
    unread = [name for name in not_read(row, format_name) if speaks_of_conversation(name, row.fields[name])]
    if unread := [
        name for name in unread if name not in source.ignore_columns and not repeats(row.fields[name], found)
    ]:
        raise DataError(
            f"{row.id}: {names_in_words(unread)}: filled, but not read in rows of format {format_name}; if nothing of "
            f"the conversation is lost without, name it in ignore_columns of the source"
        )
    return found


def not_read(row: Row, format_name: str) -> list[str]:
    """Columns that are filled in a row but not read in its format."""
    read = columns_read(format_name)
    return [name for name, value in row.fields.items() if name not in read and value not in (None, "", [], {})]


@cache  # of a handful of formats, for millions of rows
def columns_read(format_name: str) -> frozenset[str]:
    known = FORMATS[format_name]
    return frozenset((*known.columns, *known.also_reads, *COMMON_COLUMNS))


CONVERSATION_WORD = re.compile(
    "prompts?|instructions?|inputs?|query|question|system|history|context|messages?|conversations?|trajectory|turns?|"
    "dialog(ue)?|tools?|reasoning|thinking"
)
MADE_WITH = ("generation_prompt", "raw_generation_prompt")
"""Columns in which distilabel keeps how the answers were generated: no part of the conversation."""


def speaks_of_conversation(name: str, value: Any) -> bool:
    """Whether a column's name says that it holds a part of the conversation, and its value may. A count does not."""
    words = str(name).lower().removesuffix("_content").replace("-", "_").split("_")
    if name in MADE_WITH or not (CONVERSATION_WORD.fullmatch(words[-1]) or words[0] == "system"):
        return False
    return isinstance(value, str | list | dict) or name == "turn"


def repeats(value: Any, outcomes: list[Outcome]) -> bool:
    """Whether every text in a value stands in the conversation of a pair, as UltraFeedback's `messages` do."""
    pairs = [outcome for outcome in outcomes if isinstance(outcome, PreferencePair)]
    if not pairs:
        return True  # nothing is trained on
    messages = (message for pair in pairs for message in (*pair.prompt, *pair.chosen, *pair.rejected))
    whole = "\n".join(message["content"] for message in messages)
    return all(text.strip() in whole for text in texts_in(value))


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


# ---- parts of pairs ------------------------------------------------------------------------------------------------


def split_conversations(row: Row, source: "Source", chosen: list[Message], rejected: list[Message]) -> Outcome:
    length = common_prefix_length(chosen, rejected)
    return make_pair(row, source, chosen[:length], chosen[length:], rejected[length:])


def common_prefix_length(a: list[Message], b: list[Message]) -> int:
    """Number of messages that both conversations begin with, at least one message short of either end."""
    length = 0
    while length < min(len(a), len(b)) - 1 and a[length] == b[length]:
        length += 1
    return length


def make_pair(
    row: Row,
    source: "Source",
    prompt: list[Message],
    chosen: list[Message],
    rejected: list[Message],
    margin: float | None = None,
) -> Outcome:
    """The pair with what every format may carry beside it, margin and source; or why there is none.

    Args:
        margin: what the format itself says; else that of the row.
    """
    if not any(message["role"] not in ("system", "developer") for message in prompt):
        return Dropped(NO_PROMPT)
    if source.single_turn and not is_single_turn(prompt, chosen, rejected):
        return Deselected(MORE_TURNS)
    if any(answer[-1]["role"] in ("system", "developer", "user") for answer in (chosen, rejected)):
        return Dropped("does not end with an answer")
    if margin is not None:
        return PreferencePair(prompt, chosen, rejected, float(margin), row.source, row.id)
    try:
        return PreferencePair(prompt, chosen, rejected, margin_of(row), row.source, row.id)
    except DataError as error:  # no margin is needed unless training uses margins, which then refuses it
        return PreferencePair(prompt, chosen, rejected, None, row.source, row.id, str(error))


def is_single_turn(prompt: list[Message], chosen: list[Message], rejected: list[Message]) -> bool:
    """One question, one answer on either side; a system message does not count."""
    turns = [message for message in prompt if message["role"] != "system"]
    return len(turns) == len(chosen) == len(rejected) == 1


def margin_of(row: Row) -> float | None:
    """The row's `margin`, else score_chosen - score_rejected, else None. A null counts as not given."""
    if row.fields.get("margin") is not None:
        return float(row.number("margin"))
    if row.fields.get("score_chosen") is not None and row.fields.get("score_rejected") is not None:
        return float(row.number("score_chosen") - row.number("score_rejected"))
    return None
