"""Rows with two answers and a label that says which of them is the better."""

import json
import re
from typing import TYPE_CHECKING, Any

from hafrm_ds.data.formats.answers import joined_instruction, messages_or_text
from hafrm_ds.data.formats.parts import NO_PREFERENCE, TIE, Made, Parts, pair, split_conversations
from hafrm_ds.data.pairs import Deselected, Dropped, Message, Row, assistant, user
from hafrm_ds.errors import DataError

if TYPE_CHECKING:
    from hafrm_ds.data.sources import Source


def of_two(
    row: Row,
    prompt: list[Message],
    answers: tuple[str, str],
    better: int,
    margin: float | None = None,
    target: float = 1.0,
) -> Parts:
    """The pair of two text fields, of which the one at place `better` is preferred by `margin`, or with the probability
    `target`."""
    texts = [[assistant(row.text(field))] for field in answers]
    return pair(prompt, texts[better], texts[1 - better], margin, target)


def by_strength(row: Row, prompt: list[Message], answers: tuple[str, str], label: str) -> Made:
    """A preference from -3 (the first is better) over 0 (a tie) to 3."""
    if not has_label(row, label):
        return Deselected(NO_PREFERENCE)
    strength = row.number(label)
    return of_two(row, prompt, answers, int(strength > 0), abs(float(strength))) if strength else Deselected(TIE)


def has_label(row: Row, field: str) -> bool:
    """Whether a label is there; an error if the column is not. NaN is none: tables have it where nothing is given."""
    value = row.value(field)
    return row.given(field) and value == value


def label_of(row: Row, field: str) -> int:
    """A label that is 0 or 1."""
    label = row.number(field)
    if label not in (0, 1):
        raise row.fault(f"field {field!r}", row.value(field), "0 or 1")
    return int(label)


def of_safe_rlhf(row: Row, source: "Source") -> Made:
    """PKU-SafeRLHF and BeaverTails: two responses, the number (0 or 1) of the better and of the safer, and whether each
    is safe. `source.label` says which number decides, also between one safe and one unsafe response."""
    if source.exactly_one_safe and row.flag("is_response_0_safe") == row.flag("is_response_1_safe"):
        return Deselected("not exactly one safe answer")
    label = "better_response_id" if source.label == "helpful" else "safer_response_id"
    if not has_label(row, label):
        return Deselected(NO_PREFERENCE)
    preferred = row.number(label)
    if preferred not in (0, 1):
        return Deselected(TIE)
    return of_two(row, [user(row.text("prompt"))], ("response_0", "response_1"), int(preferred))


def of_alpaca_farm(row: Row, source: "Source") -> Made:
    """AlpacaFarm and annotations of AlpacaEval: an instruction with an optional input, two outputs, and a preference
    from 1 (the first) to 2 (the second), of which 1.5 and all else is a tie. What lies between is 1 + the probability
    that the second is preferred, as the weighted annotators of AlpacaEval 2 give it."""
    if not has_label(row, "preference"):
        return Deselected(NO_PREFERENCE)
    preferred = row.number("preference")
    if preferred == 1.5 or not 1 <= preferred <= 2:
        return Deselected(TIE)
    prompt = [user(joined_instruction(row))]
    second = float(preferred) - 1
    return of_two(row, prompt, ("output_1", "output_2"), int(second > 0.5), target=max(second, 1 - second))


def of_arena(row: Row, source: "Source") -> Made:
    """Chatbot Arena and MT-bench: two whole conversations and the winner: model_a, model_b or some kind of tie.

    A number in `turn` says how many turns were judged; later ones are left out.
    """
    if not has_label(row, "winner"):
        return Deselected(NO_PREFERENCE)
    winner = row.text("winner").lower()
    if "tie" in winner or "both" in winner:
        return Deselected(TIE)
    if winner not in ("model_a", "model_b"):
        raise row.fault("field 'winner'", row.fields["winner"], "model_a, model_b or a tie")
    a, b = row.messages("conversation_a"), row.messages("conversation_b")
    if row.given("turn"):
        turn = row.number("turn")
        a, b = first_turns(a, turn), first_turns(b, turn)
    return split_conversations(a, b) if winner == "model_a" else split_conversations(b, a)


