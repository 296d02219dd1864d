"""Questions as token ids: cut as training cuts its pairs."""

import pytest

from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.pairs import assistant, user
from hafrm_ds.data.tokenization import tokenize_pair
from hafrm_ds.errors import DataError
from hafrm_ds.evaluation.evaluate import encode_question
from tests.tiny_tokenizers import byte_level_tokenizer


@pytest.fixture(scope="module")
def formatter():
    return ChatFormatter.create(byte_level_tokenizer(), "mistral-instruct", "2024-07-26")


ANSWERS = [[assistant("yes, it is so")], [assistant("no")]]


@pytest.mark.parametrize("max_length", [500, 60])
def test_two_answers_are_cut_like_a_pair(formatter, max_length):
    prompt = [user("a question of some length, which does not fit " * 3)]
    ids, was_cut = encode_question(formatter, "file:1", prompt, ANSWERS, max_length)
    pair = tokenize_pair(formatter, prompt, *ANSWERS, max_length, "keep_prompt_end").ids
    assert was_cut == (max_length == 60)
    assert [each.response for each in ids] == [pair.chosen, pair.rejected]
    assert ids[0].prompt == ids[1].prompt == pair.prompt
    assert ids[0].prompt[0] == formatter.tokenizer.bos_token_id
    assert max(len(each.prompt) + len(each.response) for each in ids) <= max_length


def test_an_answer_that_leaves_no_room_is_named(formatter):
    with pytest.raises(DataError, match="file:7: an answer leaves no room for its prompt in 20 tokens"):
        encode_question(formatter, "file:7", [user("why")], [[assistant("x" * 30)]], 20)
