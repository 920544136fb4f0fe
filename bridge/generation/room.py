"""Room for the key/value cache of an engine, found by trying, and a model left as it was where there is none."""

import logging
from collections.abc import Callable
from typing import TypeVar

from latentwire.bridge.devices import is_out_of_memory
from latentwire.bridge.errors import first_line
from latentwire.bridge.memory import free_caches
from latentwire.bridge.models import FrozenLM

log = logging.getLogger(__name__)
Made = TypeVar("Made")

SMALLEST_KV_TOKENS = 256


def fitted(tokens: int, make: Callable[[int], Made]) -> tuple[int, Made]:
    """A cache of ``tokens`` tokens or, where memory is too small, of as many as it holds; and what was made.

    The library counts with a cache what masks and copies of a step will take beside it, and refuses one that leaves
    them no room. The cache then gives way, never the rows of a step. Raises what ``make`` does for the smallest one.
    """
    asked, trouble = tokens, ""
    while True:
        try:
            made = make(tokens)
            break
        except Exception as error:
            if not is_out_of_memory(error) or tokens <= SMALLEST_KV_TOKENS:
                raise
            trouble = first_line(error)  # and the error goes, with what its frames hold
        tokens = max(SMALLEST_KV_TOKENS, tokens * 3 // 4)
        free_caches()
    if trouble:
        log.warning("memory has room for a key/value cache of %d tokens, not of %d (%s)", tokens, asked, trouble)
    return tokens, made


def keep_attention(lm: FrozenLM) -> Callable[[], None]:
    """Gives back what leaves a model's attention as it is now: a manager of the library's may change it, and one that
    was never started does not change it back."""
    found = lm.model.config._attn_implementation

    def restore() -> None:
        if lm.model.config._attn_implementation != found:
            lm.model.set_attn_implementation(found)

    return restore
