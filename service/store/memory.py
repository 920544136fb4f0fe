"""The store in the process. Nothing is pushed out by values of another kind, or by another row of the same request."""

import heapq
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from cachetools import Cache, TLRUCache

from latentwire.bridge.errors import StoreUnavailable
from latentwire.service.store.base import Kind, Store

ENTRY_BYTES = 600  # what an entry costs in the process beside its value and key (measured; a test holds it)
KEYS_HELD = 3  # the table's own key, and as many again in the expiry heap before it is cleaned


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
        """Keep a value no longer."""
        self._shelves[kind].pop(key, None)

    async def page(self, kind: Kind, prefix: str, after: str, limit: int, head_bytes: int) -> list[tuple[str, bytes]]:
        """The next keys that have a prefix, with the start of each value; that is no use of them."""
        shelf = self._shelves[kind]
        keys = heapq.nsmallest(limit, (key for key in shelf if key.startswith(prefix) and key > after))
        return [(key, Cache.__getitem__(shelf, key).value[:head_bytes]) for key in keys]

    async def close(self) -> None:
        """Nothing to let go of."""


def _shelf(max_bytes: int, clock: Callable[[], float]) -> TLRUCache[str, _Entry, float]:
    return TLRUCache(max_bytes, lambda _, entry, now: now + entry.ttl_seconds, clock, lambda entry: entry.cost_bytes)


def _cost_bytes(key: str, value: bytes) -> int:
    return ENTRY_BYTES + KEYS_HELD * sys.getsizeof(key) + sys.getsizeof(value)
