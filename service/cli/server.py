"""A service as a process: its sockets, its signals, its end.

SIGTERM or SIGINT: not ready any more, for ``drain_delay``, in which balancers turn away → new requests are refused with
503 while those accepted are answered, for ``drain_timeout`` at most → what still runs is given up with an error → exit
code 0. A second signal does not wait. An engine that died ends the process with exit code 1, for its supervisor to
start another.
"""

import asyncio
import errno
import gc
import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from types import FrameType

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from latentwire.bridge.errors import InvalidRequest
from latentwire.service.cli.signals import ENDING
from latentwire.service.inference.runtime import Runtime

log = logging.getLogger(__name__)

CLOSING_SECONDS = 5  # in which answers that are being sent reach their callers
KEEP_ALIVE_SECONDS = 75  # longer than proxies keep theirs: who closes first must be the one who sends
ENGINE_DIED = 1
PROBE_SECONDS = 0.1
NOT_HERE = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}  # a name can have addresses of a family that this machine lacks
TAKEN = {errno.EADDRINUSE, errno.EACCES}
TRIES = 16  # for a port that is free at every address


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

    def __init__(self, application: FastAPI, on_started: Callable[[], None] | None = None) -> None:
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
        self._on_started = on_started or (lambda: None)
        self.exit_code = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Remember the loop, which signals and engines call into."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._on_started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains; the second ends."""
        if self._loop is None or self.runtime.leaving:
            self.should_exit = True
            self.force_exit = self._loop is not None  # what has not begun to start ends in order
            return
        log.info("%s: answering %d rows, then stopping", signal.Signals(sig).name, self.runtime.admission.admitted)
        self.runtime.leaving = True
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


def serve(application: FastAPI, sockets: list[socket.socket], on_started: Callable[[], None] | None = None) -> int:
    """Serve until a signal or a death; the exit code. ``on_started`` is called once requests are answered."""
    server = Server(application, on_started)
    gc.collect()
    gc.freeze()  # code and libraries, before any model is there: to look through them stopped every answer for .5 s
    for number in ENDING:
        signal.signal(number, server.handle_exit)  # uvicorn leaves it as it was found: one that comes late is heard too
    server.run(sockets=sockets)
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)  # all is answered, and the process ends
    return server.exit_code


def listen(host: str, port: int) -> list[socket.socket]:
    """Listening sockets at those addresses of a host that this machine has; port 0 takes one that is free at all.

    ``::`` takes IPv4 as well. Their connections send without delay: asyncio sees to that for sockets of its own making
    only, and without it every answer waits 40 ms for an acknowledgement.

    Raises:
        InvalidRequest: An address cannot be had, or there is none.
    """
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        addresses = {str(address[0]): family for family, _, _, _, address in found}
        return _open(addresses, port, TRIES if port == 0 else 1)
    except (OSError, UnicodeError) as error:  # of a name that is none, and is looked up nowhere, the latter
        raise InvalidRequest(f"{_place(host, port)} cannot be listened on: {_why(error)}") from None


def url(host: str, port: int) -> str:
    """The address as a browser takes it."""
    return f"http://{_place(host, port)}"


def _open(addresses: Mapping[str, int], port: int, tries: int) -> list[socket.socket]:
    listeners: list[socket.socket] = []
    missing: OSError | None = None
    with ExitStack() as opened:
        for host, family in addresses.items():
            same = listeners[0].getsockname()[1] if listeners else port
            both = list(addresses) == ["::"] and socket.has_dualstack_ipv6()
            try:
                listeners.append(opened.enter_context(_listener(host, same, family, both)))
            except OSError as error:
                if error.errno == errno.EADDRINUSE and tries > 1:
                    return _open(addresses, port, tries - 1)
                if error.errno not in NOT_HERE:
                    raise
                missing = error
        if missing and not listeners:
            raise missing
        opened.pop_all()
    return listeners


def _listener(host: str, port: int, family: int, both: bool) -> socket.socket:
    listener = socket.create_server((host, port), family=family, backlog=2048, dualstack_ipv6=both)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _place(host: str, port: int) -> str:
    host = host.strip("[]")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _why(error: OSError | UnicodeError) -> str:
    if isinstance(error, UnicodeError):
        return "this is no name; give another --host"
    if isinstance(error, socket.gaierror):
        return f"{error.strerror}; give another --host"
    other = "--port" if error.errno in TAKEN else "--host"
    return f"{os.strerror(error.errno or 0)}; give another {other}"  # its own text repeats the address
