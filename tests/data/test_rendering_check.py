"""What a template leaves out, and marks inside of texts: found for each message, said in the report, or refused."""

import json

import jinja2
import pytest
from rich.console import Console

from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.pairs import assistant, user
from hafrm_ds.data.preparation import PreparationOptions, PreparedGroups, prepare_groups
from hafrm_ds.data.rendering_check import (
    ANSWER_REASONING,
    ANSWERS,
    EARLIER_REASONING,
    is_serious,
    unwritten,
)
from hafrm_ds.data.report import DataReport
from hafrm_ds.data.sources import Source
from hafrm_ds.data.tokenization import IDENTICAL_ANSWERS, LEFT_OUT, tokenize_conversation
from hafrm_ds.errors import DataError
from tests.tiny_tokenizers import tokenize_pair

DATE = "2024-07-26"


def writes(content: str, which: str = "") -> str:
    """A template that writes ROLE: CONTENT for each of the messages `which`."""
    return "{% for message in messages " + which + "%}{{ message['role'] }}: {{ " + content + " }}\n{% endfor %}"


PLAIN = writes("message['content'] | trim")
LIKE_R1 = writes("message['content'].split('</think>')[-1] | trim")
LIKE_QWEN = writes("message['content'] if loop.last else message['content'].split('</think>')[-1]")
NO_SYSTEM = writes("message['content']", "if message['role'] != 'system'")
FIRST_LINE = writes("message['content'].split('\\n')[0]")
SPACED = writes("message['content'] | replace('\\n', ' ')")
FAILS = writes("message['content'] + (1 if message['content'] == 'Q7' else '')")
REFUSES = writes("raise_exception('No system!') if message['role'] == 'system' else message['content']")
SYSTEM = {"role": "system", "content": "Be brief."}


def thought(thinking: str, answer: str) -> list:
    return [assistant(f"<think>\n{thinking}\n</think>\n\n{answer}")]


@pytest.fixture
def formatter(make_tokenizer):
    return lambda template, **options: ChatFormatter.create(make_tokenizer(template), None, DATE, **options)


@pytest.fixture
def prepare(tmp_path):
    def prepared(formatter: ChatFormatter, rows: list[dict], **options) -> PreparedGroups:
        file = tmp_path / "pairs.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = {"max_length": 500, "truncation": "drop", "cache_dir": tmp_path / "cache"} | options
        sources = [Source(path=str(file))]
        return prepare_groups(sources, formatter=formatter, options=PreparationOptions(**given), role="train", seed=0)

    return prepared


def pair(number: int, chosen: list, rejected: list, *before: dict) -> dict:
    return {"prompt": [*before, user(f"Q{number}")], "chosen": chosen, "rejected": rejected}


@pytest.mark.parametrize(
    ("template", "messages", "found"),
    [
        (PLAIN, [SYSTEM, user(" Why? "), assistant("Because.\n")], []),
        (LIKE_R1, [user("Why?"), *thought("hm", "Because.")], [ANSWER_REASONING]),
        (LIKE_R1, [user("Why?"), assistant("Because.")], []),
        (LIKE_R1, [user("Why?"), *thought("", "Because.")], []),
        (LIKE_QWEN, [user("Why?"), *thought("hm", "So."), user("So?"), *thought("oh", "Yes.")], [EARLIER_REASONING]),
        (NO_SYSTEM, [SYSTEM, user("Why?"), assistant("Because.")], ["system messages"]),
        # Not to be found inside of another message; of two that are the same, one is missing.
        (NO_SYSTEM, [{"role": "system", "content": "brief"}, user("be brief!"), assistant("a")], ["system messages"]),
        (NO_SYSTEM, [{"role": "system", "content": "Hi."}, user("Hi."), assistant("a")], ["user messages"]),
        (FIRST_LINE, [user("Why?"), assistant("Because\nof that.")], [ANSWERS]),
        (FIRST_LINE, [user("Why\nnot?"), assistant("Because.")], ["user messages"]),
        (SPACED, [user("Why\nnot?"), assistant("Because\nof that.")], []),
        (writes("message['content'] | upper"), [user("Why?"), assistant("NO")], ["user messages"]),
    ],
)
def test_each_message_is_looked_for_in_what_was_written(formatter, template, messages, found):
    assert unwritten(messages, formatter(template).render(messages)) == found


def test_reasoning_of_earlier_turns_may_be_left_out():
    assert not is_serious([EARLIER_REASONING])
    assert is_serious([EARLIER_REASONING, ANSWERS])


def test_a_whole_set_is_refused_with_the_template_by_name(formatter, prepare):
    rows = [pair(n, thought("good", f"yes {n}"), thought("bad", f"no {n}")) for n in range(6)]
    said = (
        r"^train data: 6 of 6 pairs hold text that the tokenizer's own chat template does not write: it leaves out "
        r"what stands before </think> in the answers\. .*--data\.chat_template .*--data\.reasoning drop"
    )
    with pytest.raises(DataError, match=said):
        prepare(formatter(LIKE_R1), rows)
    rows = [pair(n, [assistant("yes")], [assistant("no")], SYSTEM) for n in range(6)]
    with pytest.raises(DataError, match=r"leaves out system messages\. Give a template that writes it"):
        prepare(formatter(NO_SYSTEM), rows)


