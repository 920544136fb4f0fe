"""Ports for services that tests start."""

import itertools
import os
import socket

FIRST, LAST = 10_000, 32_000  # below those that the kernel hands out to connections
_tried = itertools.count(os.getpid() * 97)  # each process of a suite begins elsewhere


def free_port() -> int:
    """A port of this machine that nobody has, and that nobody is given by chance before it is used."""
    while True:
        port = FIRST + next(_tried) % (LAST - FIRST)
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return port
