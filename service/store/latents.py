"""Latents by id, and encodings that need not be made again. Nobody is answered with what another tenant kept."""

import hashlib
import json
import re
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from latentwire.bridge.errors import StoreUnavailable, UnknownBridge, shorten
from latentwire.service.store.base import Store

ID = re.compile(r"lat_[0-9a-f]{32}")
DIGEST_BYTES = 16


SENT = struct.Struct("<I?")


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
