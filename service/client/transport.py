"""Connections under the two clients: all in which they differ."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable
from typing import TypeVar

import httpx

T = TypeVar("T")


class Suspending:
    """What the calls of ``AsyncClient`` need of a connection."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http

    async def open(self, request: httpx.Request) -> httpx.Response:
        return await self.http.send(request, stream=True)

    async def chunks(self, response: httpx.Response) -> AsyncGenerator[bytes, None]:
        async for chunk in response.aiter_bytes():
            yield chunk

    async def shut(self, response: httpx.Response) -> None:
        await response.aclose()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class Blocking:
    """The same for ``Client``: it blocks where the other suspends, so a coroutine over it runs to its end at once."""

    def __init__(self, http: httpx.Client) -> None:
        self.http = http

    async def open(self, request: httpx.Request) -> httpx.Response:
        return self.http.send(request, stream=True)

    async def chunks(self, response: httpx.Response) -> AsyncGenerator[bytes, None]:
        for chunk in response.iter_bytes():
            yield chunk

    async def shut(self, response: httpx.Response) -> None:
        response.close()

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


def finish(work: Awaitable[T]) -> T:
    """The result of what only awaits things that do not suspend."""
    try:
        next(iter(work.__await__()))
    except StopIteration as done:
        result: T = done.value
        return result
    raise AssertionError("a blocking call was suspended")
