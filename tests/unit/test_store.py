"""What a caller may rely on from the stores of one service, and from what is kept in any store."""

import tracemalloc
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from latentwire.bridge import wire
from latentwire.bridge.errors import StoreUnavailable, UnknownBridge
from latentwire.service.store.base import Kind, Store
from latentwire.service.store.disk import DiskStore
from latentwire.service.store.latents import (
    HEAD_BYTES,
    ID,
    CachedEncoding,
    KeptLatent,
    delete_latent,
    encode_key,
    get_encodings,
    get_latents,
    id_of_message,
    id_of_text,
    page_of_latents,
    put_encodings,
    put_latents,
)
from latentwire.service.store.memory import MemoryStore
from latentwire.service.store.redis import RedisStore

ROOM = 1 << 20
SMALL, LARGE = bytes(10), bytes(ROOM // 4)  # three large ones fit, a fourth with its key and bookkeeping does not
SENT = CachedEncoding(b"\x00message\xff", 17, True)


class Clock:
    """An hour passes at once."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


BUDGETS: dict[Kind, int] = {"latent": ROOM, "encode": ROOM, "job": ROOM}


def memory() -> MemoryStore:
    return MemoryStore(BUDGETS, clock=Clock())


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["memory", "disk"])
async def store(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> AsyncIterator[Store]:
    """Either store of one service, empty."""
    kinds: dict[str, Callable[..., Store]] = {"memory": MemoryStore, "disk": partial(DiskStore, tmp_path)}
    store = kinds[request.param](BUDGETS, clock=clock)
    yield store
    await store.close()


async def held(store: Store, keys: str) -> str:
    """Which of these keys, a letter each, are still there."""
    found = await store.get_many("latent", list(keys))
    return "".join(key for key, value in zip(keys, found, strict=True) if value is not None)


async def test_a_store_gives_back_what_was_put_under_its_kind_and_key(store: Store) -> None:
    await store.put("latent", "a", b"\x00latent\xff")
    await store.put("job", "a", b"")
    assert await store.get_many("latent", ["b", "a", "\ud800"]) == [None, b"\x00latent\xff", None]
    assert await store.get("job", "a") == b""
    assert await store.get("encode", "a") is None


async def test_the_least_recently_used_goes_first(store: Store) -> None:
    for key in "abc":
        await store.put("latent", key, LARGE)
    await store.get("latent", "a")
    await store.put("latent", "d", LARGE)
    assert await held(store, "abcd") == "acd"


async def test_rows_of_one_request_push_out_older_ones_and_never_each_other(store: Store) -> None:
    await store.put("latent", "a", LARGE)
    await store.put_many("latent", dict.fromkeys("bcd", LARGE))
    assert await held(store, "abcd") == "bcd"


async def test_a_request_that_cannot_fit_as_a_whole_is_refused_before_anything_is_pushed_out(store: Store) -> None:
    await store.put("latent", "a", SMALL)
    with pytest.raises(StoreUnavailable, match=rf"4 values of kind 'latent' take \d+ bytes; the store holds {ROOM}"):
        await store.put_many("latent", dict.fromkeys("bcde", LARGE))
    assert await held(store, "abcde") == "a"
    assert (store.failures, store.available) == (1, True)


async def test_no_flood_of_one_kind_costs_anybody_a_value_of_another(store: Store) -> None:
    await store.put("job", "a", SMALL)
    for key in "abcdefgh":
        await store.put("latent", key, LARGE)
        await store.put("encode", key, LARGE)
    assert await store.get("job", "a") == SMALL


async def test_what_has_expired_makes_room_before_what_was_not_used_for_longer(store: Store, clock: Clock) -> None:
    await store.put("latent", "a", LARGE, ttl_seconds=3600)
    await store.put_many("latent", dict.fromkeys("bc", LARGE), ttl_seconds=60)
    clock.now += 61
    await store.put("latent", "d", LARGE, ttl_seconds=3600)
    assert await held(store, "abcd") == "ad"


async def test_reading_does_not_prolong_and_putting_again_does(store: Store, clock: Clock) -> None:
    await store.put_many("latent", dict.fromkeys("ab", SMALL), ttl_seconds=60)
    await store.put("latent", "c", SMALL)
    clock.now += 59
    assert await held(store, "abc") == "abc"
    await store.put("latent", "b", SMALL, ttl_seconds=60)
    clock.now += 2
    assert await held(store, "abc") == "bc"
    clock.now += 1e9
    assert await held(store, "abc") == "c"


@pytest.mark.parametrize("size", [0, 100, 5000])
async def test_the_budget_counts_keys_and_bookkeeping(size: int) -> None:
    tracemalloc.start()
    try:
        store = memory()
        before, most = tracemalloc.get_traced_memory()[0], 0
        for i in range(4000):
            await store.put("latent", f"lat_{i:032x}", bytes(size), ttl_seconds=60)
            await store.put("latent", "lat_the_same_again", bytes(size), ttl_seconds=60)
            most = max(most, tracemalloc.get_traced_memory()[0] - before)
    finally:
        tracemalloc.stop()
    assert ROOM / 4 < most <= ROOM


def test_an_id_is_that_of_the_text_bridge_and_dtype_or_of_the_message_for_each_tenant() -> None:
    assert id_of_message(b"message") == id_of_message(b"message", "")
    assert id_of_text("bridge", "int8", "text") == id_of_text("bridge", "int8", "text", "")
    tenants = ["", "a", "b", "a\0", "\ud800", "a" * 100, "a" * 101]
    ids = {id_of_message(message, tenant) for message in (b"message", b"other", b"") for tenant in tenants}
    texts = [("b", "int8", "t"), ("c", "int8", "t"), ("b", "float16", "t"), ("b", "int8", "u"), ("b", 'int8", "t', "")]
    ids |= {id_of_text(*text, tenant) for text in texts for tenant in tenants}
    assert len(ids) == 8 * len(tenants)
    assert all(ID.fullmatch(key) for key in ids)


def kept(message: bytes, tenant: str = "") -> KeptLatent:
    return KeptLatent(id_of_message(message, tenant), message, len(message))


async def test_a_latent_is_found_by_the_tenant_that_stored_it_and_by_no_other(store: Store) -> None:
    whole = KeptLatent(id_of_text("bridge", "int8", "text", "mine"), b"b", 1, 7, 4, True)
    a, twin, b = await put_latents(store, [kept(b"a", "mine"), kept(b"a", "mine"), whole], tenant="mine")
    assert a == twin != b == replace(whole, created=b.created)
    found = await get_latents(store, {"inputs.0": b.id, "inputs.2": a.id, "inputs.3": a.id}, tenant="mine")
    assert found == {"inputs.0": b, "inputs.2": a, "inputs.3": a}
    for tenant in ("", "yours"):
        with pytest.raises(UnknownBridge, match=a.id):
            await get_latents(store, {"inputs.0": a.id}, tenant=tenant)
        with pytest.raises(UnknownBridge, match=a.id):
            await delete_latent(store, a.id, tenant=tenant)
        assert await page_of_latents(store, tenant=tenant) == []
    (theirs,) = await put_latents(store, [kept(b"a", "yours")], tenant="yours")
    assert theirs.id != a.id
    assert await get_latents(store, {"inputs.0": theirs.id}, tenant="yours") == {"inputs.0": theirs}
    assert await delete_latent(store, a.id, tenant="mine") == a
    assert [one.id for one in await page_of_latents(store, tenant="mine")] == [b.id]


async def test_latents_are_listed_page_by_page_with_what_is_known_of_them_and_their_headers(store: Store) -> None:
    messages = [wire.encode(np.ones((300, 8), np.float32), f"{i:032x}") for i in range(5)]
    all_of_them = await put_latents(store, [kept(message) for message in messages], ttl_seconds=60)
    seen: list[KeptLatent] = []
    while page := await page_of_latents(store, after=seen[-1].id if seen else "", limit=2):
        assert len(page) == (1 if len(seen) == 4 else 2)
        seen += page
    assert [replace(one, message=b"") for one in seen] == [
        replace(one, message=b"") for one in sorted(all_of_them, key=lambda one: one.id)
    ]
    assert {wire.header_of(one.message).bridge_id for one in seen} == {f"{i:032x}" for i in range(5)}
    assert all(len(one.message) < HEAD_BYTES and one.expires == one.created + 60 for one in seen)


async def test_what_has_expired_is_not_listed(store: Store, clock: Clock) -> None:
    await put_latents(store, [kept(b"a")], ttl_seconds=60)
    (for_ever,) = await put_latents(store, [kept(b"b")])
    clock.now += 61
    assert [one.id for one in await page_of_latents(store)] == [for_ever.id]
    assert for_ever.expires is None


async def test_a_latent_that_does_not_make_its_id_is_not_given_out() -> None:
    store = memory()
    a, b = await put_latents(store, [kept(b"a"), kept(b"b")])
    (_, packed), (key_of_b, _) = sorted(await store.page("latent", "", "", 9, 999), key=lambda row: a.id not in row[0])
    await store.put("latent", key_of_b, packed)
    with pytest.raises(UnknownBridge, match=b.id) as caught:
        await get_latents(store, {"inputs.0": a.id, "inputs.1": b.id})
    assert caught.value.param == "inputs.1"


@pytest.mark.parametrize("key", ["", "lat_x", "lat_\ud800", "lat_" + "A" * 32, "lat_" + "0" * 33, "x" * 10_000])
async def test_what_is_no_id_is_unknown_without_asking_the_store(key: str, tmp_path: Path) -> None:
    away = RedisStore(f"unix://{tmp_path / 'nobody'}")
    with pytest.raises(UnknownBridge, match="no latent is stored under '") as caught:
        await get_latents(away, {"inputs.7.latent_id": key})
    assert caught.value.param == "inputs.7.latent_id"
    assert len(str(caught.value)) < 1000
    assert away.failures == 0


def test_an_encoding_has_a_key_of_its_own_for_whatever_changes_it_and_for_each_tenant() -> None:
    same = ("bridge", "int8", False, "text", "tenant")
    others = [
        ("other", "int8", False, "text", "tenant"),
        ("bridge", "float16", False, "text", "tenant"),
        ("bridge", "int8", True, "text", "tenant"),
        ("bridge", "int8", False, "text ", "tenant"),
        ("bridge", "int8", False, "\ud800", "tenant"),
        ("bridge", "int8", False, "text", ""),
        ("bridge", 'int8", false, "', False, "text", "tenant"),
    ]
    assert encode_key(*same) == encode_key(*same)
    assert len({encode_key(*key) for key in [same, *others]}) == 1 + len(others)


async def test_encodings_are_recalled_whole_and_in_order() -> None:
    store = memory()
    empty = CachedEncoding(b"", 0, False)
    await put_encodings(store, {"a": SENT, "b": empty})
    assert await get_encodings(store, ["b", "nothing", "a"]) == [empty, None, SENT]


async def test_an_encoding_that_is_damaged_or_lies_under_another_key_is_not_recalled() -> None:
    store = memory()
    await put_encodings(store, {"a": SENT})
    kept = await store.get("encode", "a")
    assert kept is not None
    for at in range(len(kept)):
        await store.put("encode", "a", kept[:at] + bytes([kept[at] ^ 1]) + kept[at + 1 :])
        assert await get_encodings(store, ["a"]) == [None]
        await store.put("encode", "a", kept[:at])
        assert await get_encodings(store, ["a"]) == [None]
    await store.put_many("encode", {"a": kept, "b": kept})
    assert await get_encodings(store, ["a", "b"]) == [SENT, None]


async def test_without_its_store_an_encoding_is_neither_recalled_nor_remembered_and_a_latent_says_so(
    tmp_path: Path,
) -> None:
    away = RedisStore(f"unix://{tmp_path / 'nobody'}")
    assert await get_encodings(away, ["a", "b"]) == [None, None]
    await put_encodings(away, {"a": SENT})
    with pytest.raises(StoreUnavailable):
        await put_latents(away, [kept(b"message")])
    with pytest.raises(StoreUnavailable):
        await get_latents(away, {"inputs.0": id_of_message(b"message")})
    assert (away.available, away.failures) == (False, 4)
    await away.close()


async def test_encodings_too_large_to_remember_cost_the_request_nothing() -> None:
    store = memory()
    await put_encodings(store, {"a": CachedEncoding(bytes(ROOM), 1, False)})
    assert await get_encodings(store, ["a"]) == [None]
