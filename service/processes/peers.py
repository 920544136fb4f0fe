"""The processes that answer HTTP, to one another: what they count together, and what each counts."""

import asyncio
import mmap
import socket
import time
from collections.abc import Callable
from contextlib import closing, suppress

from latentwire.service.inference.parts import Sum
from latentwire.service.processes.door import LENGTH_BYTES, Door, is_known

SOON_SECONDS = 2.0  # within which one that does not hang says what it counts
BEAT_SECONDS = 0.5  # between signs of life
LATE_SECONDS = 2.0  # after which one without any may hang, not before


class Peers:
    """One of several processes that answer HTTP, and the others; made before they fork.

    Attributes:
        count: How many there are.
        number: Which of them this is.
    """

    def __init__(self, count: int = 1) -> None:
        self.count, self.number = count, 0
        parts = memoryview(mmap.mmap(-1, 3 * 8 * count)).cast("q")
        self._parts = parts[:count], parts[count : 2 * count], parts[2 * count :]
        self._beats = self._parts[2]  # milliseconds of the machine's clock; below 0 while it starts, 0 of nobody
        doors = [Door.opened() for _ in range(count if count > 1 else 0)]
        self._doors: list[tuple[Door, socket.socket]] = doors
        self._server: asyncio.Server | None = None
        self._beating: asyncio.Task[None] | None = None

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

    def expect(self, number: int) -> None:
        """One of them is started again."""
        self._beats[number] = -_now()

    def hanging(self, seconds: float) -> list[int]:
        """Those that have given no sign of life for so long: what they have admitted takes room from the others."""
        since = _now() - max(seconds, LATE_SECONDS) * 1000
        others = [(number, abs(beat)) for number, beat in enumerate(self._beats) if beat and number != self.number]
        return [number for number, beat in others if beat < since]

    async def start(self, text: Callable[[], bytes]) -> None:
        """Tell the others what this one counts, whenever they ask, and that it moves."""
        if not self._doors:
            return
        door, listener = self._doors[self.number]

        async def tell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with closing(writer), suppress(asyncio.IncompleteReadError, ConnectionError):
                if await is_known(reader, door.secret):
                    said = text()
                    writer.write(len(said).to_bytes(LENGTH_BYTES, "big") + said)
                    await writer.drain()

        async def beat() -> None:
            while True:
                self._beats[self.number] = _now()
                await asyncio.sleep(BEAT_SECONDS)

        self._server = await asyncio.start_unix_server(tell, sock=listener)
        self._beating = asyncio.create_task(beat())

    def stop(self) -> None:
        """Tell nobody any more."""
        if self._server is not None and self._beating is not None:
            self._server.close()
            self._beating.cancel()
            self._beats[self.number] = 0

    async def texts(self) -> dict[str, str]:
        """What each of the others counts, in Prometheus's text format; one that says nothing is left out."""
        others = {str(n): door for n, (door, _) in enumerate(self._doors) if n != self.number and self._beats[n] > 0}
        said = await asyncio.gather(*map(_ask, others.values()))
        return {number: text for number, text in zip(others, said, strict=True) if text}


async def _ask(door: Door) -> str:
    try:
        async with asyncio.timeout(SOON_SECONDS):
            reader, writer = await door.enter()
            with closing(writer):
                length = int.from_bytes(await reader.readexactly(LENGTH_BYTES), "big")
                return (await reader.readexactly(length)).decode()
    except (OSError, EOFError, TimeoutError):  # it ended: another is started
        return ""


def _now() -> int:
    return int(time.monotonic() * 1000)
