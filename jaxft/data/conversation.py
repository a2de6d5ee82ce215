"""Messages -> text by a chat template, in the sandbox and on one fixed day: for training, previews, prompts and evaluations."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from jaxft.data.sandbox import Sandbox, TemplateFault
from jaxft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Llama 3.2's template inserts today's date where it is given none; the text of a row must not depend on the day.
DAY = datetime.date(2024, 7, 26)
DATE = DAY.strftime("%d %b %Y")
CLOCK = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
OPEN_END = "\ue002it goes on\ue003 "  # as transformers marks it, with a space that a template may trim
SANDBOX = Sandbox()


def is_jinja(template: str) -> bool:
    """Whether it is a template's text, and not a name."""
    return "{{" in template or "{%" in template


def render(
    messages: Sequence[Mapping[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    *,
    origin: str,
    generate: bool,
    remedy: str,
) -> str:
    """What transformers would make of messages with `role` and `content`: by the tokenizer's own template for chat, else by
    the one given; with `generate`, up to where an answer begins. Raises UserError, which ends with `remedy`.
    """
    named = {"date_string": DATE, "add_generation_prompt": generate, "tools": None, "documents": None}
    try:
        if not messages:
            raise TemplateFault("nobody says anything")
        text = _source(tokenizer, template, remedy)
        return SANDBOX.render(text, {**tokenizer.special_tokens_map, **named, "messages": messages})
    except TemplateFault as error:
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(f"{origin}: the chat template refuses turns {roles} ({error}); {remedy}") from error


def _source(tokenizer: PreTrainedTokenizerBase, template: str, remedy: str) -> str:
    """The Jinja text, with the clock that some templates read stopped at DAY. Raises UserError where there is none."""
    text = template if is_jinja(template) else tokenizer.chat_template
    if isinstance(text, dict):  # of several by name, what transformers chooses
        text = text.get("default")
    if not isinstance(text, str):
        raise UserError(f"data.template: chat, but the tokenizer has no one chat template; {remedy}")
    return CLOCK.sub(lambda asked: repr(DAY.strftime(asked[2])), text)


def prompt(
    messages: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase, *, goes_on: bool = False, remedy: str
) -> str:
    """What an answer follows, by the tokenizer's own template; with `goes_on` it goes on from the last message, which then
    has no end. Raises UserError, which ends with `remedy`.
    """
    options = {"origin": "prompt", "generate": not goes_on, "remedy": remedy}
    if not goes_on:
        return render(messages, tokenizer, "chat", **options)
    *before, last = messages
    marked = [*before, {**last, "content": last["content"] + OPEN_END}]
    text, end, after = render(marked, tokenizer, "chat", **options).rpartition(OPEN_END.strip())
    if not end:
        raise UserError(f"prompt: the chat template drops the message that the answer goes on from; {remedy}")
    return text if after.startswith(" ") else text.rstrip()  # what trims messages would have trimmed this one
