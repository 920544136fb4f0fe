"""How often a tenant may call, and how many tokens it may use: per minute."""

import math
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

from limits import RateLimitItem, RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.strategies import FixedWindowRateLimiter

from latentwire.bridge.errors import RateLimited, StoreUnavailable
from latentwire.service.auth.keys import Entry, Keys
from latentwire.service.store.redis import RedisStore

Result = TypeVar("Result")


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

    @property
    def limited(self) -> list[str]:
        """Tenants that have limits."""
        return [name for name, items in self._items.items() if items]

    async def admit(self, tenant: str, *, work: bool) -> None:
        """Count a request; with ``work``, refuse it also while the tokens of this minute are used up.

        Requests let in side by side may together pass the token limit: what each costs is charged when it is known.

        Raises:
            RateLimited: The limit, and when there is room again.
        """
        costs = {"requests": 1, "tokens": 0} if work else {"requests": 1}
        items = self._items.get(tenant, {})
        limited = {items[kind]: cost for kind, cost in costs.items() if kind in items}
        over = await self._count(lambda window: _over(window, tenant, limited)) if limited else None
        if over is not None:
            item, seconds = over
            used = f"key {tenant!r} has used its {item.amount} {item.namespace} of this minute"
            raise RateLimited(f"{used}; there are more in {math.ceil(seconds)} s", retry_after_seconds=seconds)

    async def charge(self, tenant: str, tokens: int) -> None:
        """Count the tokens that a request has cost; never refuses."""
        item = self._items.get(tenant, {}).get("tokens")
        if item is not None and tokens > 0:
            await self._count(lambda window: window.hit(item, tenant, cost=tokens))

    async def _count(self, operation: Callable[[FixedWindowRateLimiter], Awaitable[Result]]) -> Result:
        """The result in Redis, or where it is unavailable that of this process.

        This process always counts too, so that nobody gets a fresh minute when Redis goes away.
        """
        local = await operation(self._local)
        if self._redis is None or self._shared is None:
            return local
        shared = self._shared
        try:
            return await self._redis.write(lambda _: operation(shared))
        except StoreUnavailable:
            return local


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
    window: FixedWindowRateLimiter, tenant: str, costs: Mapping[RateLimitItem, int]
) -> tuple[RateLimitItem, float] | None:
    """Count each cost, 0 only looks; the first limit that has no room, and the seconds until it has."""
    for item, cost in costs.items():
        if not await (window.hit(item, tenant, cost=cost) if cost else window.test(item, tenant)):
            resets, _ = await window.get_window_stats(item, tenant)
            return item, max(0.0, resets - time.time()) + 0.5  # Redis rounds to whole seconds
    return None
