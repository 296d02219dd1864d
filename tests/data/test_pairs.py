"""Every row format, what it drops, and what it says of rows that cannot be read."""

import pytest

from hafrm_ds.data.formats import FORMATS, NO_PAIRS, detect_format, read_groups_of
from hafrm_ds.data.pairs import Comparison, Deselected, Dropped, PreferenceGroup, Row, assistant, user
from hafrm_ds.data.sources import Source
from hafrm_ds.errors import DataError
from tests.data.format_rows import EXAMPLES

SOURCE = Source(path="pairs.jsonl")


def system(content):
    return {"role": "system", "content": content}


def convert(fields, source=SOURCE):
    row = Row(fields, "pairs.jsonl:7", "pairs")
    outcomes = read_groups_of(row, detect_format(row), source)
    return outcomes[0] if len(outcomes) == 1 else outcomes


def parts(pair):
    """Prompt, chosen and rejected answer of a pair."""
    assert isinstance(pair, PreferenceGroup), pair
    assert [each[:2] for each in pair.comparisons] == [(0, 1)]
    return pair.prompt, *pair.answers


def error_of(fields, source=SOURCE):
    with pytest.raises(DataError) as caught:
        convert(fields, source)
    return str(caught.value)


MARGINS = {"helpsteer2": 1.0, "ratings": 2.0, "groups": 2.0, "helpsteer3": 2.0, "webgpt": 2.0, "ultrafeedback": 5.0}
MARGINS |= {"best_of_n": 2.0}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_recognised_and_gives_the_same_pair(name):
    row = Row(EXAMPLES[name] | {"an": "extra column"}, "pairs.jsonl:7", "pairs")
    assert detect_format(row) == name
    (pair,) = read_groups_of(row, name, SOURCE)
    assert parts(pair) == (
        [user("p" if name != "summaries" else "POST: p\nTL;DR:")],
        [assistant("a")],
        [assistant("b")],
    )
    assert (pair.source, pair.id, pair.margin_fault) == ("pairs", "pairs.jsonl:7", "")
    assert pair.comparisons == (Comparison(0, 1, MARGINS.get(name)),)


def test_unknown_columns_are_named_with_the_nearest_format():
    message = error_of({"question": "p", "chosen": "a", "other": "b"})
    assert message.startswith("pairs.jsonl:7: the columns question, chosen, other are of no known format; the nearest ")
    assert "is question, which needs rejected too" in message and "columns: {prompt: COLUMN" in message
    assert len(message) < 400 and "\n" not in message


@pytest.mark.parametrize("name", NO_PAIRS)
def test_layouts_that_are_no_comparisons_are_refused_by_name(name):
    columns, reason = NO_PAIRS[name]
    message = error_of(dict.fromkeys(columns, "x"))
    assert message.startswith(f"pairs.jsonl:7: these are rows of {name} (") and reason in message
    assert len(message) < 300


# ---- explicit prompt -----------------------------------------------------------------------------------------------


def test_prompt_of_several_turns_with_answers_as_messages():
    prompt = [system("s"), user("1"), assistant("2"), user("3")]
    fields = {"prompt": prompt, "chosen": [assistant("a")], "rejected": [assistant("b")]}
    assert parts(convert(fields)) == (prompt, [assistant("a")], [assistant("b")])


def test_whole_conversations_repeat_a_text_prompt_as_in_ultrafeedback():
    fields = {"prompt": "p", "chosen": [user("p"), assistant("a")], "rejected": [user("p"), assistant("b")]}
    assert parts(convert(fields)) == ([user("p")], [assistant("a")], [assistant("b")])


def test_whole_conversations_may_add_a_system_message_and_later_turns():
    start = [system("s"), user("p"), assistant("x"), user("q")]
    fields = {"prompt": " p\n", "chosen": [*start, assistant("a")], "rejected": [*start, assistant("b")]}
    assert parts(convert(fields)) == (start, [assistant("a")], [assistant("b")])


def test_whole_conversations_with_equal_answers_keep_an_answer():
    conversation = [user("p"), assistant("a")]
    fields = {"prompt": "p", "chosen": conversation, "rejected": conversation}
    assert parts(convert(fields)) == ([user("p")], [assistant("a")], [assistant("a")])


