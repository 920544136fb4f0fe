"""What a caller is told of a stream that another replica takes over."""

import pytest

from latentwire.bridge.errors import NotReady
from latentwire.bridge.results import TokenLogprob
from latentwire.service.inference.request import Piece
from latentwire.service.ray.told import Told


def test_what_was_told_is_not_told_again_whatever_the_order_of_outputs() -> None:
    heard: list[tuple[int, str]] = []
    told = Told(lambda piece: heard.append((piece.index, piece.text)))
    for index, text in [(0, "a"), (1, "x"), (0, "b")]:
        told.take(Piece(index, text, ()))
    told.begin()
    for index, text in [(1, "x"), (1, "y"), (0, "a"), (0, "b"), (0, "c")]:
        told.take(Piece(index, text, ()))
    assert heard == [(0, "a"), (1, "x"), (0, "b"), (1, "y"), (0, "c")]


def test_pieces_may_end_elsewhere_in_what_another_replica_says() -> None:
    a, b, c = (TokenLogprob(text, -1.0, ()) for text in "abc")
    heard: list[Piece] = []
    told = Told(heard.append)
    told.take(Piece(0, "ab", (a, b)))
    told.begin()
    for piece in (Piece(0, "a", (a,)), Piece(0, "bc", (b, c))):
        told.take(piece)
    assert heard == [Piece(0, "ab", (a, b)), Piece(0, "c", (c,))]


def test_a_replica_that_says_something_else_does_not_go_on() -> None:
    told = Told(lambda piece: None)
    told.take(Piece(0, "ab", ()))
    told.begin()
    told.take(Piece(0, "a", ()))
    with pytest.raises(NotReady, match="ended"):
        told.take(Piece(0, "cd", ()))
