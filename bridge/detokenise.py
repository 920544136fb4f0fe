"""The side of a language model that writes: ids become text here, and nowhere else.

Nothing is tidied up: a text is its tokens, so that pieces of it can be put together again.
"""

from collections.abc import Sequence
from typing import cast

from transformers import PreTrainedTokenizerFast

from latentwire.bridge.reader import Reader

UNFINISHED = "\ufffd"  # what a decoder shows for the first bytes of a character
CONTEXT = 4  # tokens decoded again before new ones


def decode(lm: Reader, ids: Sequence[int], *, special: bool = False) -> str:
    """Text of tokens; ``special`` shows those that stand for no text as they are written. Any thread may call it."""
    tokenizer = lm.tokenizer
    if getattr(type(tokenizer), "_decode", None) is PreTrainedTokenizerFast._decode:  # which adds nothing but time
        return str(tokenizer.backend_tokenizer.decode(list(ids), skip_special_tokens=not special))
    return str(tokenizer.decode(list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False))


class Text:
    """The text of tokens as they come: at any time what ``decode`` makes of all of them, at the cost of the new ones.

    A decoder looks around. It drops a space before the first token, puts a character together from the bytes of
    several, and shows a whole run of byte tokens as ``UNFINISHED`` when that is no UTF-8. So new tokens are decoded
    behind a few that came before, and what they add is settled where nothing later can reach it. Tokens that stand for
    no text are left out first, as the decoder does: bytes on either side of one are one run.
    """

    def __init__(self, lm: Reader) -> None:
        self.settled = ""  # text that no later token changes
        self._lm, self._hidden = lm, frozenset(lm.special.values())
        self._context: list[int] = []
        self._before = 0  # characters of the context
        self._pending: list[int] = []
        self._unsettled: str | None = ""

    @property
    def unsettled(self) -> str:
        """Text as it is now, after what is settled."""
        if self._unsettled is None:
            self._unsettled = decode(self._lm, self._context + self._pending)[self._before :]
        return self._unsettled

    @property
    def is_settled(self) -> bool:
        """Whether all that was taken is."""
        return not self._pending

    def add(self, ids: Sequence[int]) -> None:
        """Take more tokens."""
        self._pending += [i for i in ids if i not in self._hidden and self._written(i) is not None]
        self._unsettled = None

    def settle(self) -> None:
        """Settle what was taken, unless it ends within a run or a character, or in nothing that can be seen."""
        if not self._pending or self._is_byte(self._pending[-1]) or self.unsettled.endswith(UNFINISHED):
            return
        context = (self._context + self._pending)[-CONTEXT:]
        if seen := decode(self._lm, context):  # else it might be the space before the first token
            self.settled += self.unsettled
            self._context, self._before, self._pending, self._unsettled = context, len(seen), [], ""

    def _is_byte(self, token: int) -> bool:
        """Whether it may be one of ``<0x00>`` to ``<0xFF>``, whichever way the digits are written."""
        written = self._written(token) or ""
        return len(written) == 6 and written.startswith("<0x") and written.endswith(">")

    def _written(self, token: int) -> str | None:
        """How a token is written; None for a row of the model's that no token belongs to."""
        return cast(str | None, self._lm.tokenizer.convert_ids_to_tokens(token))
