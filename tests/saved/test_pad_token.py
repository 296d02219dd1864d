"""Which token pads an export: never one that ends a text, and a new one only where there is none."""

import pytest

from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.saved.pad_token import NEW_TOKEN, choose_pad_token
from tests.tiny_tokenizers import CHAT, byte_level_tokenizer

ENDS_IN_MARK = CHAT.replace("'</s>'", "'<|im_end|>'")
PLAIN = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def chosen(template: str = CHAT, extra: tuple[str, ...] = (), pad_token: str | None = None, num_embeddings: int = 300):
    tokenizer = byte_level_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": list(extra)})
    tokenizer.pad_token = pad_token
    return choose_pad_token(ChatFormatter.create(tokenizer, None, "2024-07-26"), num_embeddings)


@pytest.mark.parametrize(
    ("template", "extra", "pad_token", "expected"),
    [
        (CHAT, (), "</s>", "<|im_start|>"),  # pad = eos, which the template ends in: the trap
        (PLAIN, (), "</s>", "<|im_start|>"),  # pad = eos, which this template never writes: others append it
        (CHAT, (), "<|im_end|>", "<|im_end|>"),  # its own, which is sound
        (ENDS_IN_MARK, (), "<|im_end|>", "<|im_start|>"),  # not eos, but what this template ends in
        (CHAT, ("<tool>", "<|reserved_0|>"), "</s>", "<|reserved_0|>"),
        (CHAT, ("<tool>", "[PAD]"), None, "[PAD]"),
    ],
)
def test_the_choice(template, extra, pad_token, expected):
    pad = chosen(template, extra, pad_token)
    assert (pad.text, pad.is_new) == (expected, False)


def test_bos_is_taken_before_a_new_token_and_a_new_one_after_all():
    everything_written = "{{ '<|im_start|><|im_end|>' }}" + CHAT
    assert chosen(everything_written).text == "<s>"
    tokenizer = byte_level_tokenizer(everything_written)
    tokenizer.bos_token = None
    ends_in_bos = everything_written.replace("'</s>'", "'</s><s>'")
    tokenizer.chat_template = ends_in_bos.replace("'<|im_start|><|im_end|>'", "'<|im_start|><|im_end|>'")
    pad = choose_pad_token(ChatFormatter.create(tokenizer, None, "2024-07-26"), 300)
    assert (pad.text, pad.id, pad.is_new) == (NEW_TOKEN, len(tokenizer), True)


def test_a_token_beyond_the_embedding_is_passed_over():
    tokens = len(byte_level_tokenizer())
    assert chosen(extra=("[PAD]",), num_embeddings=tokens).text == "<|im_start|>"
    assert chosen(extra=("[PAD]",), num_embeddings=tokens + 1).text == "[PAD]"
