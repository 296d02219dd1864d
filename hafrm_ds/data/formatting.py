"""The chat formatter: from messages to token ids, in one way everywhere.

Training, the reference pass, evaluation, scoring and export share one `ChatFormatter`. Its tokenizer carries the
template in effect and is saved with the model, so that outside this package
`tokenizer.apply_chat_template(messages, tokenize=True)` gives exactly the ids that were trained on.
"""

import copy
import hashlib
import json
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import jinja2
from transformers import PreTrainedTokenizerBase

from hafrm_ds.data.pairs import Message
from hafrm_ds.data.rendering_check import END_OF_REASONING, marks_pattern, unwritten
from hafrm_ds.data.tool_calls import RESULTS, template_input
from hafrm_ds.errors import ConfigError, ModelError

NAMED_TEMPLATES = {
    # The usual ChatML, without a default system line.
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    # Instruct: {question}\nOutput: {answer}<eos>. The prompt ends before the space, which BPE merges into the answer.
    "phi-2": (
        "{% for message in messages %}"
        "{% if message['role'] == 'assistant' %}"
        "{{ 'Output: ' + message['content'] }}{{ eos_token }}{{ '' if loop.last else '\\n' }}"
        "{% elif message['role'] == 'user' %}{{ 'Instruct: ' + message['content'] + '\\n' }}"
        "{% else %}{{ message['content'] + '\\n' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Output:' }}{% endif %}"
    ),
    # <s>[INST] {question} [/INST]{answer}</s>. A system message stands in front of the user message after it.
    "mistral-instruct": (
        "{{ bos_token }}{% set state = namespace(system='') %}"
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}{% set state.system = message['content'] + '\\n\\n' %}"
        "{% elif message['role'] == 'user' %}"
        "{{ '[INST] ' + state.system + message['content'] + ' [/INST]' }}{% set state.system = '' %}"
        "{% else %}{{ message['content'] }}{{ eos_token }}{% endif %}"
        "{% endfor %}"
    ),
    # The texts as they are, for data that brings its own markup; eos ends the answer if the tokenizer has one.
    "text": (
        "{% for message in messages %}{{ message['content'] }}"
        "{% if loop.last and message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    ),
}

NOTHING = re.compile(r"(?!)")
TOOL_ROLE = re.compile(r"""["']tool["']""")
PROBE = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]

DATE_CALL = re.compile(r"""strftime_now\(\s*(?P<quote>["'])(?P<format>[^"']*)(?P=quote)\s*\)""")

# The newline after the comment is swallowed by jinja (trim_blocks, as transformers sets it) and lets the template's
# first tag stand at the start of a line, where it stood before.
BOS_IN_FRONT = "{{ bos_token }}{# the tokenizer's own BOS, which this template does not write #}\n"


# Stands in front of a template and takes the reasoning out of what it is given, so that every software that renders
# with the tokenizer leaves it out as the training did.
WITHOUT_REASONING = (
    "{# without reasoning: what stands before </think> is no part of an answer #}"
    "{%- set spoken = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' and message['content'] is string -%}"
    "{%- if '</think>' in message['content'] -%}"
    "{%- set message = dict(message, content=message['content'].split('</think>')[-1].lstrip()) -%}"
    "{%- endif -%}"
    "{%- if message['reasoning_content'] is defined -%}"
    "{%- set message = dict(message, reasoning_content='') -%}"
    "{%- endif -%}"
    "{%- endif -%}"
    "{%- set spoken.messages = spoken.messages + [message] -%}"
    "{%- endfor -%}"
    "{%- set messages = spoken.messages -%}"
    # The newline after the comment is swallowed, as behind BOS_IN_FRONT.
    "{# end #}\n"
)


