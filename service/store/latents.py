"""Stored latents, by id, and the cache of encodings. A tenant never gets what another tenant stored."""

import hashlib
import json
import re
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from latentwire.bridge.errors import StoreUnavailable, UnknownBridge, shorten
from latentwire.bridge.wire import Latent
from latentwire.service.store.base import Store

ID = re.compile(r"lat_[0-9a-f]{32}")
DIGEST_BYTES = 16
HEADER = struct.Struct("<I?")


def latent_id(message: bytes, tenant: str = "") -> str:
    """The id of a message: its digest, salted with the tenant's name. The same message is stored once."""
    return f"lat_{_digest(message, tenant)}"


async def put_latents(
    store: Store, messages: Sequence[bytes], *, tenant: str = "", ttl_seconds: float | None = None
) -> list[str]:
    """Store the messages of a request for later requests of the tenant, and return their ids.

    Raises:
        StoreUnavailable: None was stored.
    """
    ids = [latent_id(message, tenant) for message in messages]
    await store.put_many("latent", dict(zip(ids, messages, strict=True)), ttl_seconds=ttl_seconds)
    return ids


async def get_latents(store: Store, ids: Mapping[str, str], *, tenant: str = "") -> dict[str, bytes]:
    """The messages that this tenant stored, by the fields of the request that hold their ids.

    Every message is checked against its id: one of another tenant, or one that was altered, has another id.

    Args:
        store: Where they were stored.
        ids: The id that each field of the request holds.
        tenant: Who asks.

    Raises:
        UnknownBridge: An id is not known, or not to this tenant. ``param`` names the field.
        StoreUnavailable: The store cannot be reached.
    """
    valid = {param: key for param, key in ids.items() if ID.fullmatch(key)}
    found = dict(zip(valid, await store.get_many("latent", list(valid.values())), strict=True))
    messages = {}
    for param, key in ids.items():
        message = found.get(param)
        if message is None or latent_id(message, tenant) != key:
            raise UnknownBridge(f"no latent is stored under {shorten(repr(key))}; it may have expired", param=param)
        messages[param] = message
    return messages


@dataclass(frozen=True, slots=True)
class CachedEncoding:
    """The encoding of a text: the message, the text's length in sender tokens, and whether it was truncated.

    ``latent`` is what a message from the cache holds, where it was decoded already; it is not stored.
    """

    message: bytes
    source_tokens: int
    truncated: bool
    latent: Latent | None = field(default=None, compare=False)


def encode_key(bridge_id: str, dtype: str, truncate: bool, text: str, tenant: str = "") -> str:
    """The cache key of an encoding: all that determines it, salted with the tenant's name, so that no tenant learns
    what another one sent."""
    return _digest(json.dumps([bridge_id, dtype, truncate, text]).encode(), tenant)


async def get_encodings(store: Store, keys: Sequence[str]) -> list[CachedEncoding | None]:
    """Cached encodings, None where there is none: also of a store that cannot be reached, and of damaged values."""
    try:
        found = await store.get_many("encode", keys)
    except StoreUnavailable:
        return [None] * len(keys)
    return [None if packed is None else _unpack(key, packed) for key, packed in zip(keys, found, strict=True)]


async def put_encodings(
    store: Store, encodings: Mapping[str, CachedEncoding], *, ttl_seconds: float | None = None
) -> None:
    """Cache encodings by key, if the store can."""
    packed = {key: _pack(key, encoding) for key, encoding in encodings.items()}
    with suppress(StoreUnavailable):
        await store.put_many("encode", packed, ttl_seconds=ttl_seconds)


def _pack(key: str, encoding: CachedEncoding) -> bytes:
    packed = HEADER.pack(encoding.source_tokens, encoding.truncated) + encoding.message
    return bytes.fromhex(_digest(packed, key)) + packed


def _unpack(key: str, packed: bytes) -> CachedEncoding | None:
    checksum, rest = packed[:DIGEST_BYTES], packed[DIGEST_BYTES:]
    if checksum.hex() != _digest(rest, key):  # damaged, or stored under another key
        return None
    return CachedEncoding(rest[HEADER.size :], *HEADER.unpack_from(rest))


def _digest(data: bytes, salt: str) -> str:
    key = hashlib.sha256(salt.encode("utf-8", "surrogatepass")).digest()
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES, key=key).hexdigest()
