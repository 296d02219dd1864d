"""Conversations that come as one text, written by the chat template of the reward model, as trainers send them.

A policy's text often lacks what belongs to a whole rendering: the BOS, which some clients take off, and the template's
end of an answer, of which a policy writes a part or, if it was stopped, nothing. Both are put right, so that the text
is scored exactly as the messages that it was made from.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from hafrm_ds.data.formatting import PROBE, ChatFormatter
from hafrm_ds.data.pairs import Row, assistant
from hafrm_ds.data.tokenization import PromptWithResponses, common_prefix_length
from hafrm_ds.errors import DataError
from hafrm_ds.saved.scorer import Conversation, Scorer, check_fits

ANSWER = "An answer, 7c1f09."
TOKENS_OF_A_CHARACTER = 8
"""More than the bytes of any: what is no text after as many never will be."""


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation. prompt: how it begins, up to the answer; "" if that is not known."""

    text: str
    prompt: str


Item = Conversation | Rendered
"""What a request asks about."""


@dataclass(frozen=True)
class Template:
    """What every rendering by a chat template has.

    bos: the text that it begins with, "" if there is none. opening: what stands between a question and its answer.
    ending: what stands behind the answer.
    """

    name: str
    bos: str
    opening: str
    ending: str

    @classmethod
    def of(cls, formatter: ChatFormatter) -> "Template":
        question = PROBE[:1]
        text = formatter.render([*question, assistant(ANSWER)])
        before, _, ending = text.rpartition(ANSWER)
        # Templates of reasoning models open an answer that is given otherwise than one that is to be written.
        start = before.rindex(question[0]["content"]) + 1 if question[0]["content"] in before else len(before)
        shared = os.path.commonprefix([before, formatter.render_prompt(question)])  # noqa: RUF071  # of any texts
        opening = shared[start:]
        bos = str(formatter.tokenizer.bos_token) if formatter.bos != "none" else ""
        return cls(formatter.template_name, bos, opening.strip(), ending)

    def whole(self, text: str) -> str:
        """A rendering with its BOS and its end.

        Raises:
            DataError: another template has written it, or none.
        """
        if self.opening not in text:
            raise DataError(
                f"the text lacks {self.opening!r}, so {self.name} has not rendered it; send messages (in `label`, or "
                "to /score), or start the server with --prompts text if your prompts are the words of a user"
            )
        text = text if text.startswith(self.bos) else self.bos + text
        end = self.ending if text.endswith(self.ending) else self.ending.rstrip()
        return text.removesuffix(end) + self.ending


def encode(scorer: Scorer, template: Template, item: Rendered) -> PromptWithResponses:
    """A rendered conversation -> token ids. Raises DataError as `Scorer.encode` and `Template.whole` do, and of a text
    that no tokenizer takes, as it holds half of a surrogate pair."""
    text = template.whole(Row({}, "the request", "").as_text(item.text, "the text", expected="a text"))
    prompt = item.prompt if item.prompt.startswith(template.bos) else template.bos + item.prompt
    ids, prompt_ids = scorer.formatter.encode_rendered([text, prompt])
    if len(ids) < 2:
        raise DataError(f"the text has {len(ids)} tokens; there must be two at least")
    end = min(max(common_prefix_length(ids, prompt_ids), 1), len(ids) - 1)
    group = PromptWithResponses(ids[:end], (ids[end:],))
    return check_fits(scorer.sizes, scorer.formatter, group, scorer.max_tokens)


# ---- back to texts ---------------------------------------------------------------------------------------------------


def pieces(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; joined it is the text. A token that ends within a character adds nothing, and
    the one that completes the character all of it.

    Args:
        before: ids that stand in front; some tokenizers write a first token otherwise than a later one.
    """

    def decode(first: int, end: int) -> str:
        return tokenizer.decode(tokens[first:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    tokens = [*map(int, before[-TOKENS_OF_A_CHARACTER:]), *ids]
    known = len(tokens) - len(ids)  # so many tokens are told
    start, found = 0, []
    for end in range(known + 1, len(tokens) + 1):
        text = decode(start, end)
        is_open = text.endswith("\ufffd") and end < min(len(tokens), known + TOKENS_OF_A_CHARACTER)
        found.append("" if is_open else text[len(decode(start, known)) :])
        if not is_open:
            start, known = known, end
    return found
