"""Conversations in a receiver's own chat template.

The template is the operator's: its tokens mean what they mean to the model. What people say in it is text, and stays
text: it never goes through the template, only marks of its place do.
"""

import re
import secrets
from collections.abc import Sequence

from jinja2 import TemplateError

from latentwire.bridge.config import Chat, Role, Turn
from latentwire.bridge.errors import InvalidRequest, ModelUnavailable, first_line
from latentwire.bridge.reader import Reader, check_ids

Segment = int | str
"""A token of the template by its id, or text."""

_PLACE = secrets.token_hex(8)
TODAY = "01 Jan 2025"  # for templates that show a date: an input must not change overnight
CLOCK = f"{{% macro strftime_now(format) -%}}{TODAY}{{%- endmacro %}}"


def chat_of(lm: Reader, system: str | None) -> Chat:
    """The chat template among a model's files (ModelUnavailable where there is none)."""
    try:
        return Chat(lm.tokenizer.get_chat_template(), system)
    except ValueError:
        raise ModelUnavailable(
            f"{lm.name!r} has no chat template; expected one in its tokenizer's files, or a plain template"
        ) from None


def segments(lm: Reader, chat: Chat, turns: Sequence[Turn]) -> list[Segment]:
    """A conversation up to the assistant's next turn, as tokens and text (InvalidRequest: the template refuses it)."""
    parts = _rendered(lm, chat, [turn.role for turn in turns], prompting=True)
    made: list[Segment] = _split(lm, parts[0])
    for turn, markup in zip(turns, parts[1:], strict=True):
        for segment in [turn.text, *_split(lm, markup)]:
            if made and isinstance(segment, str) and isinstance(made[-1], str):
                made[-1] += segment
            elif segment != "":
                made.append(segment)
    return _swallowed(lm, made)


def closing_of(lm: Reader, chat: Chat) -> int | None:
    """The token that the template puts after a turn of the assistant, where it puts one."""
    behind = _split(lm, _rendered(lm, chat, ["user", "assistant"], prompting=False)[-1])
    return behind[0] if behind and isinstance(behind[0], int) else None


def _rendered(lm: Reader, chat: Chat, roles: Sequence[Role], *, prompting: bool) -> list[str]:
    """What the template puts before, between and behind turns of these roles."""
    turns = [{"role": role, "content": f"{_PLACE}-{at}-{_PLACE}"} for at, role in enumerate(roles)]
    template = (CLOCK if "strftime_now" in chat.template else "") + chat.template
    try:
        text = str(
            lm.tokenizer.apply_chat_template(
                turns, chat_template=template, tokenize=False, add_generation_prompt=prompting, date_string=TODAY
            )
        )  # fmt: skip
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise InvalidRequest(
            f"the chat template of {lm.name!r} refuses a conversation of {', '.join(roles)}: {first_line(error)}",
            param="messages",
        ) from None
    parts = re.split(f"{_PLACE}-([0-9]+)-{_PLACE}", text)
    if parts[1::2] != [str(at) for at in range(len(roles))]:
        shown = ", ".join(roles[int(at)] for at in parts[1::2]) or "nothing"
        raise InvalidRequest(
            f"the chat template of {lm.name!r} shows {shown} of a conversation of {', '.join(roles)}", param="messages"
        )
    return parts[::2]


def _split(lm: Reader, markup: str) -> list[Segment]:
    """A template's own text, parted at the tokens in it."""
    if not lm.marks:
        return [markup] if markup else []
    longest_first = sorted(lm.marks, key=len, reverse=True)
    pieces = re.split(f"({'|'.join(map(re.escape, longest_first))})", markup)
    found: list[Segment] = [lm.marks[piece] if at % 2 else piece for at, piece in enumerate(pieces) if piece]
    check_ids(lm, [segment for segment in found if isinstance(segment, int)])
    return found


def _swallowed(lm: Reader, made: Sequence[Segment]) -> list[Segment]:
    """Without the whitespace that tokens take from the text beside them, as some are made to."""
    kept = list(made)
    for at, segment in enumerate(made):
        if isinstance(segment, str):
            before, after = (made[i] if 0 <= i < len(made) else None for i in (at - 1, at + 1))
            if isinstance(before, int) and lm.tokenizer.added_tokens_decoder[before].rstrip:
                segment = segment.lstrip()
            if isinstance(after, int) and lm.tokenizer.added_tokens_decoder[after].lstrip:
                segment = segment.rstrip()
            kept[at] = segment
    return [segment for segment in kept if segment != ""]
