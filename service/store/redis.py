"""The store in Redis, which replicas share.

Promises, each with a test:

- A request waits for Redis for ``WAIT_SECONDS`` at most, however many operations it makes, in whatever state Redis is.
- A Redis that failed is not called for ``REST_SECONDS``; then one caller tries it. It is used again by itself.
- A connection whose response nobody waited for is never used again: the next response would be to the last command.
"""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as NotConnected
from redis.exceptions import RedisError, ResponseError

from latentwire.bridge.errors import StoreUnavailable, first_line
from latentwire.service.store.base import Kind, Store

Result = TypeVar("Result")

PREFIX = "latentwire"
WAIT_SECONDS = 0.05
REST_SECONDS = 1.0
ENOUGH_SECONDS = WAIT_SECONDS / 2  # without an answer, to say that Redis is away; a request may have had less left
MAX_CONNECTIONS = 16  # opening one takes the event loop longer than waiting for one
FAILURES = (RedisError, OSError)
CONNECTION = {
    # RESP 3 brings maintenance notifications, under which the pool no longer checks that an idle connection is open
    # and has nothing left to read.
    "protocol": 2,
    "decode_responses": False,
    "driver_info": None,  # telling it would be one more round trip within the bound
    # The store has one bound of its own. redis-py's would add up over connecting, writing and reading.
    "socket_timeout": None,
    "socket_connect_timeout": None,
    "retry": Retry(NoBackoff(), 1),  # once: a connection that the server closed while it was idle
}

log = logging.getLogger(__name__)


@dataclass
class _Budget:
    left_seconds: float


_of_request: ContextVar[_Budget | None] = ContextVar("_of_request", default=None)


@contextmanager
def one_request() -> Iterator[None]:
    """Inside, and in tasks begun inside, all operations together wait ``WAIT_SECONDS``; elsewhere each one does."""
    token = _of_request.set(_Budget(WAIT_SECONDS))
    try:
        yield
    finally:
        _of_request.reset(token)


class Circuit:
    """A circuit breaker: open for ``REST_SECONDS`` after a failure; then one caller tries, and success closes it.

    Without it a dead Redis would cost every request the whole of ``WAIT_SECONDS``. ``does`` is the verb of its log.
    """

    def __init__(self, does: str) -> None:
        self.available, self.failures = True, 0
        self._does = does
        self._probing = False
        self._failed_at = self._retry_at = -math.inf

    @contextmanager
    def guard(self, failures: tuple[type[Exception], ...]) -> Iterator[bool]:
        """Guard one operation; yields whether it is the one that tries an open circuit.

        An exception that is not in ``failures`` changes nothing: a caller who disconnects says nothing about Redis.

        Raises:
            StoreUnavailable: The operation failed, or the circuit is open and it was not tried.
        """
        now, probing = time.monotonic(), not self.available
        if probing and (self._probing or now < self._retry_at):
            self.failures += 1
            raise StoreUnavailable(f"Redis failed {now - self._failed_at:.1f} s ago and is not asked at the moment")
        self._probing = self._probing or probing
        try:
            yield probing
            self._close()
        except failures as error:
            self._open(error)
            raise StoreUnavailable(f"Redis no longer {self._does}: {_reason(error)}") from error
        finally:
            self._probing = self._probing and not probing

    def _open(self, error: Exception) -> None:
        self.failures += 1
        now = time.monotonic()
        self._retry_at = now + REST_SECONDS
        if self.available:
            self.available, self._failed_at = False, now
            log.warning(
                "Redis no longer %s (%s); it is tried again every %g s", self._does, _detail(error), REST_SECONDS
            )

    def _close(self) -> None:
        if not self.available:
            self.available = True
            log.warning("Redis %s again, after %.1f s", self._does, time.monotonic() - self._failed_at)


def _reason(error: Exception) -> str:
    # Callers get no more than this: redis-py's messages hold the address of Redis, or a part of what it was sent.
    return f"no answer within {WAIT_SECONDS * 1000:.0f} ms" if type(error) is TimeoutError else type(error).__name__


def _detail(error: Exception) -> str:
    # For the operator: also the address that could not be reached, but nothing of what was sent.
    return f"{_reason(error)}: {first_line(error)}" if isinstance(error, NotConnected) else _reason(error)


