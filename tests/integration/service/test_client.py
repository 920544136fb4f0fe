"""Both clients against a server that speaks the protocol, sockets that break it, and the service itself."""

import asyncio
import base64
import json
import socket
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import aclosing, closing, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from latentwire.bridge import wire
from latentwire.bridge.results import Generated, Latent
from latentwire.service.app import create_app
from latentwire.service.client.client import AsyncClient, Client
from latentwire.service.client.types import Evaluation, ServiceError, Token
from latentwire.service.settings import Settings
from tests.ports import free_port

LONG_SECONDS = 20.0
MESSAGE = wire.encode(np.eye(2, 3, dtype=np.float32), "0" * 32)
USED = {"usage": {"source_tokens": 3, "soft_tokens": 2, "generated_tokens": 2}, "timing": {"total_ms": 1.5}}
PIECES = ["Te", "a\u2028", " — ", "ja"]
SAID = {
    "id": "gen_1",
    "bridge": "b",
    "outputs": [{"index": 0, "text": "".join(PIECES), "finish_reason": "stop", "token_count": 4, "logprobs": None}],
    **USED,
}
LATENT = {
    "id": "lat_1",
    "data": base64.b64encode(MESSAGE).decode(),
    "shape": [2, 3],
    "dtype": "float16",
    "bytes": len(MESSAGE),
    "source_tokens": 3,
    "source_bytes": 4,
    "truncated": False,
}
BRIDGE = {"name": "b", "bridge_id": "0" * 32, "sender": "s", "receivers": ["r"], "loaded": {"s": 9}, "pinned": True}
STATES: list[dict[str, Any]] = [
    {"state": "queued", "progress": {"condition": None, "done": 0, "total": None}, "report": None},
    {"state": "running", "progress": {"condition": "latent", "done": 5, "total": 10}, "report": {"rows": 1}},
    {"state": "running", "progress": {"condition": "latent", "done": 5, "total": 10}, "report": {"rows": 1}},
    {"state": "done", "progress": {"condition": None, "done": 10, "total": 10}, "report": {"rows": 2}},
]
TOO_MUCH = {"error": {"type": "Overloaded", "message": "256 wait", "param": None, "request_id": "r0"}}
BAD = {"error": {"type": "InvalidRequest", "message": "empty", "param": "inputs.0", "request_id": "r0"}}


def sse(name: str, data: Any) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


class Speaker:
    """A service as the client sees it. It refuses first what ``refusals`` holds, and notes all it is sent."""

    def __init__(self) -> None:
        self.seen: list[Request] = []
        self.bodies: list[Any] = []
        self.times: list[float] = []
        self.refusals: deque[Response] = deque()
        self.states = iter(STATES)
        self.end = sse("done", SAID)
        self.go, self.left = threading.Event(), threading.Event()
        self.go.set()
        self.url = ""

    @property
    def app(self) -> ASGIApp:
        return Starlette(routes=[Route("/{path:path}", self.answer, methods=["GET", "POST", "DELETE"])])

    async def answer(self, request: Request) -> Response:
        self.seen.append(request)
        self.times.append(time.monotonic())
        body = await request.body()
        self.bodies.append(json.loads(body) if body else None)
        known = {"x-request-id": request.headers.get("x-request-id", "made-up")}
        if self.refusals:
            return self.refusals.popleft()
        if (self.bodies[-1] or {}).get("stream"):
            return StreamingResponse(self.pieces(), media_type="text/event-stream", headers=known)
        return JSONResponse(self.content(request), headers=known)

    def content(self, request: Request) -> Any:
        path = request.url.path
        if path == "/encode":
            return {"bridge": "b", "latents": [LATENT] * len(self.bodies[-1]["inputs"]), **USED}
        if path.startswith("/evaluations"):
            state = {"state": "cancelled"} if request.method == "DELETE" else next(self.states)
            return {"id": "eval_1", "bridge": "b", "task": "world", "receiver": "r", "error": None, **state}
        if path.startswith("/admin/"):
            return BRIDGE | ({"freed_bytes": 9} if path.endswith("/unload") else {})
        return {"/generate": SAID, "/bridges": {"bridges": [BRIDGE]}}.get(path, {"status": "ok"})

    async def pieces(self) -> AsyncIterator[bytes]:
        try:
            yield b": keep-alive\n\n" + sse("token", {"index": 0, "text": PIECES[0]})
            while not self.go.is_set():
                await asyncio.sleep(0.005)
            yield sse("later", {"what": "a newer service says"})
            for piece in PIECES[1:]:
                yield sse("token", {"index": 0, "text": piece, "new": 1})
            yield self.end
        except asyncio.CancelledError:
            self.left.set()
            raise


