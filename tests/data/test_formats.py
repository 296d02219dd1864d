"""Published layouts that differ in small ways, and what may not be lost of them in silence."""

import math
import re
from decimal import Decimal

import pytest
from pydantic import ValidationError

from hafrm_ds.data.formats import FORMATS, NO_PAIRS, detect_format, read_groups_of, speaks_of_conversation
from hafrm_ds.data.pairs import OF_A_PAIR, Deselected, Dropped, Row, assistant, user
from hafrm_ds.data.sources import Source
from hafrm_ds.errors import DataError
from tests.data.format_rows import BEGIN, END, EXAMPLES, README, table
from tests.data.row_files import error_of as reading_error
from tests.data.row_files import write_lines
from tests.data.test_pairs import convert, error_of, parts

PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
SYSTEM = {"role": "system", "content": "s"}


# ---- what no column reads ------------------------------------------------------------------------------------------

SUSPICIOUS = [
    *("prompt", "instruction", "input", "query", "question", "system", "history", "context", "messages"),
    *("conversation", "conversations", "trajectory", "turn", "tools", "reasoning", "reasoning_content"),
    *("system_prompt", "chat_history", "passage", "retrieved_documents"),
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
        read_groups_of(row, name, Source(path="x"))
    assert str(error.value).startswith("pairs.jsonl:7: ") and column in str(error.value)
    assert len(str(error.value)) < 300
    (pair,) = read_groups_of(row, name, Source(path="x", ignore_columns=[column]))
    assert parts(pair)[1:] == ([assistant("a")], [assistant("b")])
    for empty in (None, "", []):
        (pair,) = read_groups_of(Row(row.fields | {column: empty}, row.id, ""), name, Source(path="x"))
        assert parts(pair)[1:] == ([assistant("a")], [assistant("b")])


def test_a_word_that_stands_in_the_conversation_by_chance_is_no_repetition():
    fields = {"prompt": "What is tea?", "chosen": "a good drink", "rejected": "no idea"}
    assert "chatHistory: filled, but not read" in error_of(fields | {"chatHistory": ["a"]})
    assert convert(fields | {"query": "What is tea?"}).answers[0] == [assistant("a good drink")]


def test_a_column_that_repeats_the_conversation_loses_nothing():
    """UltraFeedback binarized has `messages`, Capybara `conversation` and `generation_prompt`."""
    messages = [user("p"), assistant("a")]
    assert convert(PAIR | {"messages": messages}).answers[0] == [assistant("a")]
    assert "messages: filled, but not read" in error_of(PAIR | {"messages": [user("other"), assistant("a")]})
    fields = {"chosen": messages, "rejected": [user("p"), assistant("b")], "generation_prompt": ["z"]}
    assert convert(fields | {"conversation": [{"input": "p", "output": "a"}]}).answers[0] == [assistant("a")]


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


@pytest.mark.parametrize("answers", [{}, {"chosen": None, "rejected": None, "responses": ["a", "b"], "scores": [2, 1]}])
def test_earlier_turns_that_the_prompt_begins_with_stand_once(answers):
    whole = [SYSTEM, user("one"), assistant("two"), user("p")]
    fields = {name: value for name, value in (PAIR | answers | {"prompt": whole}).items() if value is not None}
    assert convert(fields | {"system": "s"}).prompt == whole
    assert convert(fields | {"system": "s", "history": [["one", "two"]]}).prompt == whole
    assert convert(fields | {"system": "t"}).prompt == [{"role": "system", "content": "t"}, *whole]


def test_a_turn_of_history_that_is_no_question_with_its_answer():
    assert "turn 1 of field 'history' is a list of 1, expected a question" in error_of(PAIR | {"history": [["one"]]})


def test_a_system_message_alone_is_no_prompt():
    assert convert(PAIR | {"prompt": [SYSTEM]}) == Dropped("a system message alone is no prompt")
    fields = {"chosen": [SYSTEM, assistant("a")], "rejected": [SYSTEM, assistant("b")]}
    assert convert(fields) == Dropped("no common prompt")


def test_a_null_prompt_is_not_given():
    fields = {"prompt": None, "chosen": [user("p"), assistant("a")], "rejected": [user("p"), assistant("b")]}
    assert parts(convert(fields)) == ([user("p")], [assistant("a")], [assistant("b")])


@pytest.mark.parametrize(
    "answers",
    [
        {"chosen": [user("p"), assistant("a")], "rejected": [user("p"), assistant("b")]},
        {"chosen": "\n\nHuman: p\n\nAssistant: a", "rejected": "\n\nHuman: p\n\nAssistant: b"},
    ],
)
def test_what_stands_before_a_null_prompt_stays(answers):
    earlier = {"system": "s", "history": [["one", "two"]]}
    expected = [SYSTEM, user("one"), assistant("two"), user("p")]
    assert convert({"prompt": None, **earlier, **answers}).prompt == expected
    assert convert({"instruction": None, **earlier, **answers}).prompt == expected
    assert convert({"prompt": None, **answers}).prompt == [user("p")]
    argilla = {f"{name}_response": answer for name, answer in answers.items()}
    assert convert({"instruction": None, **earlier, **argilla}).prompt == expected
    assert "'instruction' is null" in error_of({"instruction": None, "input": "i", **argilla})


def test_a_system_message_that_conversations_begin_with_stands_once():
    answers = {"chosen": [SYSTEM, user("p"), assistant("a")], "rejected": [SYSTEM, user("p"), assistant("b")]}
    assert convert({"prompt": None, "system": "s", **answers}).prompt == [SYSTEM, user("p")]


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
    assert convert(fields).answers[0] == [assistant("Hi there friend")]


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


def test_messages_as_json_text():
    chosen, rejected = (
        f'[{{"role": "user", "content": "p"}}, {{"role": "assistant", "content": "{x}"}}]' for x in "ab"
    )
    expected = ([user("p")], [assistant("a")], [assistant("b")])
    assert parts(convert({"chosen": chosen, "rejected": rejected})) == expected
    assert parts(convert({"prompt": "p", "chosen": chosen, "rejected": rejected})) == expected
    assert convert(PAIR | {"chosen": '[{"a": 1}]'}).answers[0] == [assistant('[{"a": 1}]')]


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
    assert convert(EXAMPLES["alpaca_farm"] | {"preference": preference}).answers[0] == [assistant(chosen)]


@pytest.mark.parametrize(
    ("preference", "reason"),
    [(1.5, "tie"), (0, "tie"), (None, "no preference is given"), (math.nan, "no preference is given")],
)
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
    assert convert(EXAMPLES["helpsteer3"] | {"overall_preference": 3}).answers[0] == [assistant("b")]
    assert convert(EXAMPLES["shp"] | {"labels": 0}).answers[0] == [assistant("b")]
    assert convert(EXAMPLES["summaries"] | {"choice": 0}).answers[0] == [assistant("b")]


def test_summaries_are_of_a_post_with_its_title():
    info = {"subreddit": "tea", "title": "Tea", "post": "I like tea.", "id": "x"}
    prompt = "SUBREDDIT: r/tea\nTITLE: Tea\nPOST: I like tea.\nTL;DR:"
    assert convert(EXAMPLES["summaries"] | {"info": info}).prompt == [user(prompt)]


# ---- optional numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["significantly better", math.nan, 10**400, "8.5", True])
def test_a_margin_that_cannot_be_read_blocks_nothing(value):
    for fields in ({"margin": value}, {"score_chosen": 1, "score_rejected": value}):
        pair = convert(PAIR | fields)
        assert pair.comparisons == OF_A_PAIR
        assert pair.margin_fault.startswith("pairs.jsonl:7: field ") and len(pair.margin_fault) < 150


def test_decimals_are_numbers():
    assert convert(PAIR | {"score_chosen": Decimal("8.5"), "score_rejected": Decimal(3)}).comparisons[0].margin == 5.5


def test_messages_are_bounded():
    assert len(error_of(PAIR | {"chosen": {"x" * 99 + str(n): 1 for n in range(99)}})) < 600
    assert len(error_of(PAIR | {"prompt": 10**5000})) < 300
    row = Row({f"{'x' * 99}{n}": 1 for n in range(99)}, "pairs.jsonl:7", "")
    with pytest.raises(DataError) as error:
        detect_format(row)
    assert len(str(error.value).splitlines()[0]) < 700


# ---- what a source may say -----------------------------------------------------------------------------------------


def test_columns_of_a_source_name_those_of_any_layout(read):
    row = {"ask": "p", "good": "a", "bad": "b", "rules": "s", "prompt": "another text of the row"}
    write_lines("x.jsonl", [row])
    columns = {"prompt": "ask", "chosen": "good", "rejected": "bad", "system": "rules"}
    message = reading_error(read, {"path": "x.jsonl", "columns": columns})
    assert message.startswith("x.jsonl:1: the source's columns give the name prompt to another column")
    (pair,) = read({"path": "x.jsonl", "columns": columns, "ignore_columns": ["prompt"]})
    assert (pair["prompt"], pair["answers"]) == ([SYSTEM, user("p")], [[assistant("a")], [assistant("b")]])
    del columns["system"]
    options = {"path": "x.jsonl", "columns": columns, "ignore_columns": ["prompt"]}
    (pair,) = read(options)  # "rules" is no name that speaks of the conversation: it is told, as every column not read
    assert pair["remarks"] == "not read: rules"
    write_lines("x.jsonl", [row | {"chat_history": ["x"]}])
    assert "x.jsonl:1: chat_history: filled, but not read" in reading_error(read, options)


def test_columns_may_swap_names_and_keep_what_they_do_not_name(read):
    write_lines("x.jsonl", [{"prompt": "p", "chosen": "b", "rejected": "a", "score_chosen": 1, "score_rejected": 3}])
    columns = {"chosen": "rejected", "rejected": "chosen", "score_chosen": "score_rejected"}
    (pair,) = read({"path": "x.jsonl", "columns": columns | {"score_rejected": "score_chosen"}})
    assert (pair["answers"], pair["comparisons"][0]["margin"]) == ([[assistant("a")], [assistant("b")]], 2.0)


def test_columns_that_no_row_has_are_refused(read):
    write_lines("x.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"votes": 1} | PAIR])
    columns = {"margin": "votse"}
    message = reading_error(read, {"path": "x.jsonl", "columns": columns})
    assert message == (
        "x.jsonl: the source's columns read margin from 'votse', which no row has (columns: prompt, chosen, rejected, "
        "votes)"
    )
    assert read({"path": "x.jsonl", "columns": {"margin": "votes"}})["remarks"][:] == ["", ""]


def test_columns_that_a_format_reads_are_left_unread_too(read):
    columns = {"system": "s", "margin": "much", "source": "x"}
    write_lines("x.jsonl", [PAIR | columns])
    (pair,) = read({"path": "x.jsonl", "ignore_columns": list(columns)})
    assert (pair["prompt"], pair["source"]) == ([user("p")], "x")
    assert pair["remarks"] == "not read: system\nnot read: margin\nnot read: source"
    write_lines("y.jsonl", [{"prompt": "?"} | {name: [user("p"), assistant(name)] for name in ("chosen", "rejected")}])
    (pair,) = read({"path": "y.jsonl", "ignore_columns": ["prompt"]})
    assert (pair["format"], pair["prompt"]) == ("implicit_messages", [user("p")])


def test_a_label_is_chosen_where_there_are_two(read):
    write_lines("x.jsonl", [PAIR])
    message = reading_error(read, {"path": "x.jsonl", "label": "helpful"})
    assert message == "x.jsonl:1: label helpful was given, but these are rows of format explicit_prompt, not safe_rlhf"


def test_roles_of_a_source(read):
    turns = [[{"role": "Customer", "content": "p"}, {"role": "agent", "content": text}] for text in "ab"]
    write_lines("x.jsonl", [{"chosen": turns[0], "rejected": turns[1]}])
    assert "'Customer', expected one of system, user" in reading_error(read, "x.jsonl")
    (pair,) = read({"path": "x.jsonl", "roles": {"customer": "user", "agent": "assistant"}})
    assert (pair["prompt"], pair["answers"][0]) == ([user("p")], [assistant("a")])
    assert pair["remarks"] == "role: Customer -> user\nrole: agent -> assistant"


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"columns": {"system": "x", "source": "x"}}, "system and source cannot both be read from the column 'x'"),
        ({"columns": {"promt": "x"}}, "no format has a column 'promt'; did you mean 'prompt'?"),
        ({"roles": {"x": "narrator"}}, "Input should be 'system', 'user', 'assistant' or 'developer'"),
        ({"ranking": "first"}, "Input should be 'all', 'best' or 'adjacent'"),
        ({"min_score_gap": 0}, "Input should be greater than 0"),
        ({"max_answers": 1}, "Input should be greater than or equal to 2"),
    ],
)
def test_faults_of_what_a_source_says(options, fault):
    with pytest.raises(ValidationError, match=re.escape(fault)):
        Source(path="x", **options)


