"""Callers who leave and callers who have waited long enough: their work ends, their places are free, others go on."""

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import Request
from fastapi.testclient import TestClient

from bridge import engine
from bridge.errors import CallerLeft, DeadlineExceeded, InvalidRequest
from service.routes.inference import _attend
from service.settings import Settings
from tests.integration.service.conftest import HELD_SECONDS, Gate, until

Start = Callable[..., TestClient]
Samples = Callable[[TestClient], dict[tuple[str, ...], float]]
BODY, GONE = {"type": "http.request", "body": b"", "more_body": False}, {"type": "http.disconnect"}
ASK: dict[str, Any] = {"inputs": [{"text": "Mara lives in Rome."}], "prompt": "Where?", "max_tokens": 4}


class Attended:
    """A request whose caller sends ``messages`` and then nothing more; ``ended`` tells that its work was let go."""

    def __init__(self, *messages: dict[str, Any], timeout: float = 60.0) -> None:
        self.messages, self.ended = list(messages), asyncio.Event()
        runtime = SimpleNamespace(settings=Settings(request_timeout=timeout))
        scope = {"type": "http", "app": SimpleNamespace(state=SimpleNamespace(runtime=runtime))}
        self.request = Request(scope, self.receive)

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
def test_work_nobody_waits_for_any_more_is_cancelled(
    messages: list[dict[str, Any]], timeout: float, error: type[Exception], said: str
) -> None:
    async def scenario() -> None:
        attended = Attended(*messages, timeout=timeout)
        async with asyncio.timeout(HELD_SECONDS):
            with pytest.raises(error, match=said):
                await _attend(attended.request, attended.endless())
            await attended.ended.wait()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(scenario())


def test_a_caller_who_stays_gets_the_answer_or_its_error_and_is_watched_no_longer() -> None:
    async def scenario() -> None:
        assert await _attend(Attended(BODY).request, asyncio.sleep(0.01, "answer")) == "answer"

        async def refused() -> None:
            raise InvalidRequest("seven is not eight")

        with pytest.raises(InvalidRequest, match="seven"):
            await _attend(Attended(BODY).request, refused())
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(scenario())


def connect(client: TestClient, path: str, body: dict[str, Any], hang_up: Event) -> "Future[list[Any]]":
    """Post ``body`` and stay until ``hang_up`` is set; gives what the application sent until then."""
    content = json.dumps(body).encode()
    messages = [{"type": "http.request", "body": content, "more_body": False}]
    scope = {
        "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
        "root_path": "", "headers": [(b"content-type", b"application/json")],
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


@pytest.mark.parametrize(("half", "path"), [("encode", "/encode"), ("ask", "/generate")])
def test_rows_of_a_caller_who_left_never_reach_the_device_and_their_places_are_free(
    start: Start, hold: Callable[..., Gate], samples: Samples, half: str, path: str
) -> None:
    client = start()
    load, hang_up = client.app.state.runtime.load, Event()  # type: ignore[attr-defined]
    latent = client.post("/encode", json={"inputs": ["a"]}).json()["latents"][0]["data"]
    one: Any = "a" if half == "encode" else {"latent": latent}
    body = {"inputs": [one]} if half == "encode" else {**ASK, "inputs": [one]}
    gate = hold(engine, half)
    with ThreadPoolExecutor(1) as pool:
        staying = pool.submit(client.post, path, json=body)
        assert gate.entered.wait(HELD_SECONDS)
        leaving = connect(client, path, {**body, "inputs": [one] * 3}, hang_up)
        until(lambda: load.waiting == 3)
        assert load.admitted == 4
        hang_up.set()
        assert leaving.result(HELD_SECONDS)[0]["status"] == 499
        until(lambda: load.waiting == 0)  # while the device still holds the other's row
        assert (load.admitted, load.running) == (1, 1)
        gate.opened.set()
        assert staying.result(HELD_SECONDS).status_code == 200
    assert client.post(path, json=body).status_code == 200
    assert [len(call[-1]) for call in gate.calls] == [1, 1]
    assert (load.admitted, load.waiting, load.running) == (0, 0, 0)
    assert samples(client)["latentwire_requests_total", path, "499"] == 1


def test_the_deadline_counts_while_the_receiver_answers_too_and_the_next_request_works(
    start: Start, hold: Callable[..., Gate]
) -> None:
    client = start(Settings(request_timeout=1.0))
    load, gate = client.app.state.runtime.load, hold(engine, "ask")  # type: ignore[attr-defined]
    response = client.post("/generate", json=ASK)
    assert gate.entered.is_set()  # the sender was in time
    assert response.status_code == 504
    assert response.json()["error"]["type"] == "DeadlineExceeded"
    assert response.json()["error"]["message"] == "no answer within 1 s"
    assert load.admitted == 0
    gate.opened.set()
    until(lambda: load.running == 0)
    assert client.post("/generate", json=ASK).status_code == 200
