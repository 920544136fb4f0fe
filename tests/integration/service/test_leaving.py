"""Callers who leave and callers who have waited long enough: their work ends, their places are free, others go on."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import Any

import pytest
from fastapi import Request
from fastapi.testclient import TestClient
from pydantic import SecretStr
from starlette.datastructures import Headers
from starlette.types import Message

from latentwire.bridge import engine
from latentwire.bridge.errors import CallerLeft, DeadlineExceeded, InvalidRequest
from latentwire.service.api import lifetime
from latentwire.service.api.lifetime import run_while_connected
from latentwire.service.auth.keys import hash_of, key_line
from latentwire.service.settings import Settings
from tests.integration.service.conftest import HELD_SECONDS, Gate, until

Start = Callable[..., TestClient]
Samples = Callable[[TestClient], dict[tuple[str, ...], float]]
BODY, GONE = {"type": "http.request", "body": b"", "more_body": False}, {"type": "http.disconnect"}
ASK: dict[str, Any] = {"inputs": [{"text": "Mara lives in Rome."}], "prompt": "Where?", "max_tokens": 4}


def bearing(key: str) -> Headers:
    return Headers({"authorization": f"Bearer {key}"})


class Attended:
    """A request whose caller sends ``messages`` and then nothing more; ``ended`` tells that its work was let go."""

    def __init__(self, *messages: dict[str, Any]) -> None:
        self.messages, self.ended = list(messages), asyncio.Event()
        self.request = Request({"type": "http"}, self.receive)

    async def receive(self) -> dict[str, Any]:
        if not self.messages:
            await asyncio.Event().wait()
        return self.messages.pop(0)

    async def endless(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            self.ended.set()


@pytest.mark.parametrize(
    ("messages", "timeout", "error", "said"),
    [
        ([GONE], 60.0, CallerLeft, "closed the connection"),
        ([BODY, GONE], 60.0, CallerLeft, "closed the connection"),
        ([BODY], 0.01, DeadlineExceeded, "no answer within 0.01 s"),
    ],
)
async def test_work_nobody_waits_for_any_more_is_cancelled(
    messages: list[dict[str, Any]], timeout: float, error: type[Exception], said: str
) -> None:
    attended, before = Attended(*messages), asyncio.all_tasks()
    async with asyncio.timeout(HELD_SECONDS):
        with pytest.raises(error, match=said):
            await run_while_connected(attended.request, attended.endless(), timeout)
        await attended.ended.wait()
    assert asyncio.all_tasks() == before


async def test_a_caller_who_stays_gets_the_answer_or_its_error_and_is_watched_no_longer() -> None:
    before = asyncio.all_tasks()
    assert await run_while_connected(Attended(BODY).request, asyncio.sleep(0.01, "answer"), 60.0) == "answer"

    async def refused() -> None:
        raise InvalidRequest("seven is not eight")

    with pytest.raises(InvalidRequest, match="seven"):
        await run_while_connected(Attended(BODY).request, refused(), 60.0)
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before


async def test_a_stream_on_which_nothing_comes_for_long_bears_comments_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lifetime, "KEEP_ALIVE_SECONDS", 0.02)
    sent, commented, caller = list[bytes](), asyncio.Event(), Attended(BODY)

    async def work(on_piece: lifetime.OnPiece) -> None:
        on_piece("a")
        await commented.wait()
        on_piece("b")

    async def events(pieces: AsyncIterator[Any], result: Callable[[], None]) -> AsyncIterator[str]:
        async for piece in pieces:
            yield lifetime.event(None, piece)
        result()

    async def send(message: Message) -> None:
        sent.append(message.get("body", b""))
        if sent[-1] == lifetime.COMMENT:
            commented.set()

    response = await lifetime.stream_response(caller.request, work, events, 60.0)
    await response({"type": "http", "state": {}}, caller.receive, send)
    assert [body for body in sent if body not in (b"", lifetime.COMMENT)] == [b"data: a\n\n", b"data: b\n\n"]
    assert sent.index(b"data: a\n\n") < sent.index(lifetime.COMMENT) < sent.index(b"data: b\n\n")


def connect(client: TestClient, path: str, body: dict[str, Any], hang_up: Event, key: str = "") -> "Future[list[Any]]":
    """Post ``body`` and stay until ``hang_up`` is set; gives what the application sent until then."""
    content = json.dumps(body).encode()
    messages = [{"type": "http.request", "body": content, "more_body": False}]
    scope = {
        "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
        "root_path": "", "headers": [(b"content-type", b"application/json"), *bearing(key).raw],
    }  # fmt: skip

    async def receive() -> dict[str, Any]:
        while not messages and not hang_up.is_set():
            await asyncio.sleep(0.001)
        return messages.pop() if messages else GONE

    async def ask() -> list[Any]:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        await client.app(scope, receive, send)
        return sent

    assert client.portal is not None
    return client.portal.start_task_soon(ask)


def test_rows_of_a_caller_who_left_never_reach_the_sender_and_their_places_are_free(
    start: Start, hold: Callable[..., Gate], samples: Samples
) -> None:
    client = start(Settings(encode_cache=False))
    admission, hang_up = client.app.state.runtime.admission, Event()  # type: ignore[attr-defined]
    gate = hold(engine, "encode")
    with ThreadPoolExecutor(1) as pool:
        staying = pool.submit(client.post, "/encode", json={"inputs": ["a"]})
        assert gate.entered.wait(HELD_SECONDS)
        leaving = connect(client, "/encode", {"inputs": ["a", "b", "c"]}, hang_up)
        until(lambda: admission.waiting == 3)
        assert admission.admitted == 4
        hang_up.set()
        assert leaving.result(HELD_SECONDS)[0]["status"] == 499
        until(lambda: admission.waiting == 0)  # while the device still holds the other's row
        assert (admission.admitted, admission.running) == (1, 1)
        gate.opened.set()
        assert staying.result(HELD_SECONDS).status_code == 200
    assert [len(call[-1]) for call in gate.calls] == [1]
    assert (admission.admitted, admission.waiting, admission.running) == (0, 0, 0)
    assert samples(client)["latentwire_requests_total", "/encode", "499"] == 1


def refused(client: TestClient, key: str) -> bool:
    """Whether the key's tokens are used up; asks for nothing that costs any."""
    status = client.post("/encode", headers=bearing(key), json={}).status_code
    assert status in (422, 429)
    return status == 429


