"""The processes that answer HTTP, to one another: what they count together, and what each counts."""

import asyncio
import mmap
import socket
from collections.abc import Callable
from contextlib import closing, suppress

from latentwire.service.inference.parts import Sum
from latentwire.service.processes.door import Door, is_known

SOON_SECONDS = 2.0  # within which one that does not hang says what it counts


class Peers:
    """One of several processes that answer HTTP, and the others; made before they fork.

    Attributes:
        count: How many there are.
        number: Which of them this is.
    """

    def __init__(self, count: int = 1) -> None:
        self.count, self.number = count, 0
        parts = memoryview(mmap.mmap(-1, 2 * 8 * count)).cast("q")
        self._parts = parts[:count], parts[count:]
        doors = [Door.opened() for _ in range(count if count > 1 else 0)]
        self._doors: list[tuple[Door, socket.socket]] = doors
        self._server: asyncio.Server | None = None

    @property
    def rows(self) -> Sum:
        """Those admitted."""
        return Sum(self._parts[0], self.number)

    @property
    def body_bytes(self) -> Sum:
        """Of bodies under way."""
        return Sum(self._parts[1], self.number)

    def forget(self, number: int) -> None:
        """One of them has ended, whatever it was doing."""
        for parts in self._parts:
            parts[number] = 0

    async def start(self, text: Callable[[], bytes]) -> None:
        """Tell the others what this one counts, whenever they ask."""
        if not self._doors:
            return
        door, listener = self._doors[self.number]

        async def tell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with closing(writer), suppress(asyncio.IncompleteReadError, ConnectionError):
                if await is_known(reader, door.secret):
                    writer.write(text())
                    await writer.drain()

        self._server = await asyncio.start_unix_server(tell, sock=listener)

    def stop(self) -> None:
        """Tell nobody any more."""
        if self._server is not None:
            self._server.close()

    async def texts(self) -> dict[str, str]:
        """What each of the others counts, in Prometheus's text format; one that says nothing is left out."""
        others = {str(n): door for n, (door, _) in enumerate(self._doors) if n != self.number}
        said = await asyncio.gather(*map(_ask, others.values()))
        return {number: text for number, text in zip(others, said, strict=True) if text}


async def _ask(door: Door) -> str:
    try:
        async with asyncio.timeout(SOON_SECONDS):
            reader, writer = await door.enter()
            with closing(writer):
                return (await reader.read()).decode()
    except (OSError, TimeoutError):  # it ended: another is started
        return ""
