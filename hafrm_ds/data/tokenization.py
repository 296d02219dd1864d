"""From one preference pair to token ids: where the prompt ends, what is truncated and what is dropped.

Both whole conversations are rendered and encoded at once. The prompt is their longest common token prefix, at most the
rendered prompt; everything after it is response. So a token that BPE merges over the boundary belongs to the response,
and prompt + response is always exactly what the model sees when it scores the conversation.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import jinja2

from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.pairs import Message
from hafrm_ds.data.rendering_check import ANSWER_REASONING, is_serious, marks_in
from hafrm_ds.data.tool_calls import KINDS
from hafrm_ds.errors import DataError

TOKENIZATION_VERSION = 4
"""Part of the cache key of tokenised data: raise it whenever what is kept of any pair changes."""

Truncation = Literal["drop", "keep_prompt_end", "cut_response"]

# Why a selected pair is dropped. All of these count against data.max_dropped_share.
EMPTY_PROMPT = "empty prompt"
EMPTY_ANSWER = "empty answer"
IDENTICAL_ANSWERS = "identical answers"
IDENTICAL_AFTER_CUT = "identical after the cut"
TOO_LONG = "longer than max_length"
REFUSED = "the template refuses the conversation"
NOT_WRITTEN = "does not write"
LEFT_OUT = "the template leaves out what differs"
LONGEST_REASON = 120


@dataclass(frozen=True)
class TokenizedPair:
    """One pair as ids, lists or int32 arrays. The conversations are prompt_ids and then chosen_ids or rejected_ids.

    The prompt has at least one token, which predicts the first token of each response; each response has at least one.
    """

    prompt_ids: Sequence[int]
    chosen_ids: Sequence[int]
    rejected_ids: Sequence[int]
    margin: float | None
    source: str
    id: str

    @property
    def group(self) -> "PromptWithResponses":
        """Its ids alone: the prompt with the chosen and the rejected response."""
        return PromptWithResponses(self.prompt_ids, (self.chosen_ids, self.rejected_ids))

    @property
    def read_outs(self) -> tuple[int, int]:
        """Where the reward is read: index of the last token of the chosen and of the rejected conversation."""
        return len(self.prompt_ids) + len(self.chosen_ids) - 1, len(self.prompt_ids) + len(self.rejected_ids) - 1


class Pairs(Protocol):
    """Whatever gives tokenised pairs by position: a list, or `PreparedPairs`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> TokenizedPair: ...


class PromptWithResponses(NamedTuple):
    """Token ids of a group: one prompt and its responses, two for a preference pair (chosen, rejected), any number
    elsewhere."""

    prompt: Sequence[int]
    responses: tuple[Sequence[int], ...]

    @property
    def longest_conversation(self) -> int:
        """Tokens of the prompt with the longest of the responses."""
        return len(self.prompt) + max(map(len, self.responses))


class Tokenization(NamedTuple):
    """What became of one pair."""

    ids: PromptWithResponses
    """Prompt, chosen and rejected; all empty when the pair is dropped."""
    outcome: str
    """"" for a usable pair, else why it is dropped."""
    cut: bool
    """Whether a usable pair was truncated: tokens of its prompt (keep_prompt_end) or its responses (cut_response)."""
    uncut_length: int
    """Tokens of the longer conversation before any truncation; 0 for pairs dropped before they had ids."""
    rendered_prompt: Sequence[int]
    """Ids of the prompt rendered alone, before any truncation; empty when the pair is dropped."""
    left_out: tuple[str, ...] = ()
    """What of a usable pair the template does not write, in words."""
    marks: tuple[str, ...] = ()
    """Special tokens and marks of templates that stand in the texts of a usable pair."""


class RenderedPair(NamedTuple):
    """A pair that the template has written as text.

    texts: the chosen and the rejected conversation, and the prompt alone.
    """

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    texts: tuple[str, str, str]


