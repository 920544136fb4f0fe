"""Every error this product raises on purpose. Importing this module needs no torch.

LatentWireError
├── InvalidRequest      the caller's input can never succeed                    422
├── InvalidMessage      bytes that are not a latent this bridge could have sent 422
├── TooLarge            the input is over a limit that is checked before work   413
├── Unauthenticated     the request bears no key that this service knows        401
├── Forbidden           the key may not do this, or the message is not signed   403
├── UnknownBridge       no bridge, stored latent or receiver under that name    404
├── IncompatibleBridge  bridge, model or latent disagree on shape or identity   409
├── CorruptCheckpoint   a file of the checkpoint is missing or damaged          500
├── ModelUnavailable    a language model cannot be found or read                500
├── Conflict            an idempotency key was used with another body           409
├── ModelInUse          the model is lent and cannot be dropped now             409
├── Overloaded          the queue is full; try again later                      429
├── RateLimited         the key has used what it may use in a minute            429
├── NotReady            the models are still loading                            503
├── StoreUnavailable    the store of latents does not answer                    503
├── InsufficientMemory  the models do not fit the memory budget                 503
├── DeadlineExceeded    the answer would come too late                          504
├── CallerLeft          nobody waits for the answer any more                    499
├── InferenceFailed     the model raised; the whole batch is lost               500
├── TrainingFailed      a run cannot go on; its last saved state is kept        500
└── LeakFound           an answer reached the receiver around the bridge        422

The HTTP status lives in ``service.api.errors``; nothing here knows about HTTP. Every message names the value
that was met and the value that was expected.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

MAX_SAID = 500


class LatentWireError(Exception):
    """Base class: ``except LatentWireError`` catches everything above.

    ``param`` names the field or flag at fault, ``retry_after_seconds`` when to try again, where either is known.

    >>> try:
    ...     latentwire.Bridge.load("nowhere")
    ... except latentwire.LatentWireError as error:
    ...     print(type(error).__name__)
    UnknownBridge
    """

    def __init__(self, message: str, *, param: str | None = None, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.retry_after_seconds = retry_after_seconds


class InvalidRequest(LatentWireError):
    """The caller's input can never succeed."""


class InvalidMessage(LatentWireError):
    """The bytes are not a latent: truncated, altered, not finite or out of bounds."""


class TooLarge(LatentWireError):
    """The input is over a limit that is checked before any work starts."""


class Unauthenticated(LatentWireError):
    """The request bears no key, or none that this service knows."""


class Forbidden(LatentWireError):
    """The caller may not do this, or the message was not signed by this service."""


class UnknownBridge(LatentWireError):
    """No bridge, stored latent or receiver is known under that name."""


class IncompatibleBridge(LatentWireError):
    """The bridge was made for another sender, receiver, layout or width."""


class CorruptCheckpoint(LatentWireError):
    """A file of the checkpoint is missing, damaged or of an unknown version."""


class ModelUnavailable(LatentWireError):
    """A language model cannot be found, read or used as asked."""


class Conflict(LatentWireError):
    """The same idempotency key was used with another body."""


class ModelInUse(LatentWireError):
    """The model is lent; it cannot be dropped now."""


class Overloaded(LatentWireError):
    """The queue is full. Retrying later may work."""


class RateLimited(LatentWireError):
    """The key has used what it may use in a minute; ``retry_after_seconds`` says when it may go on."""


class InsufficientMemory(LatentWireError):
    """The models do not fit the memory budget, even one after the other."""


class DeadlineExceeded(LatentWireError):
    """The request waited longer than the caller allows."""


class CallerLeft(LatentWireError):
    """The caller closed the connection; what had not started was dropped."""


class InferenceFailed(LatentWireError):
    """The model raised while running a batch; ``__cause__`` holds why."""

    @classmethod
    def of(cls, error: BaseException) -> "InferenceFailed":
        """What callers get for an error that no request caused."""
        failure = cls(f"the model failed with {type(error).__name__}")
        failure.__cause__ = error
        return failure


class TrainingFailed(LatentWireError):
    """A training run cannot go on; what it saved last is kept."""


class LeakFound(LatentWireError):
    """An evaluation is worthless: an answer reached the receiver by another way than the bridge."""


class NotReady(LatentWireError):
    """The models are still loading, or the worker makes no progress."""


class StoreUnavailable(LatentWireError):
    """The store of latents does not answer, or refuses to take more."""


@contextmanager
def at_fault(param: str) -> Iterator[None]:
    """Errors raised inside name ``param`` as the field at fault."""
    try:
        yield
    except LatentWireError as error:
        error.param = param
        raise


def one_of(names: Iterable[str]) -> str:
    """What a name may be, as pydantic says it: ``'a', 'b' or 'c'``."""
    *others, last = map(repr, names)
    return f"{', '.join(others)} or {last}" if others else last


def first_line(error: Exception) -> str:
    """What an error says, in one line of at most ``MAX_SAID`` characters."""
    return shorten(next(iter(str(error).strip().splitlines()), type(error).__name__))


def shorten(text: str, most: int = MAX_SAID) -> str:
    """The start of a text: what somebody sent is named, not sent back whole."""
    return text if len(text) <= most else text[: most - 3] + "..."
