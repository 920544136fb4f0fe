"""Deadlines, callers who disconnect, and streams."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.sse import EventSourceResponse, format_sse_event
from starlette.types import Message, Receive, Scope, Send

from latentwire.bridge.errors import CallerLeft, DeadlineExceeded
from latentwire.service.api.errors import status_of

Result = TypeVar("Result")
KEEP_ALIVE_SECONDS = 15.0
COMMENT = format_sse_event(comment="keep-alive")
QUIET = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # proxies pass events on as they come
OnPiece = Callable[[Any], None]


def deadline(request: Request, wished: float | None) -> float:
    """Seconds a request may take: what the caller wishes, at most what the operator allows."""
    limit: float = request.app.state.runtime.settings.request_timeout
    return limit if wished is None else min(wished, limit)


async def run_while_connected(request: Request, work: Coroutine[Any, Any, Result], seconds: float) -> Result:
    """Await ``work`` for at most ``seconds``, and cancel it when the caller disconnects.

    Raises:
        DeadlineExceeded: It took too long.
        CallerLeft: The connection was closed.
    """
    task, disconnected = asyncio.create_task(work), asyncio.create_task(_disconnected(request))
    try:
        done, _ = await asyncio.wait((task, disconnected), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task in done:
            return task.result()
        if disconnected in done:
            raise CallerLeft("the caller closed the connection before the answer")
        raise DeadlineExceeded(f"no answer within {seconds:g} s")
    finally:
        task.cancel()
        disconnected.cancel()


async def stream_response(
    request: Request,
    work: Callable[[OnPiece], Coroutine[Any, Any, Result]],
    events: Callable[[AsyncIterator[Any], Callable[[], Result]], AsyncIterator[str]],
    seconds: float,
) -> EventSourceResponse:
    """Start ``work`` and stream its pieces as server-sent events.

    An error before the first piece is raised, and becomes an ordinary response with its status.

    Args:
        request: Watched for a disconnect until the first piece; after it the response does that.
        work: Called with a function that takes pieces, on the event loop.
        events: Makes the lines of the stream: gets the pieces, and a function that returns the result of ``work`` after
            the last piece, or raises its error.
        seconds: The deadline of all of it.
    """
    pieces: asyncio.Queue[tuple[Any] | None] = asyncio.Queue()
    task = asyncio.create_task(_with_deadline(work(lambda piece: pieces.put_nowait((piece,))), seconds))
    task.add_done_callback(lambda _: pieces.put_nowait(None))
    try:
        first = await run_while_connected(request, pieces.get(), seconds + 1)
        if first is None:
            task.result()
    except BaseException:
        task.cancel()
        raise

    async def stream_pieces() -> AsyncIterator[Any]:
        item = first
        while item is not None:
            yield item[0]
            item = await pieces.get()

    return _Events(events(stream_pieces(), task.result), task)


def event(name: str | None, data: Any) -> str:
    """One server-sent event; ``data`` becomes JSON."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return format_sse_event(event=name, data_str=text).decode()


class _Events(EventSourceResponse):
    """Ends the work when the stream ends, however it does, and also when it never began.

    Sends a comment where nothing has come for long, so that nobody on the way closes the connection.
    """

    def __init__(self, body: AsyncIterator[str], task: "asyncio.Task[Any]") -> None:
        super().__init__(body, headers=QUIET)
        self._task = task

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        now = asyncio.get_running_loop().time
        sent_at = 0.0  # of nothing yet

        async def noted(message: Message) -> None:
            nonlocal sent_at
            sent_at = now()
            await send(message)

        async def keep_alive() -> None:
            while True:
                left = KEEP_ALIVE_SECONDS - (now() - sent_at) if sent_at else KEEP_ALIVE_SECONDS
                if left <= 0:
                    await noted({"type": "http.response.body", "body": COMMENT, "more_body": True})
                else:
                    await asyncio.sleep(left)

        alive = asyncio.create_task(keep_alive())
        try:
            await super().__call__(scope, receive, noted)
        finally:
            alive.cancel()
            self._task.cancel()
            ended: tuple[Any, Any] = await asyncio.gather(self._task, alive, return_exceptions=True)
            result = ended[0]  # what it raised has been told
            if isinstance(result, BaseException):
                scope["state"]["ended"] = status_of(result)


async def _with_deadline(work: Coroutine[Any, Any, Result], seconds: float) -> Result:
    try:
        async with asyncio.timeout(seconds):
            return await work
    except TimeoutError:
        raise DeadlineExceeded(f"no answer within {seconds:g} s") from None


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
