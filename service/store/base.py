"""What the service keeps: latents by id, encodings it need not make again, the state of jobs.

``store.memory`` keeps them in the process, ``store.disk`` on this machine, ``store.redis`` for several replicas, and
``store.folder`` jobs in files.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

from latentwire.bridge.errors import InvalidRequest

Kind = Literal["latent", "encode", "job"]


class Store(Protocol):
    """Bytes under a kind and a key, for a while."""

    @property
    def available(self) -> bool:
        """Whether the last operations could be done."""

    @property
    def failures(self) -> int:
        """Operations that could not be done since the start, those not tried included."""

    async def put_many(self, kind: Kind, values: Mapping[str, bytes], *, ttl_seconds: float | None = None) -> None:
        """Keep all of these or none, in one round trip.

        Raises:
            StoreUnavailable: Nothing was kept: the store is away, or has no room for all of them.
        """

    async def get_many(self, kind: Kind, keys: Sequence[str]) -> list[bytes | None]:
        """The values of keys in order, None where there is none (StoreUnavailable when the store is away)."""

    async def delete(self, kind: Kind, key: str) -> None:
        """Keep a value no longer; nothing happens where there is none (StoreUnavailable)."""

    async def close(self) -> None:
        """Let go of connections."""

    async def page(self, kind: Kind, prefix: str, after: str, limit: int, head_bytes: int) -> list[tuple[str, bytes]]:
        """The first ``limit`` keys that have a prefix and sort after ``after``, with the start of each value.

        Raises:
            InvalidRequest: The store does not list what it keeps.
            StoreUnavailable: It is away.
        """
        raise InvalidRequest("the store of this service gives latents by id and does not list them")

    async def put(self, kind: Kind, key: str, value: bytes, *, ttl_seconds: float | None = None) -> None:
        """Keep a value, until evicted where ``ttl_seconds`` is None (StoreUnavailable as ``put_many``)."""
        await self.put_many(kind, {key: value}, ttl_seconds=ttl_seconds)

    async def get(self, kind: Kind, key: str) -> bytes | None:
        """The value of a key, None where there is none (StoreUnavailable when the store is away)."""
        return (await self.get_many(kind, [key]))[0]
