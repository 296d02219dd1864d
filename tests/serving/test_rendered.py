"""Texts that a template has written become the ids of the messages, however a client has clipped them."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from hafrm_ds.data.formatting import NAMED_TEMPLATES, ChatFormatter
from hafrm_ds.data.pairs import assistant, user
from hafrm_ds.data.tokenization import tokenize_conversation
from hafrm_ds.errors import DataError
from hafrm_ds.saved.scorer import Scorer
from hafrm_ds.serving.rendered import Rendered, Template, encode, pieces
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


def test_half_of_a_surrogate_pair_is_refused(scorer):
    """A tokenizer takes no such text: it would end the worker, and with it what else is asked."""
    text = scorer.formatter.render([user("a"), assistant("b")]).replace("b", "b\ud83d")
    with pytest.raises(DataError, match="half of a surrogate pair"):
        encode(scorer, Template.of(scorer.formatter), Rendered(text, ""))


def test_what_is_too_long_is_refused(scorer):
    text = scorer.formatter.render([user("a" * 300), assistant("b")])
    with pytest.raises(DataError, match=r"more than max_tokens \(200\)"):
        encode(scorer, Template.of(scorer.formatter), Rendered(text, ""))


# ---- back to texts ---------------------------------------------------------------------------------------------------


def with_byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2's: a space belongs to the word behind it, and the first one of a text is not written."""
    entries = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abctexy.", "▁a", "te"]
    tokenizer = Tokenizer(
        models.BPE(
            {entry: place for place, entry in enumerate(entries)},
            [("▁", "a"), ("t", "e")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    last = [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), *last])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


TEXTS = [
    "a cat ate a cat.",
    "cat tea\n a  b",
    "été a",
    "😀 a👩‍👩‍👧x",
    "日本 a",
    "a\ufffdb",
    "a\ufffd😀\ufffd",
    "",
    "é" * 50,
]


@pytest.mark.parametrize("make", [with_byte_fallback, byte_level_tokenizer])
@pytest.mark.parametrize("text", TEXTS)
def test_the_texts_of_tokens_are_the_text(make, text):
    tokenizer = make()
    question, answer, end = (tokenizer(each, add_special_tokens=False)["input_ids"] for each in ("tea a", text, "</s>"))
    ids = [*answer, *end]
    found = pieces(tokenizer, question, ids)
    assert "".join(found) == tokenizer.decode([*question, *ids]).removeprefix(tokenizer.decode(question))
    assert len(found) == len(ids) and "".join(found).endswith(f"{text}</s>") and found[-1].endswith("</s>")
    assert pieces(tokenizer, question, []) == []


def test_a_character_of_several_tokens_stands_at_the_last():
    tokenizer = byte_level_tokenizer()
    ids = tokenizer("aé😀b")["input_ids"]
    assert pieces(tokenizer, [], ids) == ["a", "", "é", "", "", "", "😀", "b"]
    assert pieces(tokenizer, [], ids[:5]) == ["a", "", "é", "", "\ufffd"]  # it ends within a character


def test_bytes_that_are_no_text_are_told_after_a_while():
    tokenizer = byte_level_tokenizer()
    (byte,) = set(tokenizer("é")["input_ids"][:1])
    found = pieces(tokenizer, [], [byte] * 2000)
    assert len(found) == 2000 and set("".join(found)) == {"\ufffd"}
