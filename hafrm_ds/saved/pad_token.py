"""A pad token for an exported model.

AutoModelForSequenceClassification reads the score at the rightmost token that is not the pad token. Where a rendered
text ends in the pad token, it reads too early, silently. Many models come with pad = eos and a template that ends in
eos; so an export brings a pad token of its own choice.
"""

import re
from dataclasses import dataclass
from functools import partial

import jinja2

from hafrm_ds.data.formatting import PROBE, ChatFormatter
from hafrm_ds.data.pairs import assistant, user

MEANT_FOR_IT = re.compile(r"pad|reserved|unused", re.IGNORECASE)
NEW_TOKEN = "<|pad|>"
ENDINGS = ("y", "y.", "y\n", "1", "}", "é", "y ")


@dataclass(frozen=True)
class PadToken:
    """text: the token. id: its id, or that which it gets when it is added. is_new: whether the tokenizer lacks it."""

    text: str
    id: int
    is_new: bool


def choose_pad_token(formatter: ChatFormatter, num_embeddings: int) -> PadToken:
    """A token that never ends a rendered text, at the least cost to the model.

    In this order: the tokenizer's own pad token, if it qualifies; a special token that was meant for it or reserved;
    one that the template does not write; the bos token, which stands at the start alone; a new token. A special token
    that is there is preferred to a new one, for which the embedding may have no row to spare.

    A special token qualifies if it is neither eos, which other software appends to texts, nor unk, which stands for
    what a vocabulary lacks, nor the last token of any rendering.

    Args:
        num_embeddings: rows of the model's embedding. An id beyond them qualifies only as a new token.
    """
    tokenizer = formatter.tokenizer
    forbidden = {tokenizer.eos_token_id, tokenizer.unk_token_id} | last_ids(formatter)
    special = {
        index: token.content
        for index, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special and index not in forbidden and index < num_embeddings
    }
    written = {index for index, text in special.items() if text in formatter.template} | {tokenizer.bos_token_id}
    for candidates in (
        [index for index in special if index == tokenizer.pad_token_id],
        [index for index in special if index not in written and MEANT_FOR_IT.search(special[index])],
        [index for index in special if index not in written],
        [index for index in special if index == tokenizer.bos_token_id],
    ):
        if candidates:
            return PadToken(special[candidates[0]], candidates[0], is_new=False)
    return PadToken(NEW_TOKEN, len(tokenizer), is_new=True)


def last_ids(formatter: ChatFormatter) -> set[int]:
    """The last token of renderings with answers of several endings, of a question alone, and of an opened answer."""
    question = PROBE[:1]
    renderings = [partial(formatter.encode, [*question, assistant(end)]) for end in ENDINGS]
    renderings += [partial(formatter.encode, [user("x")]), partial(formatter.encode_prompt, question)]
    found: set[int] = set()
    for rendering in renderings:
        try:
            found |= set(rendering()[-1:])
        except jinja2.TemplateError:  # a template may refuse a question without an answer
            continue
    return found