def test_ignored_images_are_left_out():
    fields = PAIR | {"images": ["x.png"]}
    assert convert(fields) == Dropped("has images or other media, which are not supported")
    assert convert(fields, Source(path="x", ignore_columns=["images"])).answers[0] == [assistant("a")]


# ---- more of the layouts -------------------------------------------------------------------------------------------


def test_reasoning_beside_the_content_stands_in_front_of_it():
    answer = {"role": "assistant", "content": "a", "reasoning_content": "It is a.\n"}
    assert convert(PAIR | {"chosen": [answer]}).answers[0] == [assistant("<think>\nIt is a.\n</think>\n\na")]


@pytest.mark.parametrize("key", ["images", "audio"])
def test_a_message_with_media_beside_its_content_is_dropped(key):
    fields = PAIR | {"prompt": [user("p") | {key: ["x"]}]}
    assert convert(fields) == Dropped("has images or other media, which are not supported")


def test_one_answer_that_is_json_is_a_text():
    json_answer = '[{"role": "user", "content": "a chat"}]'
    assert convert(PAIR | {"chosen": json_answer}).answers[0] == [assistant(json_answer)]


def test_messages_that_numpy_has_printed_are_refused():
    printed = "[{'role': 'user', 'content': 'p'}\n {'role': 'assistant', 'content': 'x'}]"
    assert "expected a text, or messages in JSON" in error_of(PAIR | {"prompt": printed})


