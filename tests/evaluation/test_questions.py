"""Questions as token ids: cut as training cuts its pairs."""

import pytest

from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.pairs import assistant, user
from hafrm_ds.data.tokenization import PromptWithResponses
from hafrm_ds.errors import DataError
from hafrm_ds.evaluation.questions import encode_question, groups_of
from tests.tiny_tokenizers import byte_level_tokenizer, tokenize_pair


@pytest.fixture(scope="module")
def formatter():
    return ChatFormatter.create(byte_level_tokenizer(), "mistral-instruct", "2024-07-26")


ANSWERS = [[assistant("yes, it is so")], [assistant("no")]]


@pytest.mark.parametrize("max_length", [500, 60])
def test_two_answers_are_cut_like_a_pair(formatter, max_length):
    prompt = [user("a question of some length, which does not fit " * 3)]
    groups, was_cut = encode_question(formatter, "file:1", prompt, ANSWERS, max_length)
    pair = tokenize_pair(formatter, prompt, *ANSWERS, max_length, "keep_prompt_end").ids
    assert was_cut == (max_length == 60)
    assert groups == [pair]
    assert pair.prompt[0] == formatter.tokenizer.bos_token_id
    assert pair.longest_conversation <= max_length


def test_an_answer_that_leaves_no_room_is_named(formatter):
    with pytest.raises(DataError, match="file:7: an answer leaves no room for its prompt in 20 tokens"):
        encode_question(formatter, "file:7", [user("why")], [[assistant("x" * 30)]], 20)


def test_responses_stay_in_order_where_their_prompts_end_at_different_tokens():
    """A tokenizer may merge the first token of some answers with the last of the prompt."""
    one, other = PromptWithResponses([1, 2], ([3],)), PromptWithResponses([1], ([23, 4],))
    assert groups_of([one, one, other, one]) == [([1, 2], ([3], [3])), other, one]


def test_an_answer_that_leaves_no_room_loses_its_end_if_asked_to(formatter):
    answers = [[assistant("x" * 30)], [assistant("y")]]
    groups, was_cut = encode_question(formatter, "file:7", [user("why")], answers, 20, cut_answers=True)
    assert was_cut and max(group.longest_conversation for group in groups) == 20
    bos = formatter.tokenizer.bos_token_id
    assert all(len(group.prompt) == 2 and group.prompt[0] == bos for group in groups)
