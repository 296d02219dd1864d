"""From one group of answers to token ids: where the prompt ends, what is truncated and what is dropped.

All its whole conversations are rendered and encoded at once. The prompt is their longest common token prefix, at most
the rendered prompt; everything after it is response. So a token that BPE merges over the boundary belongs to the
response, and prompt + response is always exactly what the model sees when it scores the conversation.

An answer that cannot be used is left out with the comparisons that it stands in. A group without any comparison left is
dropped, as a pair is with either of its answers.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import jinja2

from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.pairs import Comparison, Message
from hafrm_ds.data.rendering_check import ANSWER_REASONING, is_serious, marks_in
from hafrm_ds.data.tool_calls import KINDS
from hafrm_ds.errors import DataError

TOKENIZATION_VERSION = 5
"""Part of the cache key of tokenised data: raise it whenever what is kept of any group changes."""

Truncation = Literal["drop", "keep_prompt_end", "cut_response"]

# Why a selected group is dropped, or an answer of it. All of these count against data.max_dropped_share.
EMPTY_PROMPT = "empty prompt"
EMPTY_ANSWER = "empty answer"
IDENTICAL_ANSWERS = "identical answers"
IDENTICAL_AFTER_CUT = "identical after the cut"
TOO_LONG = "longer than max_length"
REFUSED = "the template refuses the conversation"
NOT_WRITTEN = "does not write"
UNCOMPARED = "is compared with no other answer that is used"
LEFT_OUT = "the template leaves out what differs"
LONGEST_REASON = 120


@dataclass(frozen=True)
class TokenizedGroup:
    """One group as ids, lists or int32 arrays. The conversations are prompt_ids and then one of the responses.

    The prompt has at least one token, which predicts the first token of each response; each response has at least one.
    """

    prompt_ids: Sequence[int]
    responses: tuple[Sequence[int], ...]
    comparisons: tuple[Comparison, ...]
    source: str
    id: str
    share: float = 1.0
    """How much of its group's comparisons it has, for a part of a group that is too long for a micro-batch."""
    trains_reward: bool = True
    """Whether it trains the reward loss; else it trains that of the policy alone."""

    @property
    def ids(self) -> "PromptWithResponses":
        """Its ids alone."""
        return PromptWithResponses(self.prompt_ids, self.responses)

    @property
    def read_outs(self) -> tuple[int, ...]:
        """Where the reward is read: index of the last token of each conversation."""
        return tuple(len(self.prompt_ids) + len(response) - 1 for response in self.responses)


