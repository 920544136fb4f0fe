"""Who may do what, and how often. What is not listed in ``ACCESS`` is closed as soon as there are keys."""

import ipaddress
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Literal, TypeVar

from limits import RateLimitItem, RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.strategies import FixedWindowRateLimiter
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from latentwire.bridge.errors import (
    Forbidden,
    InvalidRequest,
    LatentWireError,
    RateLimited,
    StoreUnavailable,
    Unauthenticated,
    shorten,
)
from latentwire.service import keys
from latentwire.service.keys import SCOPES, Caller, Entry, Keys
from latentwire.service.pages import Pages
from latentwire.service.redis_store import RedisStore, one_request

Answer = TypeVar("Answer")

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
    """Before every route: from where and who calls, whether they may, whether there is room, whether not too often.

    Around it and the route is what ``one_request`` may wait for Redis.

    Plain ASGI, because a dependency of FastAPI runs after the body was read, and only for routes that remembered it;
    and what a full service spends on callers it refuses is taken from those it answers. A request that passes has its
    ``Caller`` in ``request.state.caller``.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        pages: Pages,
        keys: Keys,
        limiter: "Limiter",
        check_room: Callable[[], None],
        answer: Callable[[Request, Exception], Awaitable[Response]],
    ) -> None:
        """``answer`` makes the response to an error; ``check_room`` raises one where no work is taken now."""
        self.app, self.keys, self.limiter, self.answer = app, keys, limiter, answer
        self.pages, self.check_room = pages, check_room

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
            response = await self.answer(Request(scope), error)
            await response(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})


class Limiter:
    """Requests and tokens per minute of each tenant, counted in this process and, where there is one, in Redis.

    Windows are fixed: one opens with a tenant's first request and ends a minute later. Tokens are known only after the
    work, so a count can pass its limit, and only a fixed window keeps such a count instead of refusing it. The price:
    across the border of two windows a tenant can use twice its limit within a minute.
    """

    def __init__(self, keys: Keys, redis: RedisStore | None = None) -> None:
        self._items = {entry.name: _items(entry) for entry in keys.entries}
        self._local = FixedWindowRateLimiter(MemoryStorage())
        self._redis = redis
        self._shared = None if redis is None else _in_redis(redis)

    async def admit(self, tenant: str, *, work: bool) -> None:
        """Count a request; with ``work``, refuse it also while the tokens of this minute are used up.

        Requests let in side by side may together pass the token limit: what each costs is charged when it is known.

        Raises:
            RateLimited: The limit, and when there is room again.
        """
        costs = {"requests": 1, "tokens": 0} if work else {"requests": 1}
        items = self._items.get(tenant, {})
        asked = {items[kind]: cost for kind, cost in costs.items() if kind in items}
        over = await self._ask(lambda window: _over(window, tenant, asked)) if asked else None
        if over is not None:
            item, seconds = over
            used = f"key {tenant!r} has used its {item.amount} {item.namespace} of this minute"
            raise RateLimited(f"{used}; there are more in {math.ceil(seconds)} s", retry_after_seconds=seconds)

    async def charge(self, tenant: str, tokens: int) -> None:
        """Count the tokens that a request has cost; never refuses."""
        item = self._items.get(tenant, {}).get("tokens")
        if item is not None and tokens > 0:
            await self._ask(lambda window: window.hit(item, tenant, cost=tokens))

    async def _ask(self, question: Callable[[FixedWindowRateLimiter], Awaitable[Answer]]) -> Answer:
        """The answer of Redis, or where it gives none that of this process.

        This process counts in any case, so that a Redis that goes away hands nobody a fresh minute.
        """
        here = await question(self._local)
        if self._redis is None or self._shared is None:
            return here
        shared = self._shared
        try:
            return await self._redis.write(lambda _: question(shared))
        except StoreUnavailable:
            return here


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


def _items(entry: Entry) -> dict[str, RateLimitItem]:
    limits = {"requests": entry.requests_per_minute, "tokens": entry.tokens_per_minute}
    return {kind: RateLimitItemPerMinute(n, namespace=kind) for kind, n in limits.items() if n is not None}


def _in_redis(redis: RedisStore) -> FixedWindowRateLimiter:
    # The pool knows the address; the library's own address parser takes no unix:// and retries behind our back.
    storage = RedisStorage(
        "redis://",
        implementation="redispy",
        key_prefix="latentwire:limits",
        connection_pool=redis.pool,  # type: ignore[arg-type]
    )
    return FixedWindowRateLimiter(storage)


async def _over(
    window: FixedWindowRateLimiter, tenant: str, asked: Mapping[RateLimitItem, int]
) -> tuple[RateLimitItem, float] | None:
    """Count each cost, 0 only looks; the first limit that has no room, and the seconds until it has."""
    for item, cost in asked.items():
        if not await (window.hit(item, tenant, cost=cost) if cost else window.test(item, tenant)):
            resets, _ = await window.get_window_stats(item, tenant)
            return item, max(0.0, resets - time.time()) + 0.5  # Redis rounds to whole seconds
    return None
