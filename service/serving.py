"""A service as a process: its sockets, its signals, its end.

SIGTERM or SIGINT: not ready any more → new requests are refused with 503 while those accepted are answered, for
``drain_timeout`` at most → what still runs is given up with an error → exit code 0. A second signal does not wait. An
engine that died ends the process with exit code 1, for its supervisor to start another.
"""

import asyncio
import gc
import logging
import signal
import socket
from collections.abc import Awaitable, Callable
from types import FrameType

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from latentwire.service.runtime import Runtime

log = logging.getLogger(__name__)

CLOSING_SECONDS = 5  # in which answers that are being sent reach their callers
KEEP_ALIVE_SECONDS = 75  # longer than proxies keep theirs: who closes first must be the one who sends
ENGINE_DIED = 1
PROBE_SECONDS = 0.1


class Connection(H11Protocol):
    """uvicorn's, but a request must come, and a caller who has sent everything may shut that half of the connection.

    The head of a request must be whole within ``KEEP_ALIVE_SECONDS`` of the begin of the connection, or of the answer
    before. uvicorn's own time begins with the first answer and ends with the next byte, whatever that belongs to.

    A caller who shuts its half gets the answer. One who closed the connection altogether looks the same until
    something is sent. So interim answers are sent, which clients skip: the kernel of one who left refuses them, and the
    next fails here. An answer that has begun does that itself.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def data_received(self, data: bytes) -> None:
        """Bytes alone end no waiting: ``handle_events`` does, where they make a request."""
        self.conn.receive_data(data)
        self.handle_events()

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """True keeps the connection open."""
        cycle = self.cycle
        if cycle is None or cycle.more_body or cycle.response_complete or cycle.scope["http_version"] != "1.1":
            return None
        cycle.keep_alive = False
        self._probe(cycle)
        return True

    def _probe(self, cycle: RequestResponseCycle) -> None:
        if cycle.disconnected or cycle.response_started or self.transport.is_closing():
            return
        interim = h11.InformationalResponse(status_code=100, headers=[], reason="Continue")
        self.transport.write(self.conn.send(interim) or b"")
        self.loop.call_later(PROBE_SECONDS, self._probe, cycle)


class Server(uvicorn.Server):
    """uvicorn's, with an end that loses no accepted request."""

    def __init__(self, application: FastAPI) -> None:
        super().__init__(
            uvicorn.Config(
                application,
                http=Connection,
                log_config=None,
                log_level="warning",
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=CLOSING_SECONDS,
            )
        )
        self.runtime: Runtime = application.state.runtime
        self._stop: Callable[[], Awaitable[None]] = application.state.stop
        self.runtime.on_death = self._end_now
        self.exit_code = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Remember the loop, which signals and engines call into."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains; the second ends."""
        if self._loop is None or self.runtime.draining:
            self.should_exit = self.force_exit = True
            return
        log.info("%s: answering %d rows, then stopping", signal.Signals(sig).name, self.runtime.load.admitted)
        self.runtime.draining = True
        self._loop.call_soon_threadsafe(self._begin_to_end)

    def _begin_to_end(self) -> None:
        self._ending = asyncio.create_task(self._end())

    async def _end(self) -> None:
        await self.runtime.drain()
        await self._stop()
        self.should_exit = True

    def _end_now(self) -> None:
        """From an engine's thread: those who wait have been told already."""
        self.exit_code = ENGINE_DIED
        if self._loop is not None:
            self._loop.call_soon_threadsafe(setattr, self, "should_exit", True)


def serve(application: FastAPI, sockets: list[socket.socket]) -> int:
    """Serve until a signal or a death; the exit code."""
    server = Server(application)
    gc.collect()
    gc.freeze()  # code and libraries, before any model is there: to look through them stopped every answer for .5 s
    server.run(sockets=sockets)
    return server.exit_code
