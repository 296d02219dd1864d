import itertools

import pytest

from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.pairs import OF_A_PAIR, Comparison
from hafrm_ds.data.tokenization import (
    EMPTY_ANSWER,
    EMPTY_PROMPT,
    IDENTICAL_AFTER_CUT,
    IDENTICAL_ANSWERS,
    REFUSED,
    TOO_LONG,
    UNCOMPARED,
    PromptWithResponses,
    TokenizedGroup,
    fit,
    split_at_prompt,
    tokenize_groups,
)
from tests.tiny_tokenizers import tokenize_pair

DATE = "2024-07-26"
BOS = 1
OTHER = 99


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def outcome(formatter, prompt, chosen, rejected, max_length=1000, truncation="drop"):
    return tokenize_pair(formatter, prompt, chosen, rejected, max_length, truncation).outcome


@pytest.fixture
def formatter(make_tokenizer):
    """role:content</s> for each message, one token a byte."""
    return ChatFormatter.create(make_tokenizer(pad_token="</s>"), None, DATE)


def test_prompt_plus_response_is_the_conversation(formatter):
    result = tokenize_pair(formatter, user("Q"), assistant("good"), assistant("bad"), 1000, "drop")
    assert result.outcome == "" and not result.cut
    assert result.ids.prompt == formatter.encode_prompt(user("Q"))
    assert result.ids.prompt + result.ids.responses[0] == formatter.encode(user("Q") + assistant("good"))
    assert result.ids.prompt + result.ids.responses[1] == formatter.encode(user("Q") + assistant("bad"))
    assert result.uncut_length == len(formatter.encode(user("Q") + assistant("good")))


def test_token_merged_over_the_boundary_belongs_to_the_response(make_tokenizer):
    # "assistant:" + "yes" has the token ":y", which the rendered prompt alone does not have.
    formatter = ChatFormatter.create(make_tokenizer(merges=((":", "y"),)), None, DATE)
    result = tokenize_pair(formatter, user("Q"), assistant("yes"), assistant("no"), 1000, "drop")
    decode = formatter.tokenizer.decode
    assert decode(formatter.encode_prompt(user("Q"))) == "user:Q</s>assistant:"
    assert decode(result.ids.prompt) == "user:Q</s>assistant"
    assert decode(result.ids.responses[0][:1]) == ":y"
    assert [decode([token]) for token in result.ids.responses[1]] == [":", "n", "o", "</s>"]


def test_answers_that_begin_alike_do_not_lengthen_the_prompt(formatter):
    result = tokenize_pair(formatter, user("Q"), assistant("same start A"), assistant("same start B"), 1000, "drop")
    assert result.ids.prompt == formatter.encode_prompt(user("Q"))
    assert formatter.tokenizer.decode(result.ids.responses[0]) == "same start A</s>"


def test_read_out_is_the_final_eos_though_eos_also_ends_the_prompt_and_is_the_pad_token(formatter):
    tokenizer = formatter.tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    ids = tokenize_pair(formatter, user("Q"), assistant("good"), assistant("bad"), 1000, "drop").ids
    pair = TokenizedGroup(ids.prompt, ids.responses, OF_A_PAIR, source="s", id="f:0")
    # user:Q</s>assistant:good</s> has 7 + 10 + 5 tokens, eos at 6 and 21; "bad" is one shorter.
    chosen = ids.prompt + ids.responses[0]
    assert [index for index, token in enumerate(chosen) if token == tokenizer.eos_token_id] == [6, 21]
    assert pair.read_outs == (21, 20)


def test_read_out_is_the_last_token_of_the_rendering_even_after_the_end_mark(make_tokenizer):
    formatter = ChatFormatter.create(make_tokenizer(None), "chatml", DATE)
    ids = tokenize_pair(formatter, user("Q"), assistant("good"), assistant("bad"), 1000, "drop").ids
    pair = TokenizedGroup(ids.prompt, ids.responses, OF_A_PAIR, source="s", id="f:0")
    # Each turn: mark, role, newline, content, mark, newline: 1+4+1+1+1+1 for user, 1+9+1+4+1+1 for the answer.
    assert pair.read_outs[0] == 9 + 17 - 1
    assert formatter.tokenizer.decode((ids.prompt + ids.responses[0])[25]) == "\n"


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "reason"),
    [
        (user("Q"), assistant(""), assistant("b"), EMPTY_ANSWER),
        (user("Q"), assistant("a"), assistant(" \n"), EMPTY_ANSWER),
        (user("Q"), [], assistant("b"), EMPTY_ANSWER),
        (user("Q"), assistant("a"), assistant("a"), IDENTICAL_ANSWERS),
        ([], assistant("a"), assistant("b"), EMPTY_PROMPT),
        (user("Q" * 100), assistant("a"), assistant("b"), TOO_LONG),
    ],
)
def test_dropped(formatter, prompt, chosen, rejected, reason):
    result = tokenize_pair(formatter, prompt, chosen, rejected, 100, "drop")
    assert result.outcome == reason
    assert result.ids == ([], ()) and result.comparisons == () and not result.cut


