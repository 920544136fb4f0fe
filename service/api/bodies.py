"""Bodies of requests: how large one may be, how long it may take to come, and how much all may take together."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from starlette.types import Message, Receive, Scope

from latentwire.bridge.errors import DeadlineExceeded, Overloaded, TooLarge
from latentwire.service.inference.parts import Sum
from latentwire.service.settings import Settings

DROP_SECONDS = 2.0  # for which the rest of a body is read that nobody wants


class Bodies:
    """What bodies of requests take while these are answered.

    Bytes count when they have come: one who announces many and sends none takes no room from others.
    """

    def __init__(self, settings: Settings, taken: Sum) -> None:
        """``taken`` counts their bytes, those of other processes with them."""
        self.most, self.most_together = int(settings.max_body), settings.all_bodies
        self.seconds = settings.request_timeout
        self.taken = taken

    @contextmanager
    def receiving(self, scope: Scope, receive: Receive) -> Iterator["Body"]:
        """A body within the limits, counted until the end."""
        body = Body(self, scope, receive)
        try:
            yield body
        finally:
            self.taken.own -= body.taken


class Body:
    """The body of one request.

    Attributes:
        taken: Bytes of it that count.
        unasked: Whether its caller waits to be asked for it, and was not.
        whole: Whether all of it has come.
    """

    def __init__(self, bodies: Bodies, scope: Scope, receive: Receive) -> None:
        self._bodies, self._receive = bodies, receive
        headers = dict(scope["headers"])
        declared = headers.get(b"content-length", b"")
        self._too_large = declared.isdigit() and int(declared[:20]) > bodies.most
        self._ends = asyncio.get_running_loop().time() + bodies.seconds
        self.taken, self.unasked, self.whole = 0, b"expect" in headers, False

    async def receive(self) -> Message:
        """The next part.

        Raises:
            TooLarge: This body is over its limit.
            Overloaded: All of them together are over theirs.
            DeadlineExceeded: It was not there in time.
        """
        try:
            async with asyncio.timeout_at(None if self.whole else self._ends):
                message: Message = {} if self._too_large else await self._next()
        except TimeoutError:
            raise DeadlineExceeded(f"the request was not there within {self._bodies.seconds:g} s") from None
        self._take(len(message.get("body", b"")))
        return message

    async def drop(self) -> None:
        """Let the rest of it come, for a while: to close a connection on unread bytes takes the answer back."""
        with suppress(TimeoutError):
            async with asyncio.timeout(DROP_SECONDS):
                while not (self.whole or self.unasked):
                    await self._next()

    async def _next(self) -> Message:
        self.unasked = False
        message = await self._receive()
        self.whole = not message.get("more_body", False)
        return message

    def _take(self, count: int) -> None:
        bodies = self._bodies
        if self._too_large or self.taken + count > bodies.most:
            self._too_large = True
            raise TooLarge(f"the request body is over {bodies.most} bytes", param="body")
        if count and bodies.taken.all + count > bodies.most_together:
            most = bodies.most_together
            raise Overloaded(f"the bodies of all requests together are over {most} bytes; try again later")
        self.taken += count
        bodies.taken.own += count