def test_whole_conversations_without_the_prompt_are_an_error():
    fields = {"prompt": "other", "chosen": [user("p"), assistant("a")], "rejected": [user("p"), assistant("b")]}
    assert "the prompt is not part of their common beginning (1 messages)" in error_of(fields)


def test_one_whole_conversation_beside_a_bare_answer_is_an_error():
    fields = {"prompt": "p", "chosen": "a", "rejected": [user("p"), assistant("b")]}
    assert "field 'rejected' is a whole conversation, but field 'chosen' is an answer alone" in error_of(fields)


def test_a_transcript_as_prompt_becomes_messages():
    prompt = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant:"
    pair = convert({"prompt": prompt, "chosen": " a", "rejected": " b"})
    assert parts(pair) == ([user("one"), assistant("two"), user("three")], [assistant("a")], [assistant("b")])


def test_texts_stand_as_they_are():
    pair = convert({"prompt": " p\n", "chosen": "  a", "rejected": "b\n"})
    assert parts(pair) == ([user(" p\n")], [assistant("  a")], [assistant("b\n")])


@pytest.mark.parametrize("tools", [None, [], "", "[]", "null", {}, "{}"])
def test_columns_for_tools_that_a_row_does_not_use_are_nothing(tools):
    message = assistant("a") | {"tool_calls": None, "function_call": None}
    fields = {"prompt": [user("p")], "chosen": [message], "rejected": [assistant("b")], "tools": tools}
    assert parts(convert(fields)) == ([user("p")], [assistant("a")], [assistant("b")])


# ---- implicit prompt -----------------------------------------------------------------------------------------------


def test_common_messages_are_the_prompt():
    start = [user("1"), assistant("2"), user("3")]
    fields = {"chosen": [*start, assistant("a")], "rejected": [*start, assistant("b"), user("c"), assistant("d")]}
    assert parts(convert(fields)) == (start, [assistant("a")], [assistant("b"), user("c"), assistant("d")])


def test_conversations_without_a_common_message_are_dropped():
    fields = {"chosen": [user("1"), assistant("a")], "rejected": [user("2"), assistant("b")]}
    assert convert(fields) == Dropped("no common prompt")


def test_conversations_with_other_questions_after_a_common_turn_are_dropped():
    start = [user("1"), assistant("2")]
    fields = {"chosen": [*start, user("3"), assistant("a")], "rejected": [*start, user("4"), assistant("b")]}
    for prompt in ({}, {"prompt": [user("1")]}):
        assert convert(prompt | fields) == Dropped("no common prompt")
    texts = [transcript("Human: 1", "Assistant: 2", f"Human: {each}", "Assistant: a") for each in (3, 4)]
    assert convert({"chosen": texts[0], "rejected": texts[1]}) == Dropped("no common prompt")


def test_conversations_that_end_with_the_user_are_dropped():
    fields = {"chosen": [user("p"), assistant("a")], "rejected": [user("p"), assistant("b"), user("c")]}
    assert convert(fields) == Dropped("does not end with an answer")


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt", "answers"),
    [
        ("Name a fruit: apple", "Name a fruit: apricot", "Name a fruit:", ("apple", "apricot")),
        ("Is it so?\nYes.", "Is it so?\nNo.", "Is it so?", ("Yes.", "No.")),
        ("Tell me: more", "Tell me:", "Tell me:", ("more", "")),
        ("Tell\nmenial", "Tell\nme", "Tell", ("menial", "me")),
    ],
)
def test_common_words_are_the_prompt(chosen, rejected, prompt, answers):
    pair = convert({"chosen": chosen, "rejected": rejected})
    assert parts(pair) == ([user(prompt)], [assistant(answers[0])], [assistant(answers[1])])


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("apple", "apricot"),
        ("You should cook the tea.", "You should cook until it burns."),
        ("Tell me more", "Tell me"),
    ],
)
def test_what_answers_begin_with_alike_is_no_prompt_unless_it_ends_a_turn(chosen, rejected):
    assert convert({"chosen": chosen, "rejected": rejected}) == Dropped("no common prompt")


# ---- transcripts ---------------------------------------------------------------------------------------------------


def transcript(*turns):
    return "".join(f"\n\n{turn}" for turn in turns)