def test_answers_that_the_template_makes_identical(make_tokenizer):
    template = "{% for message in messages %}{{ message['content'] | trim }}{% endfor %}"
    formatter = ChatFormatter.create(make_tokenizer(template), None, DATE)
    assert outcome(formatter, user("Q"), assistant("yes"), assistant("yes ")) == IDENTICAL_ANSWERS


def test_no_token_before_the_first_response_token(make_tokenizer):
    formatter = ChatFormatter.create(make_tokenizer(None), "text", DATE)
    assert outcome(formatter, user(""), assistant("a"), assistant("b")) == EMPTY_PROMPT
    formatter = ChatFormatter.create(make_tokenizer(None, adds_bos=True), "text", DATE)
    assert outcome(formatter, user(""), assistant("a"), assistant("b")) == "", "BOS predicts the first token"


def test_refused_by_the_template(make_tokenizer):
    template = (
        "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ message['content'] }}{% endfor %}"
    )
    formatter = ChatFormatter.create(make_tokenizer(template), None, DATE)
    prompt = [{"role": "system", "content": "s"}, *user("Q")]
    assert outcome(formatter, prompt, assistant("a"), assistant("b")) == f"{REFUSED}: no system"
    assert outcome(formatter, user("Q"), assistant("a"), assistant("b")) == ""


def test_split_at_prompt_never_passes_the_rendered_prompt():
    assert split_at_prompt([[1, 2, 3, 4], [1, 2, 3, 5]], [1, 2]) == ([1, 2], ([3, 4], [3, 5]))
    assert split_at_prompt([[1, 2, 3], [1, 9, 3]], [1, 2]) == ([1], ([2, 3], [9, 3]))
    assert split_at_prompt([[1, 2], [1, 2, 3]], [1, 2, 3]) == ([1, 2], ([], [3]))


PAIR = PromptWithResponses([BOS, 10, 11, 12, 13], ([20, 21, 22], [30, 31]))  # conversations of 8 and 7 tokens


@pytest.mark.parametrize(
    ("truncation", "max_length", "bos", "expected"),
    [
        # Fits exactly: untouched.
        ("drop", 8, BOS, PAIR),
        ("keep_prompt_end", 8, BOS, PAIR),
        ("cut_response", 8, BOS, PAIR),
        # One token over.
        ("drop", 7, BOS, None),
        ("keep_prompt_end", 7, BOS, ([BOS, 11, 12, 13], ([20, 21, 22], [30, 31]))),
        ("keep_prompt_end", 7, OTHER, ([10, 11, 12, 13], ([20, 21, 22], [30, 31]))),
        # 7 - 5 leaves room for 2: the shorter response fits and stays whole.
        ("cut_response", 7, BOS, ([BOS, 10, 11, 12, 13], ([20, 21], [30, 31]))),
        # The last that keeps one token of the prompt beside BOS, and the first that does not.
        ("keep_prompt_end", 5, BOS, ([BOS, 13], ([20, 21, 22], [30, 31]))),
        ("keep_prompt_end", 4, BOS, None),
        ("keep_prompt_end", 4, OTHER, ([13], ([20, 21, 22], [30, 31]))),
        ("keep_prompt_end", 3, OTHER, None),
        # The last that keeps one token of each response, and the first that does not.
        ("cut_response", 6, BOS, ([BOS, 10, 11, 12, 13], ([20], [30]))),
        ("cut_response", 5, BOS, None),
    ],
)
def test_fit(truncation, max_length, bos, expected):
    fitted = fit(PAIR, max_length, truncation, bos)
    assert fitted == expected
    if fitted is not None:
        assert fitted.longest_conversation == min(max_length, 8)


def test_both_sides_over_long():
    # Prompt 50, responses 60 and 40, max_length 64: each policy cuts its own side alone, and no more than it must.
    ids = PromptWithResponses(list(range(100, 150)), (list(range(200, 260)), list(range(300, 340))))
    kept_prompt_end = fit(ids, 64, "keep_prompt_end", None)
    assert kept_prompt_end == ([146, 147, 148, 149], ids.responses)
    cut_response = fit(ids, 64, "cut_response", None)
    assert cut_response == (ids.prompt, (list(range(200, 214)), list(range(300, 314))))
    # A response that is over-long by itself is beyond keep_prompt_end, and a prompt beyond cut_response.
    assert fit(ids, 60, "keep_prompt_end", None) is None
    assert fit(ids, 50, "cut_response", None) is None


