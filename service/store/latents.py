"""Kept latents, by id, and the cache of encodings. A tenant never gets what another tenant keeps.

The id of a latent is a digest of what it is of: the same text, bridge and dtype are kept once, whatever batch they were
read in; a message that a caller made elsewhere has the digest of its own bytes.
"""

import hashlib
import json
import re
import struct
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from latentwire.bridge.errors import StoreUnavailable, UnknownBridge, shorten
from latentwire.bridge.wire import Latent
from latentwire.service.store.base import Store

ID = re.compile(r"lat_[0-9a-f]{32}")
DIGEST_BYTES = 16
HEADER = struct.Struct("<I?")
LENGTH = struct.Struct("<H")
METADATA_BYTES = 2048  # of a latent that is kept, as JSON
HEAD_BYTES = METADATA_BYTES + 1024  # of a value, which hold all but the numbers of its latent


@dataclass(frozen=True, slots=True)
class KeptLatent:
    """A latent under its id.

    Attributes:
        id: What callers name it by.
        message: The latent as it crosses the wire; in a listing its header alone.
        message_bytes: Length of the whole message.
        source_tokens: Sender tokens read; None where the message was made elsewhere, as for ``source_bytes``.
        source_bytes: Length of the text in UTF-8.
        truncated: Whether the text was cut.
        created: Unix time at which it was kept, seconds; None of a document of a corpus.
        expires: Unix time until which it is kept, seconds; None for ever.
        metadata: What its keeper, or a corpus, says of the document.
        text: The document itself, where a corpus keeps it.
    """

    id: str
    message: bytes
    message_bytes: int
    source_tokens: int | None = None
    source_bytes: int | None = None
    truncated: bool = False
    created: float | None = None
    expires: float | None = None
    metadata: dict[str, Any] | None = None
    text: str | None = None

    def contains(self, words: str) -> bool:
        """Whether the id, a value of the metadata or the text has these words, whatever their case."""
        said = (self.id, *map(str, (self.metadata or {}).values()), self.text or "")
        return any(words.casefold() in one.casefold() for one in said)


def id_of_text(bridge_id: str, dtype: str, text: str, tenant: str = "") -> str:
    """The id of a text's latent, salted with the tenant's name, so that no tenant learns what another one keeps."""
    return f"lat_{_digest(json.dumps([bridge_id, dtype, text]).encode(), tenant)}"


def id_of_message(message: bytes, tenant: str = "") -> str:
    """The id of a message that came without its text."""
    return f"lat_{_digest(message, tenant)}"


async def put_latents(
    store: Store, latents: Sequence[KeptLatent], *, tenant: str = "", ttl_seconds: float | None = None
) -> list[KeptLatent]:
    """Keep latents for later requests of the tenant: for ever, as far as the store goes, where there is no TTL.

    Raises:
        StoreUnavailable: None was kept.
    """
    now = time.time()
    expires = None if ttl_seconds is None else now + ttl_seconds
    kept = [replace(latent, created=now, expires=expires) for latent in latents]
    values = {(key := _store_key(latent.id, tenant)): _pack_latent(key, latent) for latent in kept}
    await store.put_many("latent", values, ttl_seconds=ttl_seconds)
    return kept


async def get_latents(store: Store, ids: Mapping[str, str], *, tenant: str = "") -> dict[str, KeptLatent]:
    """The latents that this tenant keeps, by the fields of the request that hold their ids.

    Each is checked against its id and its tenant: one of another tenant, or one that was altered, is not given out.

    Args:
        store: Where they are kept.
        ids: The id that each field of the request holds.
        tenant: Who asks.

    Raises:
        UnknownBridge: An id is not known, or not to this tenant. ``param`` names the field.
        StoreUnavailable: The store cannot be reached.
    """
    keys = {param: _store_key(name, tenant) for param, name in ids.items() if ID.fullmatch(name)}
    found = dict(zip(keys, await store.get_many("latent", list(keys.values())), strict=True))
    latents = {}
    for param, name in ids.items():
        packed = found.get(param)
        latent = None if packed is None else _unpack_latent(keys[param], packed)
        if latent is None:
            raise UnknownBridge(f"no latent is stored under {shorten(repr(name))}; it may have expired", param=param)
        latents[param] = latent
    return latents


async def delete_latent(store: Store, name: str, *, tenant: str = "") -> KeptLatent:
    """Keep a latent no longer, and say what it was (errors as ``get_latents``)."""
    (latent,) = (await get_latents(store, {"id": name}, tenant=tenant)).values()
    await store.delete("latent", _store_key(name, tenant))
    return latent


async def page_of_latents(store: Store, *, tenant: str = "", after: str = "", limit: int = 100) -> list[KeptLatent]:
    """The next of a tenant's latents in the order of their ids, with the headers of their messages.

    Raises:
        InvalidRequest: The store does not list what it keeps.
        StoreUnavailable: It cannot be reached.
    """
    first = _store_key("", tenant)
    page = await store.page("latent", first, first + after, limit, HEAD_BYTES)
    return [_facts(head[DIGEST_BYTES:]) for _, head in page]


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


def _store_key(name: str, tenant: str) -> str:
    """All of one tenant's keys begin alike, so that they can be listed, and another tenant's differ."""
    return f"{_digest(b'', tenant)}_{name}"


def _pack_latent(key: str, latent: KeptLatent) -> bytes:
    facts = asdict(latent)
    message: bytes = facts.pop("message")
    described = json.dumps(facts).encode()
    packed = LENGTH.pack(len(described)) + described + message
    return bytes.fromhex(_digest(packed, key)) + packed


def _unpack_latent(key: str, packed: bytes) -> KeptLatent | None:
    checksum, rest = packed[:DIGEST_BYTES], packed[DIGEST_BYTES:]
    return _facts(rest) if checksum.hex() == _digest(rest, key) else None


def _facts(packed: bytes) -> KeptLatent:
    end = LENGTH.size + LENGTH.unpack_from(packed)[0]
    facts: dict[str, Any] = json.loads(packed[LENGTH.size : end])
    return KeptLatent(message=packed[end:], **facts)


def _digest(data: bytes, salt: str) -> str:
    key = hashlib.sha256(salt.encode("utf-8", "surrogatepass")).digest()
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES, key=key).hexdigest()
