"""Which web pages may call. A browser sends what any page asks it to send, also to a service on its own machine.

A page whose name was made to lead here (DNS rebinding) could read what this service answers, and one that keeps its own
name could have it do things without reading. Neither has a key, so both are kept from a service that asks for none.
"""

import ipaddress
import socket
from contextlib import suppress
from urllib.parse import urlsplit

from starlette.types import Scope

from latentwire.bridge.errors import Forbidden, shorten
from latentwire.service.settings import Settings

READING = {"GET", "HEAD", "OPTIONS"}  # do nothing, and a foreign page cannot see the answer
OWN = {b"same-origin", b"none"}  # what a browser says of this service's own page, and of its user


class Pages:
    """Tells this service's own page, and those of allowed origins, from all others; what is no browser passes.

    A service is called by an address, which no page can make lead elsewhere; as ``localhost``; by the name it listens
    on or the machine's; or by one of ``allowed_hosts``. Where keys are asked for and no hosts are listed, any name is
    as good: a page has no key.
    """

    def __init__(self, settings: Settings, *, has_keys: bool) -> None:
        listed = settings.allowed_hosts
        self._any_host = "*" in listed or (has_keys and not listed)
        self._any_page = has_keys or "*" in settings.cors_origins
        self._hosts = {"localhost", settings.host.lower(), socket.gethostname().lower(), *listed}
        self._domains = (".localhost", *(host[1:] for host in listed if host.startswith("*.")))
        self._origins = {origin.encode() for origin in settings.cors_origins}

    def check(self, scope: Scope) -> None:
        """Refuse what came by a foreign name, or from a foreign page (Forbidden)."""
        headers = dict(scope["headers"])
        host = headers.get(b"host")
        if host is not None and not (self._any_host or self._is_ours(_name(host))):
            shown = shorten(host.decode("latin-1"), 80)
            raise Forbidden(f"the Host {shown!r} is no name of this service; LW_ALLOWED_HOSTS can add it", param="host")
        if scope.get("method") not in READING and not (self._any_page or self._may_act(headers)):
            shown = shorten(headers.get(b"origin", b"another").decode("latin-1"), 80)
            raise Forbidden(f"a page of {shown} asks; LW_CORS_ORIGINS can allow its origin", param="origin")

    def _is_ours(self, name: str) -> bool:
        with suppress(ValueError):
            return bool(ipaddress.ip_address(name))
        return name in self._hosts or name.endswith(self._domains)

    def _may_act(self, headers: dict[bytes, bytes]) -> bool:
        """As Go's ``http.CrossOriginProtection``: older browsers send the origin alone, and no other program either."""
        origin, site = headers.get(b"origin"), headers.get(b"sec-fetch-site")
        if origin in self._origins:
            return True
        if site is not None:
            return site in OWN
        return origin is None or origin.partition(b"://")[2] == headers.get(b"host")


def _name(host: bytes) -> str:
    """The name in a Host header, without the port; empty where there is none."""
    with suppress(ValueError):
        return (urlsplit(f"//{host.decode('latin-1')}").hostname or "").removesuffix(".")
    return ""