class Groups(Protocol):
    """Whatever gives tokenised groups by position: a list, or `PreparedGroups`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> TokenizedGroup: ...


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
    """What became of one group."""

    ids: PromptWithResponses
    """Prompt and the responses that are used; all empty when the group is dropped."""
    comparisons: tuple[Comparison, ...]
    """Those of the responses that are used."""
    outcome: str
    """"" for a usable group, else why it is dropped."""
    cut: bool
    """Whether a usable group was truncated: tokens of its prompt (keep_prompt_end) or its responses (cut_response)."""
    uncut_length: int
    """Tokens of the longest conversation before any truncation; 0 for groups dropped before they had ids."""
    rendered_prompt: Sequence[int]
    """Ids of the prompt rendered alone, before any truncation; empty when the group is dropped."""
    left_out: tuple[str, ...] = ()
    """What of a usable group the template does not write, in words."""
    marks: tuple[str, ...] = ()
    """Special tokens and marks of templates that stand in the texts of a usable group."""
    lost: tuple[str, ...] = ()
    """Why an answer or comparison of a usable group is left out, for each."""
    places: tuple[int, ...] = ()
    """Positions of the responses that are used among the answers of the group."""


class Draft:
    """A group on its way to ids, from which answers and comparisons go that cannot be used.

    Attributes:
        places: positions of the answers that are left, ascending. comparisons: those that are left, by these positions.
        lost: why, for each answer or comparison that is gone; the last of them says why a group without comparisons is
        dropped.
    """

    def __init__(self, prompt: list[Message], answers: Sequence[list[Message]], comparisons: Iterable[Comparison]):
        self.prompt, self.answers = prompt, answers
        self.places = list(range(len(answers)))
        self.comparisons = list(comparisons)
        self.lost: list[str] = []

    def lose_answer(self, place: int, reason: str) -> None:
        self.places.remove(place)
        self.comparisons = [each for each in self.comparisons if place not in (each.better, each.worse)]
        self.lost.append(reason)

    def lose_equals(self, texts: Mapping[int, Any], reason: Callable[[Comparison], str]) -> None:
        """Without the comparisons of two answers that are equal in `texts`: their position -> what is compared."""
        for each in [each for each in self.comparisons if texts[each.better] == texts[each.worse]]:
            self.comparisons.remove(each)
            self.lost.append(reason(each))

    def lose_uncompared(self) -> None:
        """Without the answers that stand in no comparison any more."""
        compared = {place for each in self.comparisons for place in (each.better, each.worse)}
        for place in [place for place in self.places if place not in compared]:
            self.lose_answer(place, UNCOMPARED)

    def dropped(self, uncut_length: int = 0) -> Tokenization:
        return dropped(self.lost[-1], uncut_length)


class RenderedGroup(NamedTuple):
    """A group that the template has written as text: the conversations, by the positions of their answers, and the
    prompt alone."""

    draft: Draft
    conversations: dict[int, str]
    prompt: str

    @property
    def texts(self) -> list[str]:
        return [*self.conversations.values(), self.prompt]


def tokenize_groups(
    formatter: ChatFormatter,
    groups: Iterable[tuple[list[Message], Sequence[list[Message]], Sequence[Comparison]]],
    max_length: int,
    truncation: Truncation,
) -> list[Tokenization]:
    """(prompt, answers, comparisons) of each group -> ids that fit max_length, or the reason why it is dropped."""
    rendered = [render_group(formatter, Draft(*group)) for group in groups]
    texts = [text for group in rendered if isinstance(group, RenderedGroup) for text in group.texts]
    ids = iter(formatter.encode_rendered(texts))
    return [
        settle_group(formatter, group, [next(ids) for _ in group.texts], max_length, truncation)
        if isinstance(group, RenderedGroup)
        else group
        for group in rendered
    ]


def render_group(formatter: ChatFormatter, draft: Draft) -> RenderedGroup | Tokenization:
    """Let the template write a group; returns the texts, or the reason why the group is dropped."""
    prompt, answers = draft.prompt, draft.answers
    if not prompt:
        return dropped(EMPTY_PROMPT)
    for place in [place for place, answer in enumerate(answers) if is_blank(formatter.spoken(answer))]:
        draft.lose_answer(place, EMPTY_ANSWER)
    draft.lose_equals(dict(enumerate(answers)), lambda each: IDENTICAL_ANSWERS)
    if not draft.comparisons:
        return draft.dropped()
    texts = {}
    for place in list(draft.places):
        try:
            texts[place] = formatter.render(prompt + answers[place])
        except jinja2.TemplateError as error:
            draft.lose_answer(place, refusal_of(error))
    if not draft.comparisons:
        return draft.dropped()
    try:
        group = RenderedGroup(draft, texts, formatter.render_prompt(prompt))
    except jinja2.TemplateError as error:
        return dropped(refusal_of(error))
    if "tools" in prompt[0] and (lost := {*left_out_of(formatter, group)}.intersection(KINDS)):
        return dropped(f"has {', '.join(sorted(lost, reverse=True))}, which {formatter.template_name} {NOT_WRITTEN}")
    return group


def settle_group(
    formatter: ChatFormatter,
    group: RenderedGroup,
    encoded: Sequence[list[int]],
    max_length: int,
    truncation: Truncation,
) -> Tokenization:
    """A group as ids that fit max_length, or the reason why it is dropped.

    Args:
        encoded: the ids of its texts.
    """
    draft, rendered_prompt = group.draft, encoded[-1]
    conversations = dict(zip(group.conversations, encoded))
    length = max(map(len, conversations.values()))

    def reason_of_equals(each: Comparison) -> str:  # the template may strip, normalise or leave out what differed
        words = [[part["content"].split() for part in draft.answers[place]] for place in (each.better, each.worse)]
        return LEFT_OUT if words[0] != words[1] else IDENTICAL_ANSWERS

    draft.lose_equals(conversations, reason_of_equals)
    fitted = None
    while fitted is None:
        if not draft.comparisons:
            return draft.dropped(length)
        draft.lose_uncompared()
        ids = split_at_prompt([conversations[place] for place in draft.places], rendered_prompt)
        by_length = sorted(zip(map(len, ids.responses), draft.places))
        if not ids.prompt:
            return dropped(EMPTY_PROMPT, length)
        if by_length[0][0] == 0:
            draft.lose_answer(by_length[0][1], EMPTY_ANSWER)
            continue
        fitted = fit(ids, max_length, truncation, bos_token_id=formatter.tokenizer.bos_token_id)
        if fitted is None:
            draft.lose_answer(by_length[-1][1], TOO_LONG)
    responses = dict(zip(draft.places, fitted.responses))
    draft.lose_equals(responses, lambda each: IDENTICAL_AFTER_CUT)
    if not draft.comparisons:
        return draft.dropped(length)
    draft.lose_uncompared()
    places = {place: number for number, place in enumerate(draft.places)}
    kept = [message for place in places for message in draft.answers[place]]
    return Tokenization(
        PromptWithResponses(fitted.prompt, tuple(responses[place] for place in places)),
        tuple(each.among(places) for each in draft.comparisons),
        "",
        fitted != ids,
        length,
        rendered_prompt,
        left_out_of(formatter, group),
        tuple(marks_in([*draft.prompt, *kept], formatter.marks)),
        tuple(draft.lost),
        tuple(places),
    )


def left_out_of(formatter: ChatFormatter, group: RenderedGroup) -> tuple[str, ...]:
    """What the template has left out of any conversation of a group, each once."""
    prompt, answers = group.draft.prompt, group.draft.answers
    written = ((prompt + answers[place], text) for place, text in group.conversations.items())
    return tuple(dict.fromkeys(kind for messages, text in written for kind in formatter.left_out(messages, text)))


def refusal_of(error: jinja2.TemplateError) -> str:
    """Why a template refuses a conversation, in its own words as far as they are few."""
    words = " ".join(str(error).split())
    return f"{REFUSED}: {words[:LONGEST_REASON]}{'...' if len(words) > LONGEST_REASON else ''}"


def dropped(reason: str, uncut_length: int = 0) -> Tokenization:
    nothing = PromptWithResponses([], ())
    return Tokenization(nothing, (), reason, cut=False, uncut_length=uncut_length, rendered_prompt=[])


NOT_TOKENIZED = dropped("")
"""For a row that is not selected, or was dropped before."""


def is_blank(messages: list[Message]) -> bool:
    return not any(message["content"].strip() or "tool_calls" in message for message in messages)


def split_at_prompt(conversations: Sequence[list[int]], rendered_prompt: list[int]) -> PromptWithResponses:
    """Ids of conversations and of the prompt rendered alone -> the shared prompt and the responses."""
    end = common_prefix_length(*conversations, rendered_prompt)
    return PromptWithResponses(conversations[0][:end], tuple(ids[end:] for ids in conversations))


def common_prefix_length(*sequences: Sequence[Hashable]) -> int:
    """How many items, tokens or characters, all sequences begin with alike."""
    shortest = min(len(sequence) for sequence in sequences)
    for index, tokens in enumerate(zip(*sequences)):  # stops at the shortest sequence
        if len(set(tokens)) > 1:
            return index
    return shortest


def tokenize_conversation(formatter: ChatFormatter, messages: list[Message]) -> PromptWithResponses:
    """One conversation -> ids of a group with one response, split where its last message begins.

    The split is that of `tokenize_groups`: the common prefix of the whole rendering and of the prompt rendered alone,
    so a token merged over the boundary belongs to the response. Prompt + response is always the whole rendering; each
    has at least one token.

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
    """Truncate a group so that all conversations have at most max_length tokens; None when the policy cannot do that.

    keep_prompt_end leaves the responses whole and truncates the start of the prompt to what the longest response
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
