"""What a caller has been told of a stream, where another replica goes on with it."""

from collections import Counter
from collections.abc import Callable

from latentwire.bridge.errors import NotReady
from latentwire.service.inference.request import Piece

RETRY_SECONDS = 5.0  # what a caller is told to wait where no replica could answer


class Told:
    """The pieces of text that a caller has been told; those that another replica says again are not told again."""

    def __init__(self, on_piece: Callable[[Piece], None] | None) -> None:
        self._on_piece = on_piece
        self._told: dict[int, list[str]] = {}
        self._said: Counter[int] = Counter()

    def begin(self) -> None:
        """The next piece of each output is its first."""
        self._said.clear()

    def take(self, piece: Piece) -> None:
        """Tell a piece, unless it was told (NotReady where another was told in its place)."""
        told, number = self._told.setdefault(piece.index, []), self._said[piece.index]
        self._said[piece.index] += 1
        if number == len(told):
            told.append(piece.text)
            if self._on_piece is not None:
                self._on_piece(piece)
        elif told[number] != piece.text:
            raise NotReady("the replica that was answering ended", retry_after_seconds=RETRY_SECONDS)