@pytest.mark.parametrize("path", ["/encode", "/generate"])
@pytest.mark.parametrize("way", ["deadline", "left"])
def test_texts_that_the_sender_read_for_a_caller_who_is_gone_are_charged_and_those_it_did_not_are_not(
    start: Start, hold: Callable[..., Gate], path: str, way: str
) -> None:
    keys = [key_line(name, hash_of(name.encode()), ["infer"], tokens_per_minute=1) for name in ("read", "waiting")]
    client = start(Settings(api_keys=SecretStr("\n".join(keys))))
    admission, hang_up = client.app.state.runtime.admission, Event()  # type: ignore[attr-defined]
    gate = hold(engine, "encode")
    ask = {"inputs": ["Mara lives in Rome."]} if path == "/encode" else ASK
    body = {**ask, "timeout_seconds": 0.5} if way == "deadline" else ask
    read = connect(client, path, body, hang_up, "read")
    assert gate.entered.wait(HELD_SECONDS)
    waiting = connect(client, path, body, hang_up, "waiting")
    if way == "left":
        until(lambda: admission.waiting == 1)
        hang_up.set()
    statuses = {gone.result(HELD_SECONDS)[0]["status"] for gone in (read, waiting)}
    assert statuses == {504 if way == "deadline" else 499}
    until(lambda: refused(client, "read"))
    gate.opened.set()
    until(lambda: admission.running == 0)
    assert not refused(client, "waiting")


def test_rows_of_a_caller_who_left_never_reach_the_receiver_and_their_blocks_are_free(
    start: Start, hold: Callable[..., Gate]
) -> None:
    client = start()
    runtime, hang_up = client.app.state.runtime, Event()  # type: ignore[attr-defined]
    latent = client.post("/encode", json={"inputs": ["a"]}).json()["latents"][0]["data"]
    body = {**ASK, "inputs": [{"latent": latent}]}
    (made,) = runtime.models.engines.all()
    gate = hold(made.lm.model, "forward")
    with ThreadPoolExecutor(1) as pool:
        staying = pool.submit(client.post, "/generate", json=body)
        assert gate.entered.wait(HELD_SECONDS)
        leaving = connect(client, "/generate", {**body, "n": 3}, hang_up)
        until(lambda: made.running == 4)
        assert runtime.admission.admitted == 4
        hang_up.set()
        assert leaving.result(HELD_SECONDS)[0]["status"] == 499
        until(lambda: made.running == 1)  # while the device still holds the other's row
        assert runtime.admission.admitted == 1
        gate.opened.set()
        assert staying.result(HELD_SECONDS).status_code == 200
    until(lambda: made.blocks_in_use == 0)
    assert {call["cu_seq_lens_q"].numel() for call in gate.named} == {2}  # one row in every step


def test_a_caller_who_leaves_a_stream_ends_its_generation(start: Start, hold: Callable[..., Gate]) -> None:
    client = start()
    runtime, hang_up = client.app.state.runtime, Event()  # type: ignore[attr-defined]
    (made,) = runtime.models.engines.all()
    gate = hold(made.lm.model, "forward")
    gate.opened.set()
    body = {**ASK, "max_tokens": 200, "temperature": 1.0, "stream": True, "seed": 5}
    leaving = connect(client, "/generate", body, hang_up)
    until(lambda: len(gate.calls) > 8)  # a token each
    hang_up.set()
    sent = leaving.result(HELD_SECONDS)
    assert sent[0]["status"] == 200 and b"event: token" in sent[1]["body"]
    assert not any(b"event: done" in message.get("body", b"") for message in sent)
    until(lambda: made.running == 0 and made.blocks_in_use == 0)
    assert runtime.admission.admitted == 0


def test_the_deadline_counts_while_the_receiver_answers_too_and_the_next_request_works(
    start: Start, hold: Callable[..., Gate]
) -> None:
    client = start(Settings(request_timeout=1.0))
    runtime = client.app.state.runtime  # type: ignore[attr-defined]
    (made,) = runtime.models.engines.all()
    gate = hold(made.lm.model, "forward")
    response = client.post("/generate", json=ASK)
    assert gate.entered.is_set()  # the sender was in time
    assert response.status_code == 504
    assert response.json()["error"]["type"] == "DeadlineExceeded"
    assert response.json()["error"]["message"] == "no answer within 1 s"
    assert runtime.admission.admitted == 0 and made.running == 0
    gate.opened.set()
    assert client.post("/generate", json=ASK).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_caller_may_wish_for_less_time_but_not_for_more(
    start: Start, hold: Callable[..., Gate], stream: bool
) -> None:
    client = start(Settings(request_timeout=2.0))
    (made,) = client.app.state.runtime.models.engines.all()  # type: ignore[attr-defined]
    gate = hold(made.lm.model, "forward")
    for wished, had in ((0.25, "0.25"), (500, "2")):
        response = client.post("/generate", json={**ASK, "timeout_seconds": wished, "stream": stream})
        assert response.status_code == 504 and response.json()["error"]["message"] == f"no answer within {had} s"
    gate.opened.set()
    assert made.running == 0
