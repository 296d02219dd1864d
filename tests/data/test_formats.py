"""Published layouts that differ in small ways, and what may not be lost of them in silence."""

import math
from decimal import Decimal

import pytest

from hafrm_ds.data.formats import FORMATS, detect_format, read_pairs_of
from hafrm_ds.data.pairs import Deselected, Dropped, Row, assistant, user
from hafrm_ds.data.sources import Source
from hafrm_ds.errors import DataError
from tests.data.format_rows import EXAMPLES
from tests.data.test_pairs import convert, error_of, parts

PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
SYSTEM = {"role": "system", "content": "s"}


# ---- what no column reads ------------------------------------------------------------------------------------------

SUSPICIOUS = [
    *("prompt", "instruction", "input", "query", "question", "system", "history", "context", "messages"),
    *("conversation", "conversations", "trajectory", "turn", "tools", "reasoning", "reasoning_content"),
    *("system_prompt", "chat_history"),
]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("column", SUSPICIOUS)
def test_a_column_of_the_conversation_that_is_not_read_refuses_the_row(name, column):
    known = FORMATS[name]
    if column in {*known.columns, *known.also_reads, "tools"}:
        return
    row = Row(EXAMPLES[name] | {column: "words of their own"}, "pairs.jsonl:7", "pairs")
    with pytest.raises(
        DataError, match="other text in" if name == "implicit_text" else "filled, but not read"
    ) as error:
        read_pairs_of(row, name, Source(path="x"))
    assert str(error.value).startswith("pairs.jsonl:7: ") and column in str(error.value)
    assert len(str(error.value)) < 300
    (pair,) = read_pairs_of(row, name, Source(path="x", ignore_columns=[column]))
    assert parts(pair)[1:] == ([assistant("a")], [assistant("b")])
    for empty in (None, "", []):
        (pair,) = read_pairs_of(Row(row.fields | {column: empty}, row.id, ""), name, Source(path="x"))
        assert parts(pair)[1:] == ([assistant("a")], [assistant("b")])


def test_a_column_that_repeats_the_conversation_loses_nothing():
    """UltraFeedback binarized has `messages`, Capybara `conversation` and `generation_prompt`."""
    messages = [user("p"), assistant("a")]
    assert convert(PAIR | {"messages": messages}).chosen == [assistant("a")]
    assert "messages: filled, but not read" in error_of(PAIR | {"messages": [user("other"), assistant("a")]})
    fields = {"chosen": messages, "rejected": [user("p"), assistant("b")], "generation_prompt": ["z"]}
    assert convert(fields | {"conversation": [{"input": "p", "output": "a"}]}).chosen == [assistant("a")]


# ---- prompts of several columns ------------------------------------------------------------------------------------


def test_alpaca_preference_reads_instruction_and_input():
    fields = {"chosen": "You should cook the tea.", "rejected": "You should cook until it burns."}
    fields |= {"instruction": "How long should I cook tea?", "input": "It is a large pot of tea."}
    assert convert(fields).prompt == [user("How long should I cook tea?\n\nIt is a large pot of tea.")]
    assert parts(convert(fields | {"input": ""})) == (
        [user("How long should I cook tea?")],
        [assistant("You should cook the tea.")],
        [assistant("You should cook until it burns.")],
    )


@pytest.mark.parametrize("question", ["prompt", "question", "instruction"])
def test_a_system_column_stands_before_the_question(question):
    fields = {"system": "s", question: "Where?", "chosen": "The shop.", "rejected": "The internet."}
    assert parts(convert(fields)) == ([SYSTEM, user("Where?")], [assistant("The shop.")], [assistant("The internet.")])


@pytest.mark.parametrize("history", [[["one", "two"]], [user("one"), assistant("two")]])
def test_history_stands_before_the_prompt(history):
    pair = convert(PAIR | {"history": history, "system": "s"})
    assert pair.prompt == [SYSTEM, user("one"), assistant("two"), user("p")]


def test_a_turn_of_history_that_is_no_question_with_its_answer():
    assert "turn 1 of field 'history' is a list of 1, expected a question" in error_of(PAIR | {"history": [["one"]]})


