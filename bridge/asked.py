"""What a caller in Python asks of a bridge, checked: one thing or several, whatever the type."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, get_args

from pydantic import ValidationError

from latentwire.bridge.config import Prompt, Turn
from latentwire.bridge.config import Role as ChatRole
from latentwire.bridge.errors import InvalidRequest, shorten
from latentwire.bridge.results import Latent

Input = str | bytes | bytearray | memoryview | Latent
"""A text, which the sender reads; or a latent: a message of this bridge, alone or as ``encode`` returned it."""

PARAMS = {"prompt": "prompt", "choice": "choices", "original": "against"}  # what is at fault, by what it is called


def prompts_of(prompt: str | Sequence[str] | Sequence[Mapping[str, Any]], count: int) -> list[Prompt]:
    """A prompt for each of so many inputs (InvalidRequest: another number of them, or no messages)."""
    if isinstance(prompt, str):
        return [prompt] * count
    each = each_of(prompt, (str, Mapping), "prompt", "a text, one for each input, or messages")
    if any(isinstance(item, Mapping) for item in each):
        return [tuple(_turn(item) for item in each)] * count
    if len(each) != count:
        raise InvalidRequest(f"{len(each)} prompts for {count} inputs; give one, or one for each", param="prompt")
    return each


def originals_of(against: str | Sequence[str] | None, count: int) -> list[str]:
    """A text for each of so many inputs; none where none is given (InvalidRequest: another number, or an empty one)."""
    if against is None:
        return []
    each: list[str] = each_of(against, (str,), "original", "a text for each input")
    if len(each) != count:
        raise InvalidRequest(f"{len(each)} originals for {count} inputs; give one for each", param="against")
    if "" in each:
        raise InvalidRequest("an original is empty; expected a text", param="against")
    return each


def each_of(given: Any, kinds: tuple[type, ...], what: str, expected: str) -> list[Any]:
    """One thing or several, as a list (InvalidRequest where one is of another type)."""
    several = isinstance(given, Iterable) and not isinstance(given, (Mapping, *kinds))
    items = list(given) if several else [given]
    for item in items:
        if not isinstance(item, kinds):
            name, param = type(item).__name__, PARAMS.get(what, "inputs")
            raise InvalidRequest(f"one {what} is of type {name}; expected {expected}", param=param)
    return items


def _turn(message: object) -> Turn:
    with suppress(ValidationError):
        if isinstance(message, Mapping) and message.keys() == {"role", "content"}:
            return Turn(message["role"], message["content"])
    roles = ", ".join(get_args(ChatRole))
    raise InvalidRequest(
        f"a message is {shorten(repr(message), 80)}; expected its role ({roles}) and its content", param="prompt"
    )
