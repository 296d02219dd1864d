"""Tiny tokenizers, built offline: one token a byte, plus the merges a test asks for."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.pairs import OF_A_PAIR, Message
from hafrm_ds.data.tokenization import Tokenization, Truncation, tokenize_groups

SPECIAL_TOKENS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]

CHAT = (
    "{% for message in messages %}{{ message['role'] + ':' + message['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
"""Ends in eos."""


def tokenize_pair(
    formatter: ChatFormatter,
    prompt: list[Message],
    chosen: list[Message],
    rejected: list[Message],
    max_length: int,
    truncation: Truncation,
) -> Tokenization:
    """A single pair, as `tokenize_groups` tokenises many."""
    return tokenize_groups(formatter, [(prompt, [chosen, rejected], OF_A_PAIR)], max_length, truncation)[0]


def byte_level_tokenizer(
    chat_template: str | None = CHAT,
    *,
    merges: tuple[tuple[str, str], ...] = (),
    adds_bos: bool = False,
    eos: bool = True,
    pad_token: str | None = None,
) -> PreTrainedTokenizerFast:
    """`merges` are pairs of pieces in byte-level spelling (a space is Ġ, a newline Ċ); they may cross words."""
    pieces = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>" if eos else None,
        pad_token=pad_token,
        chat_template=chat_template,
    )
