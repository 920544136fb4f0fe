"""Unix sockets between the processes of a service, and what is said at them first."""

import asyncio
import hmac
import os
import socket
from typing import NamedTuple

SECRET_BYTES = 16
LENGTH_BYTES = 8  # before what is said, for whoever it is cut off from to notice


class Door(NamedTuple):
    """Where a process listens, and what a caller says first: the address itself is no secret, has no owner, no mode."""

    address: str
    secret: bytes

    @classmethod
    def opened(cls) -> tuple["Door", socket.socket]:
        """A new one, and the socket that listens there."""
        door = cls(f"\0latentwire-{os.getpid()}-{os.urandom(8).hex()}", os.urandom(SECRET_BYTES))
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(door.address)
        listener.listen()
        return door, listener

    async def enter(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection (OSError where nobody listens)."""
        end = socket.socket(socket.AF_UNIX)  # connected here: uvloop cannot read an abstract address
        end.setblocking(False)
        try:
            end.connect(self.address)
            reader, writer = await asyncio.open_unix_connection(sock=end)
        except OSError:
            end.close()
            raise
        writer.write(self.secret)
        return reader, writer


async def is_known(reader: asyncio.StreamReader, secret: bytes) -> bool:
    """Whether who has come says the secret (IncompleteReadError where they leave instead)."""
    return hmac.compare_digest(await reader.readexactly(SECRET_BYTES), secret)