def test_transcripts_of_several_turns():
    start = ("Human: one", "Assistant: two", "Human: three")
    pair = convert({"chosen": transcript(*start, "Assistant: a"), "rejected": transcript(*start, "Assistant: b")})
    assert parts(pair) == ([user("one"), assistant("two"), user("three")], [assistant("a")], [assistant("b")])


def test_a_speaker_inside_a_line_or_after_one_line_break_is_text():
    question = "Translate: Human: hi\nAssistant: hello"
    pair = convert(
        {
            "chosen": transcript(f"Human: {question}", "Assistant: a"),
            "rejected": transcript(f"Human: {question}", "Assistant: b\n\nThe Human: x"),
        }
    )
    assert parts(pair) == ([user(question)], [assistant("a")], [assistant("b\n\nThe Human: x")])


def test_consecutive_turns_of_one_speaker_become_one_message():
    pair = convert(
        {
            "chosen": transcript("Human: one", "Human: two", "Assistant: a", "Assistant: b"),
            "rejected": transcript("Human: one", "Human: two", "Assistant: a", "Assistant: c"),
        }
    )
    assert parts(pair) == ([user("one\n\ntwo")], [assistant("a\n\nb")], [assistant("a\n\nc")])


def test_equal_transcripts_keep_an_answer():
    text = transcript("Human: p", "Assistant: a")
    assert parts(convert({"chosen": text, "rejected": text})) == ([user("p")], [assistant("a")], [assistant("a")])


@pytest.mark.parametrize(
    ("rejected", "reason"),
    [
        (transcript("Assistant: hello", "Human: p", "Assistant: b"), "transcript does not start with a Human turn"),
        ("Once upon a time" + transcript("Human: p", "Assistant: b"), "no common prompt"),
        ("", "transcript does not start with a Human turn"),
        (transcript("Human: other", "Assistant: b"), "no common prompt"),
        (transcript("Human: p", "Assistant: b", "Human: q"), "does not end with an answer"),
    ],
)
def test_odd_transcripts_are_dropped(rejected, reason):
    assert convert({"chosen": transcript("Human: p", "Assistant: a"), "rejected": rejected}) == Dropped(reason)


# ---- labelled responses --------------------------------------------------------------------------------------------

SAFE_RLHF = {
    "prompt": "p",
    "response_0": "first",
    "response_1": "second",
    "better_response_id": 0,
    "safer_response_id": 1,
    "is_response_0_safe": False,
    "is_response_1_safe": True,
}


@pytest.mark.parametrize(("label", "chosen"), [("helpful", "first"), ("safe", "second")])
def test_label_decides_between_responses(label, chosen):
    assert convert(SAFE_RLHF, Source(path="x", label=label)).answers[0] == [assistant(chosen)]


def test_exactly_one_safe():
    source = Source(path="x", exactly_one_safe=True)
    assert parts(convert(SAFE_RLHF, source))[1:] == ([assistant("second")], [assistant("first")])
    # As in the paper's code the label decides even where it contradicts the flags.
    contradicting = SAFE_RLHF | {"safer_response_id": 0}
    assert convert(contradicting, source).answers[0] == [assistant("first")]
    for both in (True, False):
        flags = {"is_response_0_safe": both, "is_response_1_safe": both}
        assert convert(SAFE_RLHF | flags, source) == Deselected("not exactly one safe answer")


def test_a_response_number_beside_0_and_1_is_a_tie():
    assert convert(SAFE_RLHF | {"safer_response_id": -1}) == Deselected("tie")


def test_alpaca_farm_joins_instruction_and_input():
    fields = {"instruction": "Sum up.", "input": "A text.", "output_1": "one", "output_2": "two", "preference": 2}
    assert parts(convert(fields)) == ([user("Sum up.\n\nA text.")], [assistant("two")], [assistant("one")])
    assert convert(fields | {"input": None}).prompt == [user("Sum up.")]
    assert convert(fields | {"preference": 0}) == Deselected("tie")


@pytest.mark.parametrize("winner", ["tie", "tie (bothbad)", "both_bad"])
def test_arena_ties(winner):
    assert convert(EXAMPLES["arena"] | {"winner": winner}) == Deselected("tie")


