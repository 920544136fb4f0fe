"""Bodies of requests: how large one may be, how long it may take to come, and how much all may take together."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import Message, Receive, Scope

from bridge.errors import DeadlineExceeded, Overloaded, TooLarge
from service.settings import Settings


class Bodies:
    """What bodies of requests take while these are answered.

    Bytes count when they have come: one who announces many and sends none takes no room from others.
    """

    def __init__(self, settings: Settings) -> None:
        self.most, self.most_together = int(settings.max_body), settings.all_bodies
        self.seconds = settings.request_timeout
        self.taken = 0

    @contextmanager
    def receiving(self, scope: Scope, receive: Receive) -> Iterator["Body"]:
        """A body within the limits, counted until the end."""
        body = Body(self, scope, receive)
        try:
            yield body
        finally:
            self.taken -= body.taken


class Body:
    """The body of one request. ``awaited`` says whether anybody has asked for it."""

    def __init__(self, bodies: Bodies, scope: Scope, receive: Receive) -> None:
        self._bodies, self._receive = bodies, receive
        declared = dict(scope["headers"]).get(b"content-length", b"")
        self._too_large = declared.isdigit() and int(declared[:20]) > bodies.most
        self._ends: float | None = asyncio.get_running_loop().time() + bodies.seconds
        self.taken, self.awaited = 0, False

    async def receive(self) -> Message:
        """The next part.

        Raises:
            TooLarge: This body is over its limit.
            Overloaded: All of them together are over theirs.
            DeadlineExceeded: It was not there in time.
        """
        self.awaited = True
        message: Message = {} if self._too_large else await self._next()
        self._take(len(message.get("body", b"")))
        return message

    async def _next(self) -> Message:
        try:
            async with asyncio.timeout_at(self._ends):
                message = await self._receive()
        except TimeoutError:
            raise DeadlineExceeded(f"the request was not there within {self._bodies.seconds:g} s") from None
        if not message.get("more_body", False):
            self._ends = None
        return message

    def _take(self, count: int) -> None:
        bodies = self._bodies
        if self._too_large or self.taken + count > bodies.most:
            self._too_large = True
            raise TooLarge(f"the request body is over {bodies.most} bytes", param="body")
        if count and bodies.taken + count > bodies.most_together:
            most = bodies.most_together
            raise Overloaded(f"the bodies of all requests together are over {most} bytes; try again later")
        self.taken += count
        bodies.taken += count