def tokenize_pairs(
    formatter: ChatFormatter,
    pairs: Iterable[tuple[list[Message], list[Message], list[Message]]],
    max_length: int,
    truncation: Truncation,
) -> list[Tokenization]:
    """(prompt, chosen, rejected) of each pair -> ids that fit max_length, or the reason why the pair is dropped."""
    rendered = [render_pair(formatter, *pair) for pair in pairs]
    texts = [text for pair in rendered if isinstance(pair, RenderedPair) for text in pair.texts]
    ids = iter(formatter.encode_rendered(texts))
    return [
        settle_pair(formatter, pair, [next(ids) for _ in pair.texts], max_length, truncation)
        if isinstance(pair, RenderedPair)
        else pair
        for pair in rendered
    ]


def render_pair(
    formatter: ChatFormatter, prompt: list[Message], chosen: list[Message], rejected: list[Message]
) -> RenderedPair | Tokenization:
    """Let the template write a pair; returns the texts, or the reason why the pair is dropped."""
    if not prompt:
        return dropped(EMPTY_PROMPT)
    if is_blank(formatter.spoken(chosen)) or is_blank(formatter.spoken(rejected)):
        return dropped(EMPTY_ANSWER)
    if chosen == rejected:
        return dropped(IDENTICAL_ANSWERS)
    try:
        conversations = (formatter.render(prompt + chosen), formatter.render(prompt + rejected))
        texts = (*conversations, formatter.render_prompt(prompt))
    except jinja2.TemplateError as error:
        return dropped(refusal_of(error))
    pair = RenderedPair(prompt, chosen, rejected, texts)
    if "tools" in prompt[0] and (lost := {*left_out_of(formatter, pair)}.intersection(KINDS)):
        return dropped(f"has {', '.join(sorted(lost, reverse=True))}, which {formatter.template_name} {NOT_WRITTEN}")
    return pair


def settle_pair(
    formatter: ChatFormatter, pair: RenderedPair, encoded: Sequence[list[int]], max_length: int, truncation: Truncation
) -> Tokenization:
    """A pair as ids that fit max_length, or the reason why it is dropped.

    Args:
        encoded: the ids of its texts.
    """
    prompt, chosen, rejected, _ = pair
    ids, rendered_prompt = split_at_prompt(*encoded), encoded[-1]
    length = ids.longest_conversation
    chosen_ids, rejected_ids = ids.responses
    if chosen_ids == rejected_ids:  # the template may strip, normalise or leave out what made the texts differ
        is_left_out = [each["content"].split() for each in chosen] != [each["content"].split() for each in rejected]
        return dropped(LEFT_OUT if is_left_out else IDENTICAL_ANSWERS, length)
    if not ids.prompt:
        return dropped(EMPTY_PROMPT, length)
    if not chosen_ids or not rejected_ids:
        return dropped(EMPTY_ANSWER, length)

    fitted = fit(ids, max_length, truncation, bos_token_id=formatter.tokenizer.bos_token_id)
    if fitted is None:
        return dropped(TOO_LONG, length)
    if fitted.responses[0] == fitted.responses[1]:
        return dropped(IDENTICAL_AFTER_CUT, length)
    left_out = left_out_of(formatter, pair)
    marks = tuple(marks_in([*prompt, *chosen, *rejected], formatter.marks))
    return Tokenization(fitted, "", fitted != ids, length, rendered_prompt, left_out, marks)


def left_out_of(formatter: ChatFormatter, pair: RenderedPair) -> tuple[str, ...]:
    """What the template has left out of either conversation of a pair, each once."""
    written = zip((pair.chosen, pair.rejected), pair.texts)
    return tuple(
        dict.fromkeys(kind for answer, text in written for kind in formatter.left_out(pair.prompt + answer, text))
    )


def refusal_of(error: jinja2.TemplateError) -> str:
    """Why a template refuses a conversation, in its own words as far as they are few."""
    words = " ".join(str(error).split())
    return f"{REFUSED}: {words[:LONGEST_REASON]}{'...' if len(words) > LONGEST_REASON else ''}"


