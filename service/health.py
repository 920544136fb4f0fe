"""``python -m latentwire.service.health [ready]``: whether the service in this container is live, or ready.

Exit code 0 is yes.

Flags and variables can say where a service listens, and a probe sees neither. So the service writes it down.
The standard library alone: this runs every few seconds beside a model.
"""

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from ipaddress import ip_address
from pathlib import Path
from socket import socket

SHARED_MEMORY = Path("/dev/shm")  # can be written where the root is read-only and nothing is mounted at /tmp
TIMEOUT_SECONDS = 8.0
log = logging.getLogger(__name__)


@contextmanager
def written_down(listener: socket) -> Iterator[None]:
    """Let probes find the service while it listens: until this process leaves the block, whoever it has forked."""
    host, port = listener.getsockname()[:2]
    file, owner = _write(json.dumps([_reached(host), port])), os.getpid()
    if file is None:
        log.warning("no temporary folder can be written: latentwire.service.health will not find this service")
    try:
        yield
    finally:
        if file is not None and os.getpid() == owner:
            file.unlink(missing_ok=True)


def main() -> None:
    """Ask, and say why not."""
    question = sys.argv[1] if len(sys.argv) > 1 else "live"
    try:
        host, port = _read()
        connection = HTTPConnection(host, port, timeout=TIMEOUT_SECONDS)  # past any proxy
        connection.request("GET", f"/health/{question}")
        answer = connection.getresponse()
        text = answer.read().decode(errors="replace")
    except (OSError, HTTPException) as error:
        sys.exit(f"the service does not answer: {error}")
    print(text)
    sys.exit(answer.status != 200)


def _files() -> list[Path]:
    folders = (Path(os.environ.get("TMPDIR", "/tmp")), SHARED_MEMORY)
    return [folder / f"latentwire-{os.getuid()}.address" for folder in folders]


def _write(line: str) -> Path | None:
    for file in _files():
        with suppress(OSError):
            file.unlink(missing_ok=True)  # never through a link that somebody else laid
            with file.open("x") as opened:
                opened.write(line)
            return file
    return None


def _read() -> tuple[str, int]:
    for file in _files():
        if file.exists():
            host, port = json.loads(file.read_text())
            return host, port
    raise FileNotFoundError("none has said where it listens")


def _reached(host: str) -> str:
    """An address that leads to a listener at ``host``. That can stand for all; those of IPv6 take IPv4 too."""
    return "127.0.0.1" if ip_address(host).is_unspecified else host


if __name__ == "__main__":
    main()