@dataclass(frozen=True)
class ChatFormatter:
    """Renders and encodes conversations under one fixed template. Build it with `create`.

    `render` and everything built on it raise jinja2.TemplateError for a conversation that the template refuses,
    for example one with a system message under a template that knows none, or that it fails on.
    """

    tokenizer: PreTrainedTokenizerBase
    """A copy of the given tokenizer whose chat_template is the template in effect."""
    template_origin: str
    """Where the template comes from: "tokenizer", a name of NAMED_TEMPLATES or a file."""
    bos: Literal["none", "template", "added"]
    """Who writes the leading BOS: nobody, the template itself, or the template after `create` put a BOS in front."""
    frozen_dates: tuple[str, ...]
    """What each call of strftime_now in the template was replaced with."""
    fingerprint: str
    """Hash of all that decides the ids: template text, vocabulary and tokenisation rules, special tokens."""

    marks: re.Pattern
    """Matches special tokens and marks of templates, which texts should not hold (`rendering_check`)."""

    @classmethod
    def create(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None,
        template_date: str,
        reasoning: str | None = None,
    ) -> "ChatFormatter":
        """Settle the template.

        Args:
            tokenizer: any tokenizer; it is copied, not changed. Its padding side and pad token do not matter.
            chat_template: a name of NAMED_TEMPLATES, a .jinja file, or None for the tokenizer's own template.
            template_date: the day (YYYY-MM-DD) that templates which print today's date are frozen to.
            reasoning: "drop" takes what stands before </think> out of all answers before they are rendered.

        Raises:
            ModelError: no usable template.
            ConfigError: template_date is no day.
        """
        template, origin = choose_template(tokenizer, chat_template)
        template, frozen_dates = freeze_dates(template, template_date)
        if reasoning == "drop" and WITHOUT_REASONING not in template:
            template = WITHOUT_REASONING + template
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = template
        bos: Literal["none", "template", "added"] = "none"
        if renders_bos(tokenizer):
            bos = "template"
        elif adds_bos(tokenizer):
            tokenizer.chat_template = BOS_IN_FRONT + template
            bos = "added"
        marks = NOTHING if origin == "text" else marks_pattern(tokenizer)  # its data brings markup of its own
        return cls(tokenizer, origin, bos, frozen_dates, tokenization_fingerprint(tokenizer), marks)

    @property
    def template(self) -> str:
        return self.tokenizer.chat_template

    def render(self, messages: list[Message], *, add_generation_prompt: bool = False) -> str:
        """Messages -> the text that is encoded, BOS and end marks included."""
        return apply_template(self.tokenizer, messages, add_generation_prompt=add_generation_prompt)

    def spoken(self, messages: list[Message]) -> list[Message]:
        """The messages without what the template takes out because it was asked to."""
        if WITHOUT_REASONING not in self.template:
            return messages
        return [
            message | {"content": message["content"].split(END_OF_REASONING)[-1].lstrip()}
            if message["role"] == "assistant"
            else message
            for message in messages
        ]

    def left_out(self, messages: list[Message], text: str) -> list[str]:
        """Name in words what the template has left out of the messages, though nobody asked it to. Results of tools
        count as left out where the template does not know the role `tool`."""
        found = unwritten(self.spoken(messages), text)
        if "tools" in messages[0] and RESULTS not in found and not TOOL_ROLE.search(self.template):
            found += [RESULTS] * any(message["role"] == "tool" for message in messages)
        return found

    @property
    def template_name(self) -> str:
        """For messages."""
        own = self.template_origin == "tokenizer"
        return "the tokenizer's own chat template" if own else f"the chat template {self.template_origin}"

    def encode(self, messages: list[Message]) -> list[int]:
        """Ids of a whole conversation, rendered at once. The reward is read at the last of them."""
        return self.encode_rendered([self.render(messages)])[0]

    def encode_prompt(self, messages: list[Message]) -> list[int]:
        """Ids of a prompt with the template's opening of an answer, where generation starts."""
        return self.encode_rendered([self.render_prompt(messages)])[0]

    def render_prompt(self, messages: list[Message]) -> str:
        return self.render(messages, add_generation_prompt=True)

    def encode_rendered(self, texts: list[str]) -> list[list[int]]:
        """Rendered texts -> their ids; many at once take a quarter less time than one by one."""
        return encode_rendered(self.tokenizer, texts)


def apply_template(tokenizer: PreTrainedTokenizerBase, messages: list[Message], **options: Any) -> str:
    """Raises jinja2.TemplateError, of whatever type the template's own error is."""
    if messages and "tools" in messages[0]:
        messages, tools = template_input(messages)
        options |= tools
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except jinja2.TemplateError:
        raise
    except Exception as error:
        raise jinja2.TemplateRuntimeError(f"{type(error).__name__}: {error}") from error


def encode_rendered(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Rendered texts -> ids of each. The template has written every special token, so the tokenizer adds none.

    verbose=False: a text longer than model_max_length is no news here, data.max_length rules.
    """
    if not texts:
        return []
    return tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )["input_ids"]


# ---- settling the template -----------------------------------------------------------------------------------------


def choose_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> tuple[str, str]:
    """-> (template text, its origin); raises ModelError naming the choices when there is none."""
    choices = f"--data.chat_template takes a name ({', '.join(NAMED_TEMPLATES)}) or a .jinja file"
    if chat_template in NAMED_TEMPLATES:
        return NAMED_TEMPLATES[chat_template], chat_template
    if chat_template is not None:
        try:
            return Path(chat_template).read_text(encoding="utf-8"), chat_template
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ModelError(f"the chat template {chat_template!r} cannot be read: {reason}; {choices}") from None
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    if not own:
        raise ModelError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template, so one must be named: {choices}"
        )
    return own, "tokenizer"


def freeze_dates(template: str, template_date: str) -> tuple[str, tuple[str, ...]]:
    """Replace each strftime_now("...") by that day in the same format -> (template, the dates written).

    A template that prints today's date would give another score tomorrow.
    """
    try:
        day = datetime.strptime(template_date, "%Y-%m-%d")
    except ValueError:
        raise ConfigError([f"data.template_date: {template_date!r} is no day of the form YYYY-MM-DD"]) from None
    dates: list[str] = []

    def freeze(call: re.Match) -> str:
        dates.append(day.strftime(call["format"]))
        return call["quote"] + dates[-1] + call["quote"]

    template = DATE_CALL.sub(freeze, template)
    if re.search(r"strftime_now\s*\(", template):
        raise ModelError(
            "the chat template prints today's date through a computed format, which cannot be frozen: write the date "
            "into a copy of the template and give that file as --data.chat_template"
        )
    return template, tuple(dates)


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer by default puts a BOS in front of a plain text."""
    return tokenizer.bos_token_id is not None and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]


def renders_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a conversation rendered by the tokenizer's template starts with BOS.

    Raises:
        ModelError: the template is no valid jinja, or it refuses even one question with one answer.
    """
    try:
        text = apply_template(tokenizer, PROBE)
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(f"the chat template is not valid jinja: line {error.lineno}: {error.message}") from None
    except jinja2.TemplateError as error:
        raise ModelError(f"the chat template refuses one user message with one answer: {error}") from None
    (ids,) = encode_rendered(tokenizer, [text])
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def tokenization_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 (hex) over what decides the ids of a rendered conversation, the same after saving and loading again."""
    if tokenizer.is_fast:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        # Set by each call, or only used with add_special_tokens=True.
        for part in ("truncation", "padding", "post_processor"):
            content.pop(part, None)
    else:
        content = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    everything = [tokenizer.chat_template, tokenizer.special_tokens_map, content]
    return hashlib.sha256(json.dumps(everything, sort_keys=True, default=str).encode()).hexdigest()
