"""What the HTTP side and those that hold models say to each other: msgpack, each message after its length.

Over a Unix socket between processes of one service, or by Ray. Every message is decoded into its type alone.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import msgspec
import numpy as np

from latentwire.bridge import errors
from latentwire.bridge.errors import InferenceFailed, LatentWireError
from latentwire.bridge.reader import SourceTokens
from latentwire.service.inference.request import Asked, Piece
from latentwire.service.inference.scoring import ScoreItem
from latentwire.service.processes.door import LENGTH_BYTES

Value = TypeVar("Value")


class Encode(msgspec.Struct, tag=True):
    """As ``Models.encode``."""

    id: int
    bridge: str
    sources: Sequence[SourceTokens]


class Generate(msgspec.Struct, tag=True):
    """As ``Models.generate``; ``stream`` asks for pieces."""

    id: int
    bridge: str
    receiver: str
    asked: Sequence[Asked]
    stream: bool


class Score(msgspec.Struct, tag=True):
    """As ``Models.score``."""

    id: int
    bridge: str
    receiver: str
    items: Sequence[ScoreItem]


class Manage(msgspec.Struct, tag=True):
    """What is not about a request: models in memory, metrics. ``bridge`` where the name is about one."""

    id: int
    name: Literal["in_memory", "load", "unload", "pin", "unpin", "metrics"]
    bridge: str = ""


class Evaluate(msgspec.Struct, tag=True):
    """A call of ``Jobs``; bodies and records travel as their own JSON."""

    id: int
    name: Literal["create", "find", "all", "cancel"]
    tenant: str
    body: str = ""
    key: str | None = None


class Cancel(msgspec.Struct, tag=True):
    """Nobody waits for the answer of that id any more; it ends with a ``Failure`` that says what it has cost."""

    id: int


class Restart(msgspec.Struct, tag=True):
    """End, for the parent to start another process of the models."""


class Answer(msgspec.Struct, tag=True):
    """The result, whose type the question decides, and the tokens that reached a model."""

    id: int
    result: msgspec.Raw
    cost: int | None = None


class Failure(msgspec.Struct, tag=True):
    """An error of ``bridge.errors``, and the tokens that reached a model before it."""

    id: int
    kind: str
    message: str
    param: str | None = None
    retry_after_seconds: float | None = None
    cost: int | None = None

    @classmethod
    def of(cls, id: int, error: BaseException, cost: int | None) -> "Failure":
        """An error as it crosses; one that no request caused as ``InferenceFailed``."""
        said = error if isinstance(error, LatentWireError) else InferenceFailed.of(error)
        return cls(id, type(said).__name__, str(said), said.param, said.retry_after_seconds, cost)

    def error(self) -> LatentWireError:
        """The same error here."""
        made: LatentWireError = getattr(errors, self.kind)(
            self.message, param=self.param, retry_after_seconds=self.retry_after_seconds
        )
        return made


class Said(msgspec.Struct, tag=True):
    """New text of an output."""

    id: int
    piece: Piece


class Health(msgspec.Struct, tag=True):
    """How the models are, said again and again: as of ``Models``; and the ids of the bridges, by name."""

    bridges: Mapping[str, str]
    ready: bool
    failure: str | None
    dead: str | None
    stalled: bool


Question = Encode | Generate | Score | Manage | Evaluate | Cancel | Restart
Reply = Answer | Failure | Said | Health


def packed(value: Any) -> msgspec.Raw:
    """A result as it crosses."""
    return msgspec.Raw(_encoder.encode(value))


def encoded(message: Question | Reply) -> bytes:
    """A message alone (ValueError for one that cannot cross)."""
    return _encoder.encode(message)


def framed(message: Question | Reply) -> bytes:
    """A message with its length before it."""
    body = encoded(message)
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


def unframed(data: bytes) -> Iterator["Reply"]:
    """The replies of whole frames."""
    view = memoryview(data)
    while view:
        end = LENGTH_BYTES + int.from_bytes(view[:LENGTH_BYTES], "big")
        yield REPLIES.decode(view[LENGTH_BYTES:end])
        view = view[end:]


def unpack(data: msgspec.Raw, type_: type[Value]) -> Value:
    """A value of a type (msgspec.ValidationError where it is none)."""
    return msgspec.msgpack.decode(data, type=type_, dec_hook=_array)


async def messages(reader: asyncio.StreamReader, decoder: "msgspec.msgpack.Decoder[Value]") -> AsyncIterator[Value]:
    """The other side's messages, until it has gone."""
    try:
        while True:
            length = int.from_bytes(await reader.readexactly(LENGTH_BYTES), "big")
            yield decoder.decode(await reader.readexactly(length))
    except (asyncio.IncompleteReadError, ConnectionError):
        return


class Outbox:
    """Writes messages; those of one turn of the event loop go out together."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer, self._waiting = writer, list[bytes]()

    def put(self, message: Question | Reply) -> None:
        """Send a message; it is lost where the other side has gone, which the reader notices."""
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._flush)
        self._waiting.append(framed(message))

    def _flush(self) -> None:
        if not self._writer.is_closing():
            self._writer.write(b"".join(self._waiting))
        self._waiting.clear()


def _floats(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype == np.float32:
        return value.shape, value.tobytes()
    raise TypeError(f"a value of type {type(value).__name__} does not cross; expected float32 arrays and plain data")


def _array(_type: Any, value: Any) -> Any:
    shape, data = value
    return np.frombuffer(data, np.float32).reshape(shape).copy()  # what was received cannot be written to


_encoder = msgspec.msgpack.Encoder(enc_hook=_floats)
QUESTIONS: "msgspec.msgpack.Decoder[Question]" = msgspec.msgpack.Decoder(Question, dec_hook=_array)
REPLIES: "msgspec.msgpack.Decoder[Reply]" = msgspec.msgpack.Decoder(Reply, dec_hook=_array)