def first_turns(conversation: list[Message], turns: float) -> list[Message]:
    """The conversation up to the last answer to its first `turns` questions."""
    questions = [place for place, message in enumerate(conversation) if message["role"] == "user"]
    return conversation[: questions[int(turns)]] if 1 <= turns < len(questions) else conversation


def of_kaggle_arena(row: Row, source: "Source") -> Made:
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
    return split_conversations(*conversations)


def json_texts(row: Row, field: str) -> list[Any]:
    """A JSON list of texts, of which some may be null."""
    try:
        found = json.loads(row.text(field))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not found or not all(text is None or isinstance(text, str) for text in found):
        raise row.fault(f"field {field!r}", row.value(field), "a list of texts in JSON")
    return found


def of_helpsteer3(row: Row, source: "Source") -> Made:
    """HelpSteer3: messages as context, two responses and a preference from -3 to 3."""
    is_text = isinstance(messages_or_text(row, "context"), str)
    prompt = [user(row.text("context"))] if is_text else row.messages("context")
    return by_strength(row, prompt, ("response1", "response2"), "overall_preference")


NEMO_TURN = re.compile(r"\n<extra_id_1>(User|Assistant)\n")


def of_helpsteer2(row: Row, source: "Source") -> Made:
    """HelpSteer2, its preferences: a prompt in which <extra_id_1> begins each later turn, and two responses."""
    first, *later = NEMO_TURN.split(row.text("prompt"))
    turns = zip(later[::2], later[1::2], strict=True)
    prompt = [user(first), *({"role": speaker.lower(), "content": text} for speaker, text in turns)]
    return by_strength(row, prompt, ("response_1", "response_2"), "preference_strength")


def of_summaries(row: Row, source: "Source") -> Made:
    """OpenAI's summarize_from_feedback, comparisons: a post or an article, two summaries, and the number of the better.
    The prompt is laid out as in the paper (Stiennon et al. 2020)."""
    if not has_label(row, "choice"):
        return Deselected(NO_PREFERENCE)
    info, summaries, choice = row.value("info"), row.value("summaries"), label_of(row, "choice")
    if not isinstance(info, dict) or not isinstance(summaries, list) or len(summaries) != 2:
        raise DataError(f"{row.id}: expected info with a post or an article, and two summaries")
    heads = {"subreddit": "SUBREDDIT: r/", "title": "TITLE: ", "post": "POST: ", "article": ""}
    parts = Row({name: info[name] for name in heads if info.get(name)}, row.id, "")
    if not parts.given("post") and not parts.given("article"):
        raise DataError(f"{row.id}: field 'info' holds neither a post nor an article")
    text = "\n".join(heads[name] + parts.text(name) for name in parts.fields) + "\nTL;DR:"
    answers = [[assistant(inner_text(row, summary, "summaries", "text").strip())] for summary in summaries]
    return pair([user(text)], answers[choice], answers[1 - choice])


def inner_text(row: Row, value: Any, field: str, key: str) -> str:
    """The text under `key` of an object in `field`."""
    if not isinstance(value, dict) or key not in value:
        raise row.fault(f"an item of field {field!r}", value, f"an object with {key}")
    return row.as_text(value[key], f"{key} of field {field!r}", expected="a text")


def of_shp(row: Row, source: "Source") -> Made:
    """Stanford Human Preferences: a post (`history`), two comments, and labels: 1 where the first is preferred."""
    if not has_label(row, "labels"):
        return Deselected(NO_PREFERENCE)
    return of_two(row, [user(row.text("history"))], ("human_ref_A", "human_ref_B"), 1 - label_of(row, "labels"))


def of_webgpt(row: Row, source: "Source") -> Made:
    """WebGPT comparisons: a question (an object with full_text), two answers and a score for each."""
    question = row.value("question")
    text = row.text("question") if isinstance(question, str) else inner_text(row, question, "question", "full_text")
    difference = float(row.number("score_0")) - float(row.number("score_1"))
    if not difference:
        return Deselected(TIE)
    return of_two(row, [user(text)], ("answer_0", "answer_1"), int(difference < 0), abs(difference))