def dropped(reason: str, uncut_length: int = 0) -> Tokenization:
    return Tokenization(
        PromptWithResponses([], ([], [])), reason, cut=False, uncut_length=uncut_length, rendered_prompt=[]
    )


NOT_TOKENIZED = dropped("")
"""For a row that is not selected, or was dropped before."""


def is_blank(messages: list[Message]) -> bool:
    return not any(message["content"].strip() or "tool_calls" in message for message in messages)


def split_at_prompt(chosen: list[int], rejected: list[int], rendered_prompt: list[int]) -> PromptWithResponses:
    """Ids of both conversations and of the prompt rendered alone -> the shared prompt and the two responses."""
    end = common_prefix_length(chosen, rejected, rendered_prompt)
    return PromptWithResponses(chosen[:end], (chosen[end:], rejected[end:]))


def common_prefix_length(*sequences: Sequence[int]) -> int:
    shortest = min(len(sequence) for sequence in sequences)
    for index, tokens in enumerate(zip(*sequences)):  # stops at the shortest sequence
        if len(set(tokens)) > 1:
            return index
    return shortest


def tokenize_conversation(formatter: ChatFormatter, messages: list[Message]) -> PromptWithResponses:
    """One conversation -> ids of a group with one response, split where its last message begins.

    The split is that of `tokenize_pairs`: the common prefix of the whole rendering and of the prompt rendered alone, so
    a token merged over the boundary belongs to the response. Prompt + response is always the whole rendering; each has
    at least one token.

    Raises:
        DataError: there is no message, the template refuses them or leaves out a part of them, or it renders them as
            fewer than two tokens.
    """
    if not messages:
        raise DataError("the conversation has no message")
    try:
        text = formatter.render(messages)
        (ids,) = formatter.encode_rendered([text])
        rendered_prompt = formatter.encode_prompt(messages[:-1]) if len(messages) > 1 else []
    except jinja2.TemplateError as error:
        raise DataError(refusal_of(error)) from error
    if is_serious(left_out := formatter.left_out(messages, text)):
        remedy = "; the option reasoning, set to drop, takes it out on purpose" if ANSWER_REASONING in left_out else ""
        raise DataError(
            f"{formatter.template_name} leaves out {', '.join(left_out)}: the model would not see the whole "
            f"conversation{remedy}"
        )
    if len(ids) < 2:
        raise DataError(f"the conversation is rendered as {len(ids)} tokens; there must be two at least")
    end = min(max(common_prefix_length(ids, rendered_prompt), 1), len(ids) - 1)
    return PromptWithResponses(ids[:end], (ids[end:],))


def fit(
    ids: PromptWithResponses, max_length: int, truncation: Truncation, bos_token_id: int | None
) -> PromptWithResponses | None:
    """Truncate a pair so that both conversations have at most max_length tokens; None when the policy cannot do that.

    keep_prompt_end leaves the responses whole and truncates the start of the prompt to what the longer response
    leaves (`truncate_prompt`). cut_response leaves the prompt whole and
    truncates the end of each response that does not fit beside it; at least one token of each must stay.
    """
    if ids.longest_conversation <= max_length:
        return ids
    if truncation == "keep_prompt_end":
        prompt = truncate_prompt(ids.prompt, ids.longest_conversation - max_length, bos_token_id)
        return None if prompt is None else ids._replace(prompt=prompt)
    if truncation == "cut_response":
        room = max_length - len(ids.prompt)
        return ids._replace(responses=tuple(each[:room] for each in ids.responses)) if room >= 1 else None
    return None


def truncate_prompt(prompt: Sequence[int], excess: int, bos_token_id: int | None) -> list[int] | None:
    """A prompt without `excess` tokens of its start. A leading BOS stays, and so must at least one token after it: None
    where there is none."""
    bos = prompt[:1] if prompt[0] == bos_token_id else prompt[:0]
    rest = prompt[len(bos) + excess :]
    return [*bos, *rest] if len(rest) else None
