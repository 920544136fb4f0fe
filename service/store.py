"""Latents kept by id: in the process by default, in Redis for several replicas.

An id is the digest of the message, so storing a latent twice keeps one copy and two replicas agree.
"""

import hashlib
import time
from collections import OrderedDict
from typing import Protocol, cast

import redis.asyncio
from redis.exceptions import RedisError

from bridge.errors import StoreUnavailable, UnknownBridge

PREFIX = "latentwire:latent:"
REDIS_TIMEOUT_SECONDS = 2.0


class LatentStore(Protocol):
    """Keeps messages for a while."""

    async def put(self, message: bytes) -> str:
        """Keep a message and return its id."""

    async def get(self, latent_id: str) -> bytes:
        """The message of an id (UnknownBridge when it is gone)."""

    async def close(self) -> None:
        """Let go of connections."""


def latent_id(message: bytes) -> str:
    """Content address of a message."""
    return "lat_" + hashlib.sha256(message).hexdigest()[:32]


class MemoryStore:
    """Least recently used messages go first when ``max_bytes`` is reached; all go after ``ttl_seconds``."""

    def __init__(self, *, max_bytes: int, ttl_seconds: float) -> None:
        self._max_bytes, self._ttl_seconds = max_bytes, ttl_seconds
        self._held: OrderedDict[str, tuple[bytes, float]] = OrderedDict()
        self._bytes = 0

    async def put(self, message: bytes) -> str:
        """Keep a message and return its id."""
        if len(message) > self._max_bytes:
            raise StoreUnavailable(f"the latent has {len(message)} bytes; the store holds {self._max_bytes}")
        key = latent_id(message)
        self._forget(key)
        self._held[key] = (message, time.monotonic() + self._ttl_seconds)
        self._bytes += len(message)
        while self._bytes > self._max_bytes:
            self._forget(next(iter(self._held)))
        return key

    async def get(self, latent_id: str) -> bytes:
        """The message of an id (UnknownBridge when it is gone)."""
        message, expires = self._held.get(latent_id, (b"", 0.0))
        if expires < time.monotonic():
            self._forget(latent_id)
            raise _gone(latent_id)
        self._held.move_to_end(latent_id)
        return message

    async def close(self) -> None:
        """Nothing to let go of."""

    def _forget(self, key: str) -> None:
        self._bytes -= len(self._held.pop(key, (b"", 0.0))[0])


class RedisStore:
    """The same in Redis, so that any replica can answer from a latent another one stored."""

    def __init__(self, url: str, *, ttl_seconds: float) -> None:
        self._ttl_ms = max(1, int(ttl_seconds * 1000))
        self._redis = redis.asyncio.Redis.from_url(
            url, socket_timeout=REDIS_TIMEOUT_SECONDS, socket_connect_timeout=REDIS_TIMEOUT_SECONDS
        )

    async def put(self, message: bytes) -> str:
        """Keep a message and return its id."""
        key = latent_id(message)
        try:
            await self._redis.set(PREFIX + key, message, px=self._ttl_ms)
        except (RedisError, OSError) as error:
            raise StoreUnavailable(f"the latent could not be stored: Redis said {type(error).__name__}") from error
        return key

    async def get(self, latent_id: str) -> bytes:
        """The message of an id (UnknownBridge when it is gone)."""
        try:
            message = cast(bytes | None, await self._redis.get(PREFIX + latent_id))
        except UnicodeEncodeError:
            raise _gone(latent_id) from None
        except (RedisError, OSError) as error:
            raise StoreUnavailable(f"the latent could not be read: Redis said {type(error).__name__}") from error
        if message is None:
            raise _gone(latent_id)
        return message

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.aclose()


def _gone(latent_id: str) -> UnknownBridge:
    return UnknownBridge(f"no latent is stored under {latent_id!r}; it may have expired", param="latent_id")
