"""What the service keeps: latents by id, encodings it need not make again, the state of jobs.

``MemoryStore`` keeps them in the process, ``service.redis_store`` for several replicas. Promises, each with a test:

- Nobody is answered with what was kept under another key or by another tenant.
- In the process nothing is pushed out by values of another kind, or by another row of the same request.
"""

import hashlib
import json
import math
import re
import struct
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from cachetools import TLRUCache

from latentwire.bridge.errors import StoreUnavailable, UnknownBridge, shorten

Kind = Literal["latent", "encode", "job"]

ENTRY_BYTES = 600  # what an entry costs in the process beside its value and key (measured; a test holds it)
KEYS_HELD = 3  # the table's own key, and as many again in the expiry heap before it is cleaned
ID = re.compile(r"lat_[0-9a-f]{32}")
DIGEST_BYTES = 16
SENT = struct.Struct("<I?")


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
        """Forget a value, if there is one (StoreUnavailable when the store is away)."""

    async def close(self) -> None:
        """Let go of connections."""

    async def put(self, kind: Kind, key: str, value: bytes, *, ttl_seconds: float | None = None) -> None:
        """Keep a value, until evicted where ``ttl_seconds`` is None (StoreUnavailable as ``put_many``)."""
        await self.put_many(kind, {key: value}, ttl_seconds=ttl_seconds)

    async def get(self, kind: Kind, key: str) -> bytes | None:
        """The value of a key, None where there is none (StoreUnavailable when the store is away)."""
        return (await self.get_many(kind, [key]))[0]


class _Entry(NamedTuple):
    value: bytes
    cost_bytes: int
    ttl_seconds: float


class MemoryStore(Store):
    """A budget for each kind, in bytes with keys and bookkeeping; the least recently used goes first.

    Kinds have their own budgets so that no flood of cached encodings costs anybody a latent or a job.
    """

    available: bool = True
    failures: int = 0

    def __init__(self, budgets: Mapping[Kind, int], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._shelves = {kind: _shelf(max_bytes, clock) for kind, max_bytes in budgets.items()}

    async def put_many(self, kind: Kind, values: Mapping[str, bytes], *, ttl_seconds: float | None = None) -> None:
        """Keep all of these or, before anything is pushed out for them, none (StoreUnavailable)."""
        shelf = self._shelves[kind]
        entries = {
            key: _Entry(value, _cost_bytes(key, value), math.inf if ttl_seconds is None else ttl_seconds)
            for key, value in values.items()
        }
        needed = sum(entry.cost_bytes for entry in entries.values())
        if needed > shelf.maxsize:
            self.failures += 1
            raise StoreUnavailable(
                f"{len(values)} values of kind {kind!r} take {needed} bytes; the store holds {shelf.maxsize:.0f}"
            )
        shelf.update(entries)

    async def get_many(self, kind: Kind, keys: Sequence[str]) -> list[bytes | None]:
        """The values of keys in order, None where there is none."""
        found = map(self._shelves[kind].get, keys)
        return [None if entry is None else entry.value for entry in found]

    async def delete(self, kind: Kind, key: str) -> None:
        """Forget a value, if there is one."""
        self._shelves[kind].pop(key, None)

    async def close(self) -> None:
        """Nothing to let go of."""


def _shelf(max_bytes: int, clock: Callable[[], float]) -> TLRUCache[str, _Entry, float]:
    return TLRUCache(max_bytes, lambda _, entry, now: now + entry.ttl_seconds, clock, lambda entry: entry.cost_bytes)


def _cost_bytes(key: str, value: bytes) -> int:
    return ENTRY_BYTES + KEYS_HELD * sys.getsizeof(key) + sys.getsizeof(value)


def latent_id(message: bytes, tenant: str = "") -> str:
    """The id of a message: its digest, salted by who stores it. Twice the same message is kept once."""
    return f"lat_{_digest(message, tenant)}"


async def keep_latents(
    store: Store, messages: Sequence[bytes], *, tenant: str = "", ttl_seconds: float | None = None
) -> list[str]:
    """Keep the messages of a request for later requests of the tenant, and return their ids.

    Raises:
        StoreUnavailable: None was kept.
    """
    ids = [latent_id(message, tenant) for message in messages]
    await store.put_many("latent", dict(zip(ids, messages, strict=True)), ttl_seconds=ttl_seconds)
    return ids


async def find_latents(store: Store, ids: Mapping[str, str], *, tenant: str = "") -> dict[str, bytes]:
    """The messages this tenant stored, by the fields of the request that hold their ids.

    What comes back must make the id it was asked for by: another tenant's latent makes another, and so does an altered
    one.

    Args:
        store: Where they were kept.
        ids: The id that each field of the request holds.
        tenant: Who asks.

    Raises:
        UnknownBridge: An id is not known, or not to this tenant. ``param`` names the field.
        StoreUnavailable: The store is away.
    """
    asked = {field: key for field, key in ids.items() if ID.fullmatch(key)}
    found = dict(zip(asked, await store.get_many("latent", list(asked.values())), strict=True))
    messages = {}
    for field, key in ids.items():
        message = found.get(field)
        if message is None or latent_id(message, tenant) != key:
            raise UnknownBridge(f"no latent is stored under {shorten(repr(key))}; it may have expired", param=field)
        messages[field] = message
    return messages


@dataclass(frozen=True, slots=True)
class Sent:
    """What a sender made of a text: the message, the text's length in sender tokens, whether it was cut."""

    message: bytes
    source_tokens: int
    truncated: bool


def encode_key(bridge_id: str, dtype: str, truncate: bool, text: str, tenant: str = "") -> str:
    """The key of an encoding: what determines it, and who asked, so that no tenant learns what another one sent."""
    return _digest(json.dumps([bridge_id, dtype, truncate, text]).encode(), tenant)


async def recall(store: Store, keys: Sequence[str]) -> list[Sent | None]:
    """Encodings made before, None where one must be made. A store that is away, or damaged, is one that has none."""
    try:
        found = await store.get_many("encode", keys)
    except StoreUnavailable:
        return [None] * len(keys)
    return [None if packed is None else _unpack(key, packed) for key, packed in zip(keys, found, strict=True)]


async def remember(store: Store, sent: Mapping[str, Sent], *, ttl_seconds: float | None = None) -> None:
    """Keep encodings by key for ``recall``, if the store can."""
    with suppress(StoreUnavailable):
        await store.put_many(
            "encode", {key: _pack(key, encoding) for key, encoding in sent.items()}, ttl_seconds=ttl_seconds
        )


def _pack(key: str, sent: Sent) -> bytes:
    packed = SENT.pack(sent.source_tokens, sent.truncated) + sent.message
    return bytes.fromhex(_digest(packed, key)) + packed


def _unpack(key: str, packed: bytes) -> Sent | None:
    seal, rest = packed[:DIGEST_BYTES], packed[DIGEST_BYTES:]
    if seal.hex() != _digest(rest, key):  # damaged, or put under another key
        return None
    source_tokens, truncated = SENT.unpack_from(rest)
    return Sent(rest[SENT.size :], source_tokens, truncated)


def _digest(data: bytes, salt: str) -> str:
    key = hashlib.sha256(salt.encode("utf-8", "surrogatepass")).digest()
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES, key=key).hexdigest()