def test_arena_winner():
    assert convert(EXAMPLES["arena"] | {"winner": "model_a"}).answers[0] == [assistant("b")]
    message = error_of(EXAMPLES["arena"] | {"winner": "model_c"})
    assert message == "pairs.jsonl:7: field 'winner' is the text 'model_c', expected model_a, model_b or a tie"


# ---- single turn, margin, source -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "single"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, True),
        ({"prompt": [system("s"), user("p")], "chosen": "a", "rejected": "b"}, True),
        ({"prompt": [user("p"), assistant("x"), user("q")], "chosen": "a", "rejected": "b"}, False),
        (
            {
                "chosen": [user("p"), assistant("a"), user("q"), assistant("c")],
                "rejected": [user("p"), assistant("b"), user("q"), assistant("d")],
            },
            False,
        ),
        ({"chosen": transcript("Human: p", "Assistant: a"), "rejected": transcript("Human: p", "Assistant: b")}, True),
        (
            {
                "chosen": transcript("Human: p", "Human: q", "Assistant: a"),
                "rejected": transcript("Human: p", "Human: q", "Assistant: b"),
            },
            False,
        ),
    ],
)
def test_single_turn(fields, single):
    pair = convert(fields, Source(path="x", single_turn=True))
    assert isinstance(pair, PreferenceGroup) if single else pair == Deselected("more than one turn")


@pytest.mark.parametrize(
    ("extra", "margin"),
    [
        ({}, None),
        ({"margin": 2}, 2.0),
        ({"margin": None}, None),
        ({"score_chosen": 8.5, "score_rejected": 6}, 2.5),
        ({"margin": 1, "score_chosen": 8.5, "score_rejected": 6}, 1.0),
        ({"score_chosen": 8.5}, None),
    ],
)
def test_margin(extra, margin):
    assert convert(EXAMPLES["explicit_prompt"] | extra).comparisons[0].margin == margin


@pytest.mark.parametrize(("own", "source"), [("hh", "hh"), ("", "pairs"), (None, "pairs"), (3, "pairs")])
def test_source(own, source):
    assert convert(EXAMPLES["explicit_prompt"] | {"source": own}).source == source


# ---- rows that cannot be read --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            EXAMPLES["explicit_prompt"] | {"chosen": None},
            "field 'chosen' is null, expected a text or a list of messages",
        ),
        (EXAMPLES["explicit_prompt"] | {"prompt": 3}, "field 'prompt' is the int 3, expected a list of messages"),
        (EXAMPLES["explicit_prompt"] | {"prompt": []}, "field 'prompt' is a list of 0, expected a list of messages"),
        (EXAMPLES["implicit_text"] | {"chosen": None}, "field 'chosen' is null, expected a text"),
        (EXAMPLES["implicit_text"] | {"rejected": ["x"]}, "field 'rejected' is a list of 1, expected a text"),
        (SAFE_RLHF | {"safer_response_id": True}, "field 'safer_response_id' is true, expected a finite number"),
        (
            {name: SAFE_RLHF[name] for name in ("prompt", "response_0", "response_1")},
            "field 'safer_response_id' is missing (fields: prompt, response_0, response_1)",
        ),
        (
            {"chosen": [user("p"), {"role": "assistant"}], "rejected": [user("p"), assistant("b")]},
            "message 2 of field 'chosen' is an object with the keys role, expected an object with role and content",
        ),
        (
            {"prompt": [user([3])], "chosen": "a", "rejected": "b"},
            "content of message 1 of field 'prompt' is a list of 1, expected a text (other kinds of content are not",
        ),
        (
            {"prompt": "p", "chosen": "a \ud83d", "rejected": "b"},
            "field 'chosen' holds half of a surrogate pair at character 3",
        ),
    ],
)
def test_errors_name_row_and_field(fields, message):
    text = error_of(fields)
    assert text.startswith("pairs.jsonl:7: ")
    assert message in text


def test_flags_must_be_true_or_false():
    message = error_of(SAFE_RLHF | {"is_response_0_safe": "no"}, Source(path="x", exactly_one_safe=True))
    assert message == "pairs.jsonl:7: field 'is_response_0_safe' is the text 'no', expected true or false"


def test_long_values_are_shortened_in_messages():
    message = convert(EXAMPLES["explicit_prompt"] | {"margin": "x" * 100}).margin_fault
    assert "x" * 40 + "..." in message and "x" * 41 not in message
