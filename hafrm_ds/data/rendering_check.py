"""What a chat template writes, compared with what it was given: text that it leaves out, and marks inside of texts.

A template may drop a system message, or what a reasoning model has thought. Two different answers then get one score,
and nothing fails. A text may hold the template's own marks, because somebody has rendered it before: it is rendered
twice, or a quotation ends the turn.
"""

import re
from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from hafrm_ds.data.pairs import Message
from hafrm_ds.data.tool_calls import as_written, pieces_of_tools

END_OF_REASONING = "</think>"
ANSWERS, ANSWER_REASONING = "the answers", f"what stands before {END_OF_REASONING} in the answers"
EARLIER_REASONING = f"what stands before {END_OF_REASONING} in earlier turns"
"""Templates of reasoning models drop it on purpose, and both answers share it."""

TEMPLATE_MARK = re.compile(r"<\|[^<>|\s{}]{1,40}\|>|\[/?[A-Z][A-Z_]{2,30}\]|<</?SYS>>|<(?:start|end)_of_turn>")
KNOWN_MARKS = (
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|endoftext|>"),
    *("<|user|>", "<|assistant|>", "<|system|>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
    *("<start_of_turn>", "<end_of_turn>", "### Human:", "### Assistant:", "### Instruction:", "### Response:"),
)
"""Of templates that are in wide use: they tell a text that was rendered before, by whichever of them."""
MARKS_NAMED = 4


def unwritten(messages: list[Message], text: str) -> list[str]:
    """What of `messages` does not stand in their rendering `text`, in words; white space does not count.

    A place in the text serves one message alone: the longest is looked for first.
    """
    found: dict[str, None] = {}
    pieces = [
        (piece, kind_of(message, is_reasoning, is_last=number == len(messages) - 1))
        for number, message in enumerate(messages)
        for piece, is_reasoning in pieces_of(message)
    ]
    if "tools" in messages[0]:
        pieces = [(as_written(piece, text), kind) for piece, kind in (*pieces, *pieces_of_tools(messages))]
    is_squeezed = False
    for piece, kind in sorted(pieces, key=lambda each: -len(each[0])):
        before, there, after = text.partition(squeezed(piece) if is_squeezed else piece)
        if not there and not is_squeezed:
            text, is_squeezed = squeezed(text), True
            before, there, after = text.partition(squeezed(piece))
        if there:
            text = f"{before}\0{after}"
        else:
            found[kind] = None
    return list(found)


def pieces_of(message: Message) -> list[tuple[str, bool]]:
    """(text without white space at its ends, whether it is reasoning) of a message."""
    content = message["content"]
    reasoning, _, spoken = content.rpartition(END_OF_REASONING)
    pieces = [(reasoning.replace("<think>", "").replace(END_OF_REASONING, "").strip(), True), (spoken.strip(), False)]
    return [(piece, is_reasoning) for piece, is_reasoning in pieces if piece]


def kind_of(message: Message, is_reasoning: bool, is_last: bool) -> str:
    if is_last and message["role"] == "assistant":
        return ANSWER_REASONING if is_reasoning else ANSWERS
    return EARLIER_REASONING if is_reasoning else f"{message['role']} messages"


def squeezed(text: str) -> str:
    return "".join(text.split())


def is_serious(kinds: Iterable[str]) -> bool:
    """Whether something is left out that nobody would leave out on purpose."""
    return any(kind != EARLIER_REASONING for kind in kinds)


def marks_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern:
    """Matches what texts should not hold: special tokens, marks of the template and of others in wide use."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    marks = {*KNOWN_MARKS, *special, *tokenizer.all_special_tokens, *TEMPLATE_MARK.findall(tokenizer.chat_template)}
    return re.compile(
        "|".join(re.escape(mark) for mark in sorted(filter(str.strip, marks), key=lambda each: -len(each)))
    )


def marks_in(messages: Iterable[Message], pattern: re.Pattern) -> list[str]:
    """The marks that stand in the contents of messages, each once, the first few."""
    found = (mark for message in messages for mark in pattern.findall(message["content"]))
    return list(dict.fromkeys(found))[:MARKS_NAMED]
