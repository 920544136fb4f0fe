"""Signals as a way to end a command: heard at any moment, one at a time."""

import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM)


class Ended(BaseException):
    """A signal asked for the end.

    No KeyboardInterrupt: where that passes through ``exec``, as in the making of any dataclass, Python remembers it
    and dies of the signal in the end, whoever caught it.
    """


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGINT and SIGTERM end what is inside, at any moment, without an error and with no child process left.

    While one is obeyed, others are not heard: what is being tidied up is tidied up to its end. Nor are they heard
    afterwards, when the process ends. One that somebody swallowed has no such effect: the next is heard again. What is
    inside may decide to hear none any more, since all is done.
    """
    before = {number: signal.signal(number, _interrupt) for number in ENDING}
    try:
        try:
            yield
        finally:
            if not _obeyed():
                _handle({number: old for number, old in before.items() if signal.getsignal(number) != signal.SIG_IGN})
    except Ended:
        _handle(dict.fromkeys(ENDING, signal.SIG_IGN))
        import psutil  # here, because a client does without it

        for child in psutil.Process().children():  # one just started may be known to nobody else
            with suppress(psutil.NoSuchProcess):
                child.kill()
                child.wait()


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    if not _obeyed():
        raise Ended


def _obeyed() -> bool:
    """Whether an ``Ended`` is on its way out: it is what is handled here, or that came up in handling it."""
    error = sys.exception()
    while error is not None and not isinstance(error, Ended):
        error = error.__context__
    return error is not None


def _handle(handlers: Mapping[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