def test_an_instruction_in_messages_does_not_lose_its_input():
    fields = {"instruction": [user("p")], "input": "x", "chosen": "a", "rejected": "b"}
    assert "expected a text, because there is an input too" in error_of(fields)


def test_transcripts_with_a_system_part_and_other_line_ends():
    pair = convert(
        {name: f"Be kind.\r\n\r\nHuman: p\r\n\r\nAssistant: {x}" for name, x in zip(("chosen", "rejected"), "ab")}
    )
    assert parts(pair) == ([{"role": "system", "content": "Be kind."}, user("p")], [assistant("a")], [assistant("b")])
    pair = convert({name: f"### Human: p### Assistant: {x}" for name, x in zip(("chosen", "rejected"), "ab")})
    assert parts(pair) == ([user("p")], [assistant("a")], [assistant("b")])


@pytest.mark.parametrize("winner", ["Tie", "both bad", "bothbad", "TIE (bothbad)"])
def test_ties_of_arenas_in_other_spellings(winner):
    assert convert(EXAMPLES["arena"] | {"winner": winner}) == Deselected("tie")


def test_turns_of_helpsteer2_begin_with_marks():
    prompt = "p\n<extra_id_1>Assistant\nx\n<extra_id_1>User\nq"
    pair = convert(EXAMPLES["helpsteer2"] | {"prompt": prompt, "preference_strength": 2})
    assert parts(pair) == ([user("p"), assistant("x"), user("q")], [assistant("b")], [assistant("a")])
    assert pair.comparisons[0].margin == 2