class RedisStore(Store):
    """The store in Redis. A full Redis can still be read, so writing has a circuit breaker of its own."""

    def __init__(self, url: str) -> None:
        self.pool = ConnectionPool.from_url(url, **CONNECTION)
        self.pool.connection_kwargs.update(CONNECTION)  # from_url lets the URL's query win
        self._redis = Redis(connection_pool=self.pool)
        self._reads, self._writes = Circuit("answers"), Circuit("takes values")
        self._slots = asyncio.Semaphore(MAX_CONNECTIONS)
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def available(self) -> bool:
        """Whether the last operation and the last write succeeded."""
        return self._reads.available and self._writes.available

    @property
    def failures(self) -> int:
        """Operations that could not be done since the start, those not tried included."""
        return self._reads.failures + self._writes.failures

    async def put_many(self, kind: Kind, values: Mapping[str, bytes], *, ttl_seconds: float | None = None) -> None:
        """Keep all of these or none (StoreUnavailable)."""
        ttl_ms = None if ttl_seconds is None else max(1, int(ttl_seconds * 1000))

        async def put(redis: Redis) -> None:
            async with redis.pipeline(transaction=True) as pipe:
                for key, value in values.items():
                    pipe.set(_redis_key(kind, key), value, px=ttl_ms)
                await pipe.execute()

        await self.write(put)

    async def get_many(self, kind: Kind, keys: Sequence[str]) -> list[bytes | None]:
        """The values of keys in order, None where there is none (StoreUnavailable)."""

        async def get(redis: Redis) -> list[bytes | None]:
            return cast(list[bytes | None], await redis.mget([_redis_key(kind, key) for key in keys]))

        return await self.run(get) if keys else []

    async def delete(self, kind: Kind, key: str) -> None:
        """Keep a value no longer (StoreUnavailable)."""
        await self.write(lambda redis: redis.delete(_redis_key(kind, key)))

    async def close(self) -> None:
        """Close the connections."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with suppress(*FAILURES):  # a server that is away is not told
            async with asyncio.timeout(WAIT_SECONDS):
                await self.pool.aclose()

    async def write(self, work: Callable[[Redis], Awaitable[Result]]) -> Result:
        """``run``, where ``work`` writes values (StoreUnavailable also where Redis refuses them)."""

        async def attempt(redis: Redis) -> Result | ResponseError:
            try:
                return await work(redis)
            except ResponseError as refusal:  # full, read-only, unable to save: a response all the same
                return refusal

        with self._writes.guard((ResponseError,)):
            result = await self.run(attempt)
            if isinstance(result, ResponseError):
                raise result
            return result

    async def run(self, work: Callable[[Redis], Awaitable[Result]]) -> Result:
        """Run an operation with a connection, within the time limit and behind the circuit breaker.

        Raises:
            StoreUnavailable: No response in time, an error, or the circuit is open.
        """
        began_at = math.inf

        async def with_connection(probing: bool) -> Result:
            nonlocal began_at
            async with self._slots:
                began_at = time.monotonic()
                if probing:  # something small first: a value that is never read would stay, with its socket
                    await self._redis.ping()
                return await work(self._redis)

        with self._reads.guard(FAILURES) as probing:
            try:
                return await self._bounded(partial(with_connection, probing))
            except TimeoutError:
                if time.monotonic() - began_at >= ENOUGH_SECONDS:
                    raise
                self._reads.failures += 1
                raise StoreUnavailable(f"the request waited for Redis for {WAIT_SECONDS * 1000:.0f} ms") from None

    async def _bounded(self, operation: Callable[[], Coroutine[None, None, Result]]) -> Result:
        """The result of an operation, within the time that the request has left (TimeoutError).

        ``asyncio.wait``, not ``timeout``: it returns on time however long cancelling takes, and takes a result that had
        arrived where the loop itself was late.
        """
        budget = _of_request.get() or _Budget(WAIT_SECONDS)
        if budget.left_seconds <= 0:
            raise TimeoutError
        started = time.monotonic()
        task = asyncio.create_task(operation())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            await asyncio.wait({task}, timeout=budget.left_seconds)
            if task.done():
                return task.result()
            raise TimeoutError
        finally:
            task.cancel()
            budget.left_seconds -= time.monotonic() - started


def _redis_key(kind: Kind, key: str) -> bytes:
    return f"{PREFIX}:{kind}:{key}".encode("utf-8", "surrogatepass")