def test_a_system_message_alone_is_no_prompt():
    assert convert(PAIR | {"prompt": [SYSTEM]}) == Dropped("a system message alone is no prompt")
    fields = {"chosen": [SYSTEM, assistant("a")], "rejected": [SYSTEM, assistant("b")]}
    assert convert(fields) == Dropped("no common prompt")


def test_a_null_prompt_is_not_given():
    fields = {"prompt": None, "chosen": [user("p"), assistant("a")], "rejected": [user("p"), assistant("b")]}
    assert parts(convert(fields)) == ([user("p")], [assistant("a")], [assistant("b")])


def test_other_text_beside_answers_without_a_prompt_is_refused():
    fields = {"chosen": "The shop.\nx", "rejected": "The shop.\ny", "task": "Where do I buy tea?"}
    assert "other text in task" in error_of(fields)


# ---- answers that repeat the prompt --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "start"),
    [
        ("\n\nHuman: Tell me\n\nAssistant:", "\n\nHuman: Tell me\n\nAssistant: "),
        ("\n\nHuman: Tell me", "\n\nHuman: Tell me\n\nAssistant: "),
        ("\n\nHuman: Tell me", "\n\nAssistant: "),
        ("Tell me", None),
    ],
)
def test_answers_that_repeat_a_transcript_lose_it(prompt, start):
    answers = ("tea are good", "go away tea")
    chosen, rejected = answers if start is None else (start + answer for answer in answers)
    pair = convert({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    assert parts(pair) == ([user("Tell me")], [assistant(answers[0])], [assistant(answers[1])])


def test_answers_that_repeat_a_text_lose_it_but_not_two_words_by_chance():
    fields = {
        "prompt": "Tell me about tea.",
        "chosen": "Tell me about tea. Good.",
        "rejected": "Tell me about tea. Bad.",
    }
    assert parts(convert(fields))[1:] == ([assistant("Good.")], [assistant("Bad.")])
    fields = {"prompt": "Hi there", "chosen": "Hi there friend", "rejected": "Hi there you"}
    assert convert(fields).chosen == [assistant("Hi there friend")]


# ---- messages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("asks", "answers"), [("human", "gpt"), ("prompter", "assistant"), ("User", "Assistant")])
def test_known_names_of_roles(asks, answers):
    turns = [[{"role": asks, "content": "p"}, {"role": answers, "content": text}] for text in ("a", "b")]
    assert parts(convert({"chosen": turns[0], "rejected": turns[1]})) == (
        [user("p")],
        [assistant("a")],
        [assistant("b")],
    )


def test_unknown_roles_are_refused_by_name():
    message = error_of(PAIR | {"prompt": [{"role": "narrator", "content": "p"}]})
    assert "role of message 1 of field 'prompt' is the text 'narrator', expected one of system, user" in message


@pytest.mark.parametrize("field", ["prompt", "chosen"])
def test_messages_of_tools_are_dropped(field):
    assert convert(PAIR | {field: [assistant("calling"), {"role": "tool", "content": "3"}]}) == Dropped(
        "has tool calls, which are not supported"
    )


def test_tools_beside_texts_are_dropped():
    assert convert(PAIR | {"tools": '[{"type": "function"}]'}) == Dropped("has tool calls, which are not supported")


def test_messages_as_json_text():
    chosen, rejected = (
        f'[{{"role": "user", "content": "p"}}, {{"role": "assistant", "content": "{x}"}}]' for x in "ab"
    )
    expected = ([user("p")], [assistant("a")], [assistant("b")])
    assert parts(convert({"chosen": chosen, "rejected": rejected})) == expected
    assert parts(convert({"prompt": "p", "chosen": chosen, "rejected": rejected})) == expected
    assert convert(PAIR | {"chosen": '[{"a": 1}]'}).chosen == [assistant('[{"a": 1}]')]


def part(text):
    return {"type": "text", "text": text, "image": None, "mimeType": None}


def test_parts_of_text_are_joined_and_images_dropped():
    fields = EXAMPLES["arena"] | {
        "conversation_a": [user([part("p")]), assistant([part("b")])],
        "conversation_b": [user([part("p")]), assistant([part("a"), part("!")])],
        "full_conversation": [{"user": user("p")}],
    }
    assert parts(convert(fields)) == ([user("p")], [assistant("a!")], [assistant("b")])
    image = {"type": "image", "text": None, "image": "x.png", "mimeType": "image/png"}
    fields["conversation_a"] = [user([image, part("p")]), assistant([part("b")])]
    assert convert(fields) == Dropped("has images or other media, which are not supported")


# ---- labels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preference", "chosen"), [(1.0000048, "a"), (1.3, "a"), (1, "a"), (1.8, "b"), (1.9998, "b"), (2.0, "b")]
)
def test_annotations_of_alpaca_eval_lie_between_1_and_2(preference, chosen):
    assert convert(EXAMPLES["alpaca_farm"] | {"preference": preference}).chosen == [assistant(chosen)]


@pytest.mark.parametrize(("preference", "reason"), [(1.5, "tie"), (0, "tie"), (None, "no preference is given")])
def test_annotations_without_a_preference(preference, reason):
    assert convert(EXAMPLES["alpaca_farm"] | {"preference": preference}) == Deselected(reason)


@pytest.mark.parametrize("turn", [1, 2, 7, None])
def test_mt_bench_judges_a_turn(turn):
    a, b = ([user("p"), assistant(x), user("shorter"), assistant(x + x)] for x in "ab")
    pair = convert({"conversation_a": a, "conversation_b": b, "winner": "model_a", "turn": turn})
    last = 1 if turn == 1 else 3
    assert parts(pair) == ([user("p")], a[1 : last + 1], b[1 : last + 1])


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("helpsteer3", {"overall_preference": 0}, "tie"),
        ("helpsteer3", {"overall_preference": None}, "no preference is given"),
        ("webgpt", {"score_1": -1.0}, "tie"),
        ("kaggle_arena", {"winner_model_b": 0, "winner_tie": 1}, "tie"),
        ("ultrafeedback", {"completions": []}, "fewer than two answers"),
    ],
)
def test_rows_without_a_preference(name, changes, reason):
    assert convert(EXAMPLES[name] | changes) == Deselected(reason)


