"""Texts that a template has written become the ids of the messages, however a client has clipped them."""

import pytest

from hafrm_ds.data.formatting import NAMED_TEMPLATES, ChatFormatter
from hafrm_ds.data.pairs import assistant, user
from hafrm_ds.data.tokenization import tokenize_conversation
from hafrm_ds.errors import DataError
from hafrm_ds.saved.scorer import Scorer
from hafrm_ds.serving.rendered import Rendered, Template, encode
from tests.tiny_models import tiny_causal_lm
from tests.tiny_tokenizers import CHAT, byte_level_tokenizer

QUESTION = [user("Is it so?"), assistant("No."), user("x and y?")]


class NoModel(Scorer):
    """A formatter with the limits of a model."""

    heads = ("reward",)

    def forward(self, batch, **heads):
        raise AssertionError


@pytest.fixture(params=["own", "own with BOS", "chatml", "mistral-instruct", "phi-2"])
def scorer(request):
    template = CHAT if request.param.startswith("own") else NAMED_TEMPLATES[request.param]
    tokenizer = byte_level_tokenizer(template, adds_bos="BOS" in request.param)
    formatter = ChatFormatter.create(tokenizer, None, "2024-07-26")
    config = tiny_causal_lm("llama", vocab_size=len(tokenizer), max_position_embeddings=512).config
    return NoModel(formatter, config, layout="packed", max_tokens=200)


def test_a_text_is_scored_as_its_messages(scorer):
    formatter, template = scorer.formatter, Template.of(scorer.formatter)
    messages = [*QUESTION, assistant("Yes, y.")]
    whole, prompt = formatter.render(messages), formatter.render_prompt(QUESTION)
    expected = tokenize_conversation(formatter, messages)
    body = whole.removesuffix(template.ending)
    for text in (whole, whole.rstrip(), body, body.removeprefix(template.bos)):
        start = prompt if text.startswith(prompt) else prompt.removeprefix(template.bos)
        assert encode(scorer, template, Rendered(text, start)) == expected
        alone = encode(scorer, template, Rendered(text, ""))
        assert [*alone.prompt, *alone.responses[0]] == [*expected.prompt, *expected.responses[0]]


def test_what_another_template_has_written_is_refused(scorer):
    template = Template.of(scorer.formatter)
    with pytest.raises(DataError, match="has not rendered it"):
        encode(scorer, template, Rendered("Question: what? Answer: that.", "Question: what?"))


def test_what_is_too_long_is_refused(scorer):
    text = scorer.formatter.render([user("a" * 300), assistant("b")])
    with pytest.raises(DataError, match=r"more than max_tokens \(200\)"):
        encode(scorer, Template.of(scorer.formatter), Rendered(text, ""))