@contextmanager
def running(app: ASGIApp) -> Iterator[str]:
    """A server of an application in a thread; its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, ws="none", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(LONG_SECONDS)
        listener.close()


@pytest.fixture(scope="module")
def stage() -> Iterator[tuple[str, list[Speaker]]]:
    """One server for all: its address, and who speaks on it, the last one last."""
    speakers: list[Speaker] = [Speaker()]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await speakers[-1].app(scope, receive, send)

    with running(app) as url:
        yield url, speakers


@pytest.fixture
def speaker(stage: tuple[str, list[Speaker]]) -> Iterator[Speaker]:
    url, speakers = stage
    speakers.append(Speaker())
    speakers[-1].url = url
    yield speakers[-1]
    speakers[-1].go.set()


class Awaited:
    """``AsyncClient``, each call run to its end: what is true of one client must be true of both."""

    def __init__(self, *given: Any, **options: Any) -> None:
        self.runner = asyncio.Runner()
        self.client = AsyncClient(*given, **options)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *given, **options: self.runner.run(getattr(self.client, name)(*given, **options))

    def stream(self, *given: Any, **options: Any) -> Generator[Any, None, None]:
        async def following(events: Any) -> Any:
            return await anext(events)

        async def close(events: Any) -> None:
            await events.aclose()

        events = self.client.stream(*given, **options)
        try:
            with suppress(StopAsyncIteration):
                while True:
                    yield self.runner.run(following(events))
        finally:
            self.runner.run(close(events))

    def close(self) -> None:
        self.runner.run(self.client.aclose())
        self.runner.close()


Connect = Callable[..., Client]


@pytest.fixture(params=[Client, Awaited])
def connect(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Connect]:
    """Make a client of either kind; all are closed after the test."""
    monkeypatch.delenv("LATENTWIRE_URL", raising=False)
    monkeypatch.delenv("LATENTWIRE_API_KEY", raising=False)
    made: list[Any] = []

    def connect_to(url: str | None, **options: Any) -> Client:
        made.append(request.param(url, **{"trust_env": False, "timeout_seconds": LONG_SECONDS} | options))
        client: Client = made[-1]
        return client

    yield connect_to
    for client in made:
        client.close()


@pytest.fixture
def client(connect: Connect, speaker: Speaker) -> Client:
    return connect(speaker.url)


Broken = Callable[..., tuple[str, list[bytes]]]


@pytest.fixture
def broken() -> Iterator[Broken]:
    """A socket that answers the n-th connection with the n-th bytes, the last ever after, and hangs up.

    ``None`` says nothing and does not hang up. What it was sent is noted.
    """
    opened: list[socket.socket] = []

    def answer(listener: socket.socket, said: deque[bytes | None], heard: list[bytes]) -> None:
        with suppress(OSError):  # until it is closed
            while True:
                peer, _ = listener.accept()
                heard.append(peer.recv(1 << 16))
                words = said.popleft() if len(said) > 1 else said[0]
                if words is None:
                    opened.append(peer)
                    continue
                with peer:
                    peer.sendall(words)
                    peer.shutdown(socket.SHUT_WR)
                    peer.recv(1 << 16)

    def begin(*said: bytes | None) -> tuple[str, list[bytes]]:
        listener, heard = socket.create_server(("127.0.0.1", 0)), list[bytes]()
        opened.append(listener)
        threading.Thread(target=answer, args=(listener, deque(said), heard), daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}", heard

    yield begin
    for each in opened:
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
        each.close()


def ok(body: bytes, kind: str = "application/json", length: int | None = None) -> bytes:
    """An HTTP answer; with another ``length`` than the body has, a broken one."""
    length = len(body) if length is None else length
    return f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\n\r\n".encode() + body


def refused(status: int, body: Any = TOO_MUCH, **headers: str) -> JSONResponse:
    return JSONResponse(
        body, status_code=status, headers={name.replace("_", "-"): text for name, text in headers.items()}
    )


def test_texts_become_latents_with_their_numbers(client: Client, speaker: Speaker) -> None:
    encoded = client.encode(["a", "b"], dtype="float16", store=True, request_id="mine")
    assert speaker.bodies == [{"inputs": ["a", "b"], "dtype": "float16", "store": True}]
    assert speaker.seen[0].headers["x-request-id"] == encoded.request_id == "mine"
    assert encoded.latents == (Latent(MESSAGE, (2, 3), 3, "float16", 4, False, "lat_1"),) * 2
    np.testing.assert_array_equal(encoded.latents[0].array, np.eye(2, 3))
    assert client.encode("one").bridge == "b"
    assert speaker.bodies[-1] == {"inputs": ["one"]}


def test_an_answer_is_typed_and_its_inputs_take_every_form(client: Client, speaker: Speaker) -> None:
    (latent,) = client.encode("a").latents
    said = client.generate([latent, MESSAGE, "a", {"latent_id": "lat_1"}], ["1", "2", "3", "4"], n=2, seed=None)
    assert (said.texts, said.outputs[0].finish_reason, said.usage.soft_tokens) == (["".join(PIECES)], "stop", 2)
    assert said.timing.total_ms == 1.5
    sent = [{"latent": LATENT["data"]}, {"latent": LATENT["data"]}, {"text": "a"}, {"latent_id": "lat_1"}]
    assert speaker.bodies[-1] == {"inputs": sent, "prompt": ["1", "2", "3", "4"], "n": 2}


def test_the_key_is_sent_as_a_bearer_token(connect: Connect, speaker: Speaker, monkeypatch: pytest.MonkeyPatch) -> None:
    connect(speaker.url).bridges()
    connect(speaker.url, api_key="lw_1").bridges()
    monkeypatch.setenv("LATENTWIRE_URL", speaker.url)
    monkeypatch.setenv("LATENTWIRE_API_KEY", "lw_2\n")
    connect(None).bridges()
    assert [each.headers.get("authorization") for each in speaker.seen] == [None, "Bearer lw_1", "Bearer lw_2"]


def test_bridges_are_listed_loaded_unloaded_and_pinned(client: Client, speaker: Speaker) -> None:
    (listed,) = client.bridges()
    assert (listed.name, listed.receivers, listed.loaded, listed.freed_bytes) == ("b", ("r",), {"s": 9}, None)
    assert client.unload("b").freed_bytes == 9
    assert client.load("b") == client.pin("b") == client.unpin("b") == listed
    paths = [f"/admin/bridges/b/{action}" for action in ("unload", "load", "pin", "unpin")]
    assert [(each.method, each.url.path) for each in speaker.seen[1:]] == [("POST", path) for path in paths]


def test_well_is_what_answers_200_and_nothing_is_asked_twice(client: Client, speaker: Speaker) -> None:
    assert client.ready() and client.live()
    speaker.refusals.extend([refused(503), refused(503)])
    assert not client.ready() and not client.live()
    assert [each.url.path for each in speaker.seen] == ["/health/ready", "/health/live"] * 2


def test_a_stream_is_tokens_and_then_the_answer(client: Client, speaker: Speaker) -> None:
    *tokens, said = client.stream("a", "Why?", request_id="mine")
    assert tokens == [Token(0, piece) for piece in PIECES]
    assert isinstance(said, Generated) and said.request_id == "mine"
    assert said.outputs == client.generate("a", "Why?").outputs
    assert speaker.bodies[0] == speaker.bodies[1] | {"stream": True}


def test_a_token_arrives_while_the_next_is_not_there_yet(client: Client, speaker: Speaker) -> None:
    speaker.go.clear()
    events = client.stream("a", "Why?")
    assert next(events) == Token(0, PIECES[0])
    assert not speaker.go.is_set()
    speaker.go.set()
    assert isinstance(list(events)[-1], Generated)


def test_closing_a_stream_closes_its_connection(client: Client, speaker: Speaker) -> None:
    speaker.go.clear()
    events = client.stream("a", "Why?")
    next(events)
    assert not speaker.left.is_set()
    events.close()
    assert speaker.left.wait(LONG_SECONDS)
    assert client.ready()


def test_a_stream_that_is_not_read_is_not_sent(client: Client, speaker: Speaker) -> None:
    client.stream("a", "Why?").close()
    assert not speaker.seen


def test_a_stream_read_to_its_answer_leaves_the_connection_as_good_as_new(client: Client, speaker: Speaker) -> None:
    for _ in range(2):
        with closing(client.stream("a", "Why?")) as events:
            assert any(isinstance(event, Generated) for event in events)  # no further than that
    assert speaker.seen[0].client is not None
    assert speaker.seen[0].client == speaker.seen[1].client
    assert not speaker.left.is_set()


def test_an_error_within_a_stream_comes_after_the_tokens_before_it(client: Client, speaker: Speaker) -> None:
    speaker.end = sse("error", BAD)
    with pytest.raises(ServiceError) as caught:
        list(client.stream("a", "Why?"))
    assert (caught.value.status, caught.value.type, caught.value.param) == (None, "InvalidRequest", "inputs.0")
    assert caught.value.request_id == "r0"
    events = client.stream("a", "Why?")
    assert list(islice(events, len(PIECES))) == [Token(0, piece) for piece in PIECES]
    events.close()


def test_a_refusal_before_a_stream_is_an_ordinary_one(client: Client, speaker: Speaker) -> None:
    speaker.refusals.append(refused(422, BAD))
    with pytest.raises(ServiceError) as caught:
        next(client.stream("a", "Why?"))
    assert (caught.value.status, caught.value.param) == (422, "inputs.0")


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("call", ["generate", "stream", "encode", "bridges"])
def test_a_busy_service_is_asked_again(client: Client, speaker: Speaker, status: int, call: str) -> None:
    calls: dict[str, Callable[[], Any]] = {
        "generate": lambda: client.generate("a", "Why?"),
        "stream": lambda: list(client.stream("a", "Why?")),
        "encode": lambda: client.encode("a"),
        "bridges": client.bridges,
    }
    speaker.refusals.extend([refused(status), refused(status)])
    assert calls[call]()
    assert len(speaker.seen) == 3
    assert speaker.bodies[0] == speaker.bodies[2]


def test_a_busy_service_is_not_asked_before_it_said(client: Client, speaker: Speaker) -> None:
    speaker.refusals.append(refused(429, retry_after="1"))
    client.bridges()
    assert speaker.times[1] - speaker.times[0] >= 1


@pytest.mark.parametrize("retries", [0, 2])
def test_patience_ends_with_the_retries(connect: Connect, speaker: Speaker, retries: int) -> None:
    speaker.refusals.extend(refused(429, retry_after="0") for _ in range(9))
    with pytest.raises(ServiceError) as caught:
        connect(speaker.url, retries=retries).bridges()
    assert (caught.value.status, caught.value.type, caught.value.retry_after_seconds) == (429, "Overloaded", 0)
    assert len(speaker.seen) == retries + 1


def test_nobody_waits_for_a_time_that_will_not_come(connect: Connect, speaker: Speaker) -> None:
    client = connect(speaker.url, timeout_seconds=5.0)
    speaker.refusals.extend([refused(503, retry_after="6"), refused(503, retry_after="1")])
    calls: list[Callable[[], object]] = [client.bridges, lambda: client.bridges(timeout_seconds=0.9)]
    for asked in calls:
        with pytest.raises(ServiceError, match="503 Overloaded"):
            asked()
    assert len(speaker.seen) == 2


@pytest.mark.parametrize("status", [401, 403, 404, 409, 413, 422, 500, 504])
def test_what_was_refused_for_good_is_not_asked_again(client: Client, speaker: Speaker, status: int) -> None:
    speaker.refusals.append(refused(status, BAD, retry_after="0"))
    with pytest.raises(ServiceError) as caught:
        client.generate("", "Why?")
    assert (caught.value.status, caught.value.request_id, len(speaker.seen)) == (status, "r0", 1)


def test_an_evaluation_is_followed_to_its_end(client: Client, speaker: Speaker) -> None:
    changes: list[Evaluation] = []
    done = client.evaluate(
        "b", "world", conditions=("latent", "none"), limit=10, on_progress=changes.append, poll_seconds=0.01
    )
    assert [each.state for each in changes] == ["queued", "running", "done"]  # no call without a change
    assert (changes[1].progress.done, changes[1].report) == (5, {"rows": 1})
    assert done == changes[-1] and done.report == {"rows": 2}
    assert speaker.bodies[0] == {"bridge": "b", "task": "world", "conditions": ["latent", "none"], "limit": 10}
    asked = [(each.method, each.url.path) for each in speaker.seen]
    assert asked == [("POST", "/evaluations")] + [("GET", "/evaluations/eval_1")] * 3


def test_an_evaluation_need_not_be_waited_for_and_can_be_cancelled(client: Client, speaker: Speaker) -> None:
    assert client.evaluate("b", "world", wait=False, idempotency_key="k").state == "queued"
    assert client.evaluation("eval_1").progress.condition == "latent"
    assert client.cancel_evaluation("eval_1").state == "cancelled"
    assert [each.method for each in speaker.seen] == ["POST", "GET", "DELETE"]
    assert speaker.seen[0].headers["idempotency-key"] == "k"


def test_a_submission_sent_twice_is_still_one(client: Client, speaker: Speaker) -> None:
    speaker.refusals.append(refused(503))
    client.evaluate("b", "world", wait=False)
    first, second = (each.headers["idempotency-key"] for each in speaker.seen)
    assert first == second
    client.evaluate("b", "world", wait=False)
    assert speaker.seen[2].headers["idempotency-key"] != first


@pytest.mark.parametrize(
    "first",
    [b"", b"HTTP/1.1 200", b"SSH-2.0-OpenSSH_9.6\r\n", ok(b'{"bridges":', length=99)],
    ids=["nothing", "half a line", "no HTTP", "half a body"],
)
def test_a_lost_connection_is_tried_again(connect: Connect, broken: Broken, first: bytes) -> None:
    url, heard = broken(first, ok(json.dumps({"bridges": [BRIDGE]}).encode()))
    assert connect(url).bridges()[0].name == "b"
    assert len(heard) == 2
    url, heard = broken(first)
    with pytest.raises(ServiceError) as caught:
        connect(url, retries=1).bridges()
    assert (caught.value.status, caught.value.type) == (None, "ConnectionFailed")
    assert f"GET {url}/bridges" in str(caught.value)


def test_where_nothing_listens_is_a_failed_connection(connect: Connect) -> None:
    port = free_port()
    client = connect(f"http://someone:secret@127.0.0.1:{port}", retries=1)
    with pytest.raises(ServiceError, match="ConnectionFailed") as caught:
        client.generate("a", "Why?")
    assert str(port) in str(caught.value) and "secret" not in str(caught.value)
    assert not client.ready() and not client.live()


@pytest.mark.parametrize(
    "answer, why",
    [
        (ok(b"<html>hello</html>", "text/html"), "expected JSON"),
        (ok(b""), "the answer is empty; expected JSON"),
        (ok(b"[]"), "the answer is []; expected an object"),
        (ok(b'{"brid'), "expected JSON"),
        (ok(b'{"bridge": []}'), "has no 'bridges'"),
        (b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 3\r\n\r\nabc", "incorrect header check"),
    ],
)
def test_what_is_no_answer_says_so_at_once(connect: Connect, broken: Broken, answer: bytes, why: str) -> None:
    url, heard = broken(answer)
    with pytest.raises(ServiceError, match="InvalidAnswer") as caught:
        connect(url).bridges()
    assert why in str(caught.value) and "/bridges" in str(caught.value)
    assert len(heard) == 1


TOKEN = sse("token", {"index": 0, "text": "Te"})


@pytest.mark.parametrize(
    "body, length, kind, why",
    [
        (b"", None, "InvalidAnswer", "the stream ended before its last event"),
        (sse("done", SAID)[:-1], None, "InvalidAnswer", "the stream ended before its last event"),
        (sse("done", SAID)[:-9], 9999, "ConnectionFailed", "closed"),
        (sse("done", SAID | {"id": 1}), None, "InvalidAnswer", "id is 1; expected a valid string"),
        (sse("token", {"text": "a"}), None, "InvalidAnswer", "has no 'index'"),
        (b"event: done\ndata: {\n\n", None, "InvalidAnswer", "expected JSON"),
        (b"event: error\ndata: oh\n\n", None, "InvalidAnswer", "expected JSON"),
        (b"event: token\ndata: \xff\n\n", None, "InvalidAnswer", "expected JSON"),
    ],
    ids=["no end", "half an event", "dropped", "bad end", "bad token", "no JSON", "no error", "no text"],
)  # fmt: skip
def test_a_broken_stream_says_so_and_is_not_begun_again(
    connect: Connect, broken: Broken, body: bytes, length: int | None, kind: str, why: str
) -> None:
    url, heard = broken(ok(TOKEN + body, "text/event-stream", None if length is None else length))
    events = connect(url).stream("a", "Why?")
    assert next(events) == Token(0, "Te")
    with pytest.raises(ServiceError) as caught:
        list(events)
    assert (caught.value.type, len(heard)) == (kind, 1)
    assert why in str(caught.value) and "POST" in str(caught.value)


def test_a_stream_that_is_lost_before_it_begins_is_tried_again(connect: Connect, broken: Broken) -> None:
    url, heard = broken(b"", ok(TOKEN + sse("done", SAID), "text/event-stream"))
    assert isinstance(list(connect(url).stream("a", "Why?"))[-1], Generated)
    assert len(heard) == 2


def test_an_answer_that_is_no_stream_is_named(connect: Connect, broken: Broken) -> None:
    url, _ = broken(ok(json.dumps(SAID).encode()))
    with pytest.raises(ServiceError, match="content-type is application/json; expected text/event-stream"):
        next(connect(url).stream("a", "Why?"))


def test_a_silent_service_is_not_waited_for_longer_than_the_timeout(connect: Connect, broken: Broken) -> None:
    url, heard = broken(None)
    client = connect(url, timeout_seconds=0.3)
    started = time.monotonic()
    calls: list[Callable[[], object]] = [client.bridges, lambda: next(client.stream("a", "Why?"))]
    for asked in calls:
        with pytest.raises(ServiceError) as caught:
            asked()
        assert (caught.value.status, caught.value.type) == (None, "DeadlineExceeded")
    assert not client.ready()
    with pytest.raises(ServiceError, match="DeadlineExceeded"):
        connect(url).bridges(timeout_seconds=0.1)
    assert 0.9 <= time.monotonic() - started < LONG_SECONDS
    assert len(heard) == 4


def test_a_service_that_drips_is_not_waited_for_either(connect: Connect) -> None:
    async def drip(_: Request) -> Response:
        async def drops() -> AsyncIterator[bytes]:
            for _ in range(500):
                yield b" "
                await asyncio.sleep(0.02)

        return StreamingResponse(drops())

    dripping = Starlette(routes=[Route("/bridges", drip)])
    with running(dripping) as url, pytest.raises(ServiceError, match=r"DeadlineExceeded: .* no end within 0\.\d+ s"):
        connect(url, timeout_seconds=0.5).bridges()


def test_a_proxy_in_the_way_is_heard(client: Client, speaker: Speaker) -> None:
    speaker.refusals.append(Response("<h1>Bad Gateway</h1>", 502, media_type="text/html"))
    with pytest.raises(ServiceError, match="502 HTTPError: '<h1>Bad Gateway</h1>'"):
        client.bridges()


def test_a_call_that_is_cancelled_closes_its_connection(speaker: Speaker) -> None:
    speaker.go.clear()

    async def scenario() -> None:
        begun = asyncio.Event()
        async with AsyncClient(speaker.url, trust_env=False) as client:

            async def read() -> None:
                async for _ in client.stream("a", "Why?"):
                    begun.set()

            reading = asyncio.create_task(read())
            await begun.wait()
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            assert await asyncio.to_thread(speaker.left.wait, LONG_SECONDS)

    asyncio.run(scenario())


def test_many_calls_of_one_client_are_under_way_at_once(speaker: Speaker) -> None:
    speaker.go.clear()

    async def scenario() -> None:
        async with AsyncClient(speaker.url, trust_env=False) as client:
            streams = [client.stream("a", str(i)) for i in range(5)]
            assert await asyncio.gather(*(anext(events) for events in streams)) == [Token(0, PIECES[0])] * 5
            speaker.go.set()
            for events in streams:
                async with aclosing(events):
                    assert isinstance([event async for event in events][-1], Generated)

    asyncio.run(scenario())


def test_the_blocking_client_works_where_an_event_loop_runs(speaker: Speaker) -> None:
    async def scenario() -> list[Any]:
        with Client(speaker.url, trust_env=False) as client:
            said = [client.generate("a", "Why?"), *client.stream("a", "Why?")]
            speaker.go.clear()
            events = client.stream("a", "Why?")
            next(events)
            events.close()  # now, not when the loop comes to it
            assert speaker.left.wait(LONG_SECONDS)
            return said

    assert asyncio.run(scenario())[0].texts == ["".join(PIECES)]


@pytest.fixture(scope="module")
def service(checkpoint: Path) -> Iterator[str]:
    """The service itself, over the tiny bridge."""
    with running(create_app(Settings(), {"tiny": str(checkpoint)})) as url, Client(url, trust_env=False) as client:
        deadline = time.monotonic() + 60
        while not client.ready():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield url


def test_the_service_answers_the_same_to_every_form_of_an_input(connect: Connect, service: str) -> None:
    client = connect(service)
    (latent,) = client.encode("Mara lives in Rome.", store=True).latents
    assert latent.id is not None and latent.shape == latent.array.shape
    np.testing.assert_array_equal(latent.array, wire.decode(latent.data).latent)
    forms: list[Any] = [latent, latent.data, "Mara lives in Rome.", {"latent_id": latent.id}]
    said = client.generate(forms, "Where?", max_tokens=8, request_id="mine")
    assert len(said.texts) == 4 and len(set(said.texts)) == 1
    assert said.request_id == "mine" and said.diversity is not None and said.diversity.outputs == 4
    scored = client.score(forms, "Where?", [" Rome", " Paris"], logprobs=True, request_id="mine")
    assert len(scored) == 4 and scored.request_id == "mine" and len({score.best for score in scored.scores}) == 1
    assert [len(choice.logprobs or ()) for choice in scored[0].choices] == [6, 7]
    assert client.score(latent, "Where?", " Rome", end=False)[0][0].token_count == 5
    back = client.read(forms, against=["Mara lives in Rome."] * 4, max_tokens=8, request_id="mine")
    assert len(back) == 4 and back.request_id == "mine" and len(set(back.texts)) == 1 and not back.trained
    assert back[0].against is not None and back[0].against.token_count == len(" Mara lives in Rome.") + 1
    assert client.read(latent, against="Ben", max_tokens=1)[0].finish_reason == "length"
    assert [each.name for each in client.bridges()] == ["tiny"]
    assert client.ready() and client.live()


def test_a_refusal_of_the_service_names_the_input_at_fault(connect: Connect, service: str) -> None:
    with pytest.raises(ServiceError) as caught:
        connect(service).encode(["fine", " "], request_id="mine")
    assert (caught.value.status, caught.value.param, caught.value.request_id) == (422, "inputs.1", "mine")