def test_the_other_answer_may_be_the_better():
    assert convert(EXAMPLES["helpsteer3"] | {"overall_preference": 3}).chosen == [assistant("b")]
    assert convert(EXAMPLES["shp"] | {"labels": 0}).chosen == [assistant("b")]
    assert convert(EXAMPLES["summaries"] | {"choice": 0}).chosen == [assistant("b")]


def test_summaries_are_of_a_post_with_its_title():
    info = {"subreddit": "tea", "title": "Tea", "post": "I like tea.", "id": "x"}
    prompt = "SUBREDDIT: r/tea\nTITLE: Tea\nPOST: I like tea.\nTL;DR:"
    assert convert(EXAMPLES["summaries"] | {"info": info}).prompt == [user(prompt)]


def test_rankings_give_the_best_against_each_other_answer():
    answers = [{"answer": text, "rank": rank} for text, rank in (("c", 2), ("a", 0), ("b", 1), ("d", 0))]
    pairs = convert({"prompt": "\n\nHuman: p\n\nAssistant: ", "answers": answers})
    assert pairs[0] == Deselected("tie")
    assert [parts(pair)[1:] for pair in pairs[1:]] == [
        ([assistant("a")], [assistant("b")]),
        ([assistant("a")], [assistant("c")]),
    ]


# ---- optional numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["significantly better", math.nan, 10**400, "8.5", True])
def test_a_margin_that_cannot_be_read_blocks_nothing(value):
    for fields in ({"margin": value}, {"score_chosen": 1, "score_rejected": value}):
        pair = convert(PAIR | fields)
        assert pair.margin is None
        assert pair.margin_fault.startswith("pairs.jsonl:7: field ") and len(pair.margin_fault) < 150


def test_decimals_are_numbers():
    assert convert(PAIR | {"score_chosen": Decimal("8.5"), "score_rejected": Decimal(3)}).margin == 5.5


def test_messages_are_bounded():
    assert len(error_of(PAIR | {"chosen": {"x" * 99 + str(n): 1 for n in range(99)}})) < 600
    assert len(error_of(PAIR | {"prompt": 10**5000})) < 300
    row = Row({f"{'x' * 99}{n}": 1 for n in range(99)}, "pairs.jsonl:7", "")
    with pytest.raises(DataError) as error:
        detect_format(row)
    assert len(str(error.value).splitlines()[0]) < 700