def test_trees_give_a_group_at_every_prompt_with_ranked_replies():
    def node(role, text, rank=None, replies=(), **more):
        return {"role": role, "text": text, "rank": rank, "replies": list(replies)} | more

    later = node("prompter", "q", 0, [node("assistant", "d", 1), node("assistant", "c", 0)])
    deleted = node("assistant", "x", 1, deleted=True)
    tree = node("prompter", "p", None, [node("assistant", "a", 0, [later]), node("assistant", "b", 2), deleted])
    outcomes = convert({"message_tree_id": "1", "prompt": tree})
    assert [parts(pair) for pair in outcomes] == [
        ([user("p")], [assistant("a")], [assistant("b")]),
        ([user("p"), assistant("a"), user("q")], [assistant("c")], [assistant("d")]),
    ]


def test_a_prompt_of_another_format_in_the_same_file_is_found():
    fields = {"prompt": None, "instruction": "p", "chosen": "a", "rejected": "b"}
    assert detect_format(Row(fields, "x:1", "")) == "alpaca_preference"


@pytest.mark.parametrize(
    ("name", "speaks"),
    [
        ("systemPrompt", True),
        ("chat history", True),
        ("input_text", True),
        ("turn_1", True),
        ("system_message_json", True),
        ("input_ids", False),
        ("prompt_id", False),
        ("text", False),
        ("context_length", False),
        ("labelling_prompt", False),
    ],
)
def test_names_that_speak_of_the_conversation(name, speaks):
    assert bool(speaks_of_conversation(name)) == speaks


def test_the_readme_shows_every_format_with_a_row():
    assert f"{BEGIN}{table()}{END}" in README.read_text()
    for name, (columns, _) in NO_PAIRS.items():
        assert f"{name} ({', '.join(f'`{column}`' for column in columns)})" in " ".join(README.read_text().split())