def test_a_part_of_a_set_is_counted_and_shown(formatter, prepare):
    rows = [pair(n, [assistant("yes")], [assistant("no")], *[SYSTEM][: n % 2]) for n in range(7)]
    report = prepare(formatter(NO_SYSTEM), rows).report
    assert report.left_out == {"system messages": 3}
    assert DataReport.from_json(report.to_json()).left_out == report.left_out
    assert "WARNING 3 of 7 pairs hold text that the template does not write: system messages" in printed(report)


def test_reasoning_that_is_left_out_on_purpose(formatter, make_tokenizer, prepare, tmp_path):
    rows = [pair(n, thought("good", f"yes {n}"), thought("bad", f"no {n}")) for n in range(6)]
    rows[5]["rejected"] = thought("worse", "yes 5")
    for template in (LIKE_R1, PLAIN):
        dropping = formatter(template, reasoning="drop")
        prepared = prepare(dropping, rows, max_dropped_share=0.5)
        assert prepared.report.left_out == {} and prepared.report.total.dropped == {LEFT_OUT: 1}
        assert all(example.chosen.startswith("assistant: yes") for example in prepared.report.examples)
        # It travels with the tokenizer, to whoever renders with it.
        dropping.tokenizer.save_pretrained(tmp_path / "saved")
        again = ChatFormatter.create(make_tokenizer(dropping.template), None, DATE)
        conversation = [user("Q"), *thought("one", "1"), user("Q"), *thought("two", "2")]
        assert (
            again.render(conversation)
            == dropping.render(conversation)
            == "user: Q\nassistant: 1\nuser: Q\nassistant: 2\n"
        )
        assert again.fingerprint == dropping.fingerprint != formatter(template).fingerprint
        assert len(tokenize_conversation(again, conversation).prompt)
        field = [user("Q"), assistant("1") | {"reasoning_content": "one"}]
        assert again.render(field) == "user: Q\nassistant: 1\n"


def test_a_scored_conversation_is_refused_with_what_is_left_out(formatter):
    said = "the tokenizer's own chat template leaves out what stands before </think> in the answers"
    with pytest.raises(DataError, match=said):
        tokenize_conversation(formatter(LIKE_R1), [user("Why?"), *thought("hm", "Because.")])
    tokenize_conversation(formatter(LIKE_QWEN), [user("Why?"), *thought("hm", "So."), user("So?"), assistant("Yes.")])


def test_answers_that_become_equal(formatter):
    def outcome(template: str, chosen: list, rejected: list) -> str:
        return tokenize_pair(formatter(template), [user("Why?")], chosen, rejected, 500, "drop").outcome

    assert outcome(LIKE_R1, thought("good", "yes"), thought("bad", "yes")) == LEFT_OUT
    assert outcome(PLAIN, [assistant("yes")], [assistant("yes ")]) == IDENTICAL_ANSWERS


def test_the_templates_own_words_reach_the_user(formatter, prepare):
    rows = [pair(n, [assistant("yes")], [assistant("no")], *[SYSTEM][:n]) for n in range(2)]
    with pytest.raises(DataError, match=r"the template refuses the conversation: No system! .*first: .*pairs\.jsonl:2"):
        prepare(formatter(REFUSES), rows)
    with pytest.raises(DataError, match=r"refuses the conversation: No system!$"):
        tokenize_conversation(formatter(REFUSES), [SYSTEM, user("Why?")])


def test_an_error_of_any_type_in_a_template_is_a_refusal(formatter, prepare):
    with pytest.raises(jinja2.TemplateError, match=r"^TypeError: "):
        formatter(FAILS).render([user("Q7")])
    rows = [pair(n, [assistant("yes")], [assistant("no")]) for n in (6, 7, 8)]
    report = prepare(formatter(FAILS), rows, max_dropped_share=0.5).report
    [(reason, number)] = report.total.dropped.items()
    assert number == 1 and "refuses the conversation: TypeError: " in reason


@pytest.mark.parametrize(
    ("text", "mark"),
    [
        ("<|im_start|>user\nWhy?<|im_end|>", "<|im_start|>"),
        ("[INST] Why? [/INST]", "[INST]"),
        ("### Human: Why?### Assistant: So.", "### Human:"),
        ("an end of text: </s>", "</s>"),
        ("as <|mine|> writes it", "<|mine|>"),
    ],
)
def test_marks_inside_of_texts_are_counted_and_shown(formatter, prepare, text, mark):
    rows = [pair(n, [assistant("yes")], [assistant("no")]) for n in range(4)]
    rows[2]["chosen"] = [assistant(text)]
    report = prepare(formatter("{# <|mine|> #}" + PLAIN), rows).report
    assert report.marks[mark] == report.with_marks == 1
    assert "WARNING 1 of 4 pairs hold special tokens or marks of a chat template in their texts: " in printed(report)


def test_data_that_brings_its_own_markup_may(make_tokenizer, prepare):
    rows = [pair(n, [assistant("[INST]yes")], [assistant("no</s>")]) for n in range(4)]
    assert prepare(ChatFormatter.create(make_tokenizer(None), "text", DATE), rows).report.marks == {}


def printed(report: DataReport) -> str:
    console = Console(width=400)
    with console.capture() as capture:
        console.print(report.render())
    return capture.get()
