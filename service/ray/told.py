"""What a caller has been told of a stream, where another replica goes on with it."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable

from latentwire.bridge.errors import NotReady
from latentwire.service.inference.request import Piece

RETRY_SECONDS = 5.0  # what a caller is told to wait where no replica could answer


class Told:
    """What a caller has been told of each output: what another replica says again is not told again.

    Where a piece ends depends on the pace of who reads it, so characters count, and log-probabilities.

    Attributes:
        began: ``time.monotonic()`` when a replica was asked last.
    """

    def __init__(self, on_piece: Callable[[Piece], None] | None) -> None:
        self._on_piece = on_piece
        self._texts: defaultdict[int, str] = defaultdict(str)
        self._logprobs: Counter[int] = Counter()
        self.begin()

    def begin(self) -> None:
        """The next piece of each output is its first."""
        self.began = time.monotonic()
        self._said: Counter[int] = Counter()
        self._said_logprobs: Counter[int] = Counter()

    def take(self, piece: Piece) -> None:
        """Tell of a piece what was not told yet (NotReady where something else was told in its place)."""
        index = piece.index
        again = self._texts[index][self._said[index] :][: len(piece.text)]
        if not piece.text.startswith(again):
            raise NotReady("the replica that was answering ended", retry_after_seconds=RETRY_SECONDS)
        self._said[index] += len(piece.text)
        known = max(self._logprobs[index] - self._said_logprobs[index], 0)
        self._said_logprobs[index] += len(piece.logprobs)
        new = Piece(index, piece.text[len(again) :], piece.logprobs[known:])
        if not new.text and not new.logprobs:
            return
        self._texts[index] += new.text
        self._logprobs[index] += len(new.logprobs)
        if self._on_piece is not None:
            self._on_piece(new)
