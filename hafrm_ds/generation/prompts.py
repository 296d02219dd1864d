"""A prompt becomes the token ids that a policy continues, or a reason why it cannot be asked."""

import jinja2

from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.pairs import Message
from hafrm_ds.data.rendering_check import is_serious

# Why a prompt cannot be asked.
TOO_LONG = "longer than the policy takes with max_new_tokens"
REFUSED = "the policy's template refuses it"
LEFT_OUT = "the policy's template leaves out a part of it"


def encode_prompt(formatter: ChatFormatter, prompt: list[Message], longest: float) -> list[int] | str:
    """Ids of a prompt of at most `longest` tokens, or why it cannot be asked."""
    try:
        text = formatter.render_prompt(prompt)
    except jinja2.TemplateError:
        return REFUSED
    if is_serious(formatter.left_out(prompt, text)):
        return LEFT_OUT
    [ids] = formatter.encode_rendered([text])
    return TOO_LONG if len(ids) > longest else ids