def test_identical_after_the_cut(formatter):
    prompt, chosen, rejected = user("Q"), assistant("same start, good"), assistant("same start, bad")
    room_for_difference = len(formatter.encode_prompt(prompt)) + len("same start, ") + 1
    assert outcome(formatter, prompt, chosen, rejected, room_for_difference, "cut_response") == ""
    assert outcome(formatter, prompt, chosen, rejected, room_for_difference - 1, "cut_response") == IDENTICAL_AFTER_CUT
    assert outcome(formatter, prompt, chosen, rejected, room_for_difference - 1, "keep_prompt_end") == ""


def test_one_answer_is_the_start_of_the_other(formatter):
    prompt, chosen, rejected = user("Q"), assistant("yes, of course"), assistant("yes")
    short = len(formatter.encode_prompt(prompt)) + len("yes")
    assert outcome(formatter, prompt, chosen, rejected, short, "cut_response") == IDENTICAL_AFTER_CUT
    result = tokenize_pair(formatter, prompt, chosen, rejected, short + 1, "cut_response")
    # yes, against yes</s>: the end mark alone tells them apart.
    assert result.cut and result.uncut_length == short + len(", of course") + 1
    assert [formatter.tokenizer.decode(ids) for ids in result.ids.responses] == ["yes,", "yes</s>"]


# ---- groups of more than two answers -------------------------------------------------------------------------------


def tokenized_group(formatter, answers, comparisons, max_length=1000, truncation="drop"):
    groups = [(user("Q"), [assistant(answer) for answer in answers], comparisons)]
    return tokenize_groups(formatter, groups, max_length, truncation)[0]


def answers_of(formatter, result) -> list[str]:
    return [formatter.tokenizer.decode(ids).removesuffix("</s>") for ids in result.ids.responses]


def all_of(number: int) -> list[Comparison]:
    return [Comparison(*both) for both in itertools.combinations(range(number), 2)]


def test_a_group_has_one_prompt_and_all_its_answers(formatter):
    comparisons = [Comparison(2, 0, 0.5), Comparison(2, 1, target=0.75, weight=2.0)]
    result = tokenized_group(formatter, ["good", "bad", "best"], comparisons)
    assert answers_of(formatter, result) == ["good", "bad", "best"]
    assert result.ids.prompt == formatter.encode_prompt(user("Q"))
    assert (result.outcome, result.comparisons, result.lost) == ("", tuple(comparisons), ())
    assert result.uncut_length == len(formatter.encode(user("Q") + assistant("good")))


def test_an_answer_that_cannot_be_used_takes_its_comparisons_along(formatter):
    """The others move up, and an answer that is compared with nothing any more goes too."""
    result = tokenized_group(formatter, ["a", " ", "b", "c"], all_of(4))
    assert answers_of(formatter, result) == ["a", "b", "c"]
    assert (result.comparisons, result.lost) == (tuple(all_of(3)), (EMPTY_ANSWER,))
    result = tokenized_group(formatter, ["a", " ", "b", "c"], [Comparison(0, 1), Comparison(3, 2, 0.5)])
    assert answers_of(formatter, result) == ["b", "c"]
    assert (result.comparisons, result.lost) == ((Comparison(1, 0, 0.5),), (EMPTY_ANSWER, UNCOMPARED))
    assert tokenized_group(formatter, ["a", " ", "b"], [Comparison(0, 1), Comparison(1, 2)]).outcome == EMPTY_ANSWER


def test_equal_answers_are_not_compared_with_one_another(formatter):
    result = tokenized_group(formatter, ["a", "b", "a"], all_of(3))
    assert answers_of(formatter, result) == ["a", "b", "a"]
    assert (result.comparisons, result.lost) == ((Comparison(0, 1), Comparison(1, 2)), (IDENTICAL_ANSWERS,))
    assert tokenized_group(formatter, ["a"] * 3, all_of(3)).outcome == IDENTICAL_ANSWERS


def test_the_longest_answers_go_until_the_others_fit(formatter):
    answers = ["a" * 30, "b" * 5, "c" * 20, "d" * 6]
    room = len(formatter.encode(user("Q") + assistant(answers[3])))
    result = tokenized_group(formatter, answers, all_of(4), room)
    assert answers_of(formatter, result) == [answers[1], answers[3]]
    assert (result.comparisons, result.lost, result.cut) == (tuple(all_of(2)), (TOO_LONG, TOO_LONG), False)
    assert result.uncut_length == len(formatter.encode(user("Q") + assistant(answers[0])))
    assert tokenized_group(formatter, answers, all_of(4), room - 1).outcome == TOO_LONG
    cut = tokenized_group(formatter, answers, all_of(4), room, "cut_response")
    assert answers_of(formatter, cut) == ["a" * 7, "b" * 5, "c" * 7, "d" * 6]
    assert cut.cut and cut.comparisons == tuple(all_of(4))
