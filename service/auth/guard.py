"""Who may do what, and how often. What is not listed in ``ACCESS`` is closed as soon as there are keys."""

import ipaddress
from collections.abc import Awaitable, Callable
from typing import Literal

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from latentwire.bridge.errors import Forbidden, InvalidRequest, LatentWireError, Unauthenticated, shorten
from latentwire.service.auth import keys
from latentwire.service.auth.keys import SCOPES, Caller, Keys
from latentwire.service.auth.limits import Limiter
from latentwire.service.auth.pages import Pages
from latentwire.service.store.redis import one_request

Access = keys.Scope | Literal["open", "any key"]
ACCESS: dict[str, Access] = {  # a path, or with /* all paths below it; a path that is not here is closed
    "/": "open",  # the page holds no secret and asks for the key itself
    "/page/*": "open",
    "/docs": "open",
    "/docs/*": "open",
    "/redoc": "open",
    "/static-offline-docs/*": "open",
    "/openapi.json": "open",
    "/health/live": "open",  # probes of a cluster send no key, and learn no more than up or down
    "/health/ready": "open",
    "/metrics": "any key",  # also one without scopes: Prometheus should hold a key that can do nothing else
    "/encode": "infer",
    "/generate": "infer",
    "/latents": "infer",
    "/latents/*": "infer",
    "/score": "infer",
    "/read": "infer",
    "/bridges": "infer",
    "/bridges/*": "infer",
    "/v1/*": "infer",
    "/evaluations": "evaluate",
    "/evaluations/*": "evaluate",
    "/admin/*": "admin",
}
ANYONE = Caller("", SCOPES)
NOBODY = Caller("", frozenset())


def access_of(path: str) -> Access | None:
    """Who may use a path; None when it is in no entry of ``ACCESS``."""
    for entry, access in ACCESS.items():
        if path == entry or (entry.endswith("/*") and path.startswith(entry[:-1])):
            return access
    return None


class Guard:
    """Checks every request before its route: origin, key, scope, room, and the limits of its tenant.

    All operations of the request on Redis share the time limit of ``one_request``.

    Plain ASGI: a dependency of FastAPI would run after the body was read, and only for routes that name it; and what a
    full service spends on callers it refuses is taken from those it answers. A request that passes has its ``Caller``
    in ``request.state.caller``.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        pages: Pages,
        keys: Keys,
        limiter: Limiter,
        check_room: Callable[[], None],
        error_response: Callable[[Request, Exception], Awaitable[Response]],
    ) -> None:
        """``error_response`` makes the response to an error; ``check_room`` raises one while no work is accepted."""
        self.app, self.keys, self.limiter = app, keys, limiter
        self.pages, self.check_room, self.error_response = pages, check_room, error_response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        with one_request():
            try:
                caller = await self._admit(scope)
            except LatentWireError as error:
                await self._refuse(error, scope, receive, send)
                return
            scope.setdefault("state", {})["caller"] = caller
            await self.app(scope, receive, send)

    async def _admit(self, scope: Scope) -> Caller:
        self.pages.check(scope)
        access, is_work = access_of(scope["path"]), scope.get("method") == "POST"
        caller = self._allowed(scope, access) if self.keys else ANYONE
        if access == "infer" and is_work:
            self.check_room()
        await self.limiter.admit(caller.name, work=is_work)
        return caller

    def _allowed(self, scope: Scope, access: Access | None) -> Caller:
        if access == "open" and scope["type"] == "http":
            return NOBODY
        caller = self._caller(scope)
        where = f"{scope.get('method', scope['type'])} {shorten(scope['path'], 80)}"
        if access is None:
            raise Forbidden(f"{where} is open to no key; there are {', '.join(ACCESS)}")
        if access != "any key" and access not in caller.scopes:
            has = ", ".join(sorted(caller.scopes)) or "none"
            raise Forbidden(f"{where} needs the scope {access}; key {caller.name!r} has {has}")
        return caller

    def _caller(self, scope: Scope) -> Caller:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if not given:
            raise Unauthenticated("the request bears no key; expected the header Authorization: Bearer KEY")
        scheme, _, key = given[0].partition(b" ")
        if len(given) > 1 or scheme.lower() != b"bearer":
            raise Unauthenticated("the Authorization header is not one of the form: Bearer KEY")
        caller = self.keys.find(key.strip())
        if caller is None:
            raise Unauthenticated("the key is not known to this service")
        return caller

    async def _refuse(self, error: LatentWireError, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            response = await self.error_response(Request(scope), error)
            await response(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})


def check_binding(host: str, *, has_keys: bool, insecure: bool) -> None:
    """Refuse to listen where others reach the service while it asks nobody for a key.

    Raises:
        InvalidRequest: An address beyond this machine, no keys, and no ``--insecure``.
    """
    if not (has_keys or insecure or _is_loopback(host)):
        raise InvalidRequest(
            f"--host {host!r} is reached from other machines, and there are no keys; "
            "set LW_API_KEYS_FILE, listen on 127.0.0.1, or say --insecure",
            param="host",
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.startswith("unix:"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:  # another name; where it leads may change
        return False
