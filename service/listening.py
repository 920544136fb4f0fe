"""Where the service listens: at every address of its host, on one port."""

import errno
import os
import socket
from collections.abc import Mapping
from contextlib import ExitStack

from latentwire.bridge.errors import InvalidRequest

NOT_HERE = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}  # a name can have addresses of a family that this machine lacks
TAKEN = {errno.EADDRINUSE, errno.EACCES}
TRIES = 16  # for a port that is free at every address


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
