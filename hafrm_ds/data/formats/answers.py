"""Rows that name the better answer: chosen and rejected, after a prompt or as whole conversations."""

import os.path
from typing import TYPE_CHECKING, Any

from hafrm_ds.data.formats.parts import (
    MORE_TURNS,
    NO_PROMPT,
    Made,
    Parts,
    common_prefix_length,
    pair,
    split_conversations,
)
from hafrm_ds.data.pairs import (
    MESSAGES_AS_TEXT,
    Deselected,
    Dropped,
    Message,
    Row,
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

EARLIER = ("system", "history")
"""Columns of what stands before the question."""

# ---- with a prompt -------------------------------------------------------------------------------------------------


def answers_to(
    row: Row, source: "Source", question: str = "prompt", better: str = "chosen", worse: str = "rejected"
) -> Made:
    """A question, a better and a worse answer, with an optional system message and earlier turns (`history`).

    Question and answers are each a text or messages. An answer is a text, a message, the messages after the prompt, or
    a whole conversation. Whole conversations (UltraFeedback binarized) are read as such, and the prompt must be part of
    their common beginning; where there is no question, answers are nothing else. Answers that repeat a prompt of text
    lose it.
    """
    if not row.given(question) and not (question == "instruction" and row.given("input") and row.text("input")):
        made = without_question(row, source, better, worse)
        earlier = earlier_turns(row)
        if not isinstance(made, Parts) or contains(made.prompt, earlier):
            return made
        return made._replace(prompt=earlier + made.prompt)
    prompt, from_transcript = prompt_of(row, question)
    answers = [
        answer_of(row, field, answer, strip=from_transcript)
        for field, answer in zip((better, worse), answer_values(row, better, worse), strict=True)
    ]
    if isinstance(messages_or_text(row, question), str):
        prompt, answers = without_repeated_prompt(row.text(question), prompt, answers)
    earlier = earlier_turns(row)
    if after(earlier, prompt)[-1]["role"] in ("system", "developer"):
        return Dropped("a system message alone is no prompt")

    chosen, rejected = answers
    repeats_prompt = [is_conversation(answer, prompt) for answer in answers]
    if not any(repeats_prompt):
        return pair(after(earlier, prompt), chosen, rejected)
    if not all(repeats_prompt):
        whole, alone = (better, worse) if repeats_prompt[0] else (worse, better)
        raise DataError(f"{row.id}: field {whole!r} is a whole conversation, but field {alone!r} is an answer alone")
    prompt_length = common_prefix_length(chosen, rejected)
    start = chosen[:prompt_length]
    if not contains(start, prompt):
        raise DataError(
            f"{row.id}: fields {better!r} and {worse!r} are whole conversations, but the prompt is not part of their "
            f"common beginning ({prompt_length} messages)"
        )
    start = start if contains(start, earlier) else earlier + start
    return pair(start, chosen[prompt_length:], rejected[prompt_length:])


def prompt_of(row: Row, question: str) -> tuple[list[Message], bool]:
    """A question that is a text, a message or messages -> (messages, whether it was a transcript with an open end)."""
    value = messages_or_text(row, question)
    if isinstance(value, str):
        return prompt_from_text(joined_instruction(row) if question == "instruction" else row.text(question))
    if question == "instruction" and row.given("input") and row.fields["input"]:
        raise row.fault("field 'instruction'", value, "a text, because there is an input too")
    return [row.message(value, f"field {question!r}")] if isinstance(value, dict) else row.messages(question), False


def messages_or_text(row: Row, field: str) -> Any:
    """A field whose text may spell messages.

    Raises:
        DataError: it spells messages in a notation that cannot be read (numpy prints lists without commas).
    """
    value = parsed_messages(row.value(field))
    if isinstance(value, str) and value.startswith("[") and value.endswith("]") and MESSAGES_AS_TEXT.match(value):
        raise row.fault(f"field {field!r}", value, "a text, or messages in JSON")
    return value


def answer_values(row: Row, better: str, worse: str) -> list[Any]:
    """Two answers, parsed if their texts spell messages. One of two texts alone is an answer that is JSON."""
    written = [row.value(field) for field in (better, worse)]
    values = [parsed_messages(value) for value in written]
    both_texts = all([isinstance(value, str) for value in written])
    return written if both_texts and any([isinstance(value, str) for value in values]) else values


def answer_of(row: Row, field: str, value: Any, *, strip: bool) -> list[Message]:
    if isinstance(value, list):
        return row.messages(field)
    if isinstance(value, dict):
        return [row.message(value, f"field {field!r}")]
    text = row.as_text(value, f"field {field!r}", expected="a text or a list of messages")
    return [assistant(text.strip() if strip else text)]


def joined_instruction(row: Row) -> str:
    """Instruction and, where there is one, its input, as AlpacaFarm joins them."""
    prompt = row.text("instruction")
    return f"{prompt}\n\n{row.text('input')}" if row.given("input") and row.text("input") else prompt


def earlier_turns(row: Row) -> list[Message]:
    """The turns before the question that have columns of their own: a system message, and `history` as messages or as
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


def after(earlier: list[Message], prompt: list[Message]) -> list[Message]:
    """The earlier turns and the prompt, which may begin with them itself."""
    return prompt if contains(prompt[: len(earlier)], earlier) else earlier + prompt


def without_repeated_prompt(
    text: str, prompt: list[Message], answers: list[list[Message]]
) -> tuple[list[Message], list[list[Message]]]:
    """Prompt and answers, where both answers repeat the prompt's `text` or open a turn of their own, without that."""
    if not all([len(answer) == 1 and answer[0]["role"] == "assistant" for answer in answers]):
        return prompt, answers
    start, texts = text.strip(), [answer[0]["content"].strip() for answer in answers]
    turns = transcript_turns(text)
    is_transcript = starts_with_user(turns)
    # Two words may begin both answers by chance.
    repeated = all([answer.startswith(start) and answer[len(start) : len(start) + 1].isspace() for answer in texts])
    if repeated and (is_transcript or len(start.split()) > 2):
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


def without_question(row: Row, source: "Source", better: str = "chosen", worse: str = "rejected") -> Made:
    """A row without a prompt: its answers are whole conversations, as messages, transcripts or texts."""
    if all(isinstance(value, list) for value in answer_values(row, better, worse)):
        return split_conversations(row.messages(better), row.messages(worse))
    if has_turns(row.value(better)):
        return of_transcripts(row, source, better, worse)
    return of_texts(row, source, better, worse)


# ---- whole conversations -------------------------------------------------------------------------------------------


def of_transcripts(row: Row, source: "Source", better: str, worse: str) -> Made:
    """Anthropic HH: both are transcripts, each turn begun by an empty line and "Human:" or "Assistant:".

    Consecutive turns of one speaker become one message. `source.single_turn` counts the turns before that, as the
    paper's code does.
    """
    chosen, rejected = transcript_turns(row.text(better)), transcript_turns(row.text(worse))
    if not (starts_with_user(chosen) and starts_with_user(rejected)):
        return Dropped("transcript does not start with a Human turn")
    if source.single_turn and (len(chosen) > 2 or len(rejected) > 2):
        return Deselected(MORE_TURNS)
    return split_conversations(merge_turns(chosen), merge_turns(rejected))


TURN_ENDS = tuple(".?!:;>…。\uff1f\uff01\uff1a\"')]}")
"""Characters that may end a prompt which only the common words of two answers tell; else it ends with its line."""


def is_prose(value: Any) -> bool:
    return isinstance(value, str) and len(value.split()) > 2


def of_texts(row: Row, source: "Source", better: str, worse: str) -> Made:
    """Both are plain texts: the prompt is what they begin with alike, if that ends a turn.

    Raises:
        DataError: the row has other text: what two answers begin with alike is then most likely no prompt.
    """
    passed_over = {better, worse, "margin", "score_chosen", "score_rejected", "source", *source.ignore_columns}
    others = [name for name, value in row.fields.items() if is_prose(value) and name not in passed_over]
    if others:
        raise DataError(
            f"{row.id}: {better} and {worse} are texts without a prompt, and the row holds other text in "
            f"{names_in_words(others)}: say which is the prompt in columns of the source, or name these in its "
            "ignore_columns"
        )
    chosen, rejected = row.text(better), row.text(worse)
    length = common_words_length(chosen, rejected)
    prompt = chosen[:length].strip()
    if not prompt or not (prompt.endswith(TURN_ENDS) or chosen[:length].rstrip(" ").endswith("\n")):
        return Dropped(NO_PROMPT)
    return pair([user(prompt)], [assistant(chosen[length:].strip())], [assistant(rejected[length:].strip())])


def common_words_length(a: str, b: str) -> int:
    """Length of the longest common prefix of two texts that cuts no word of either."""
    length = len(os.path.commonprefix([a, b]))  # noqa: RUF071 (characters, not paths, are meant)

    def in_word(text: str) -> bool:
        return length < len(text) and text[length - 1].isalnum() and text[length].isalnum()

    while length and (in_word(a) or in_word(b)):
        length -= 1
    return length


def of_ms_swift(row: Row, source: "Source") -> Made:
    """ms-swift: messages that end with the chosen answer, and the rejected one."""
    messages = row.messages("messages")
    return pair(after(earlier_turns(row), messages[:-1]), messages[-1:], [assistant(row.text("rejected_response"))])
