"""Callers who misbehave on real sockets, and parts that fail: nobody waits for ever, nothing is held, others go on."""

import json
import os
import random
import signal
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from latentwire.bridge import engine
from latentwire.bridge import opened as opening
from latentwire.bridge.generation import continuous
from latentwire.bridge.generation import output as answer
from latentwire.service.app import create_app
from latentwire.service.auth.limits import Limiter
from latentwire.service.cli.server import Server, serve
from latentwire.service.cli.signals import ENDING
from latentwire.service.inference import engines
from latentwire.service.inference import generation as answering
from latentwire.service.metrics import Metrics
from latentwire.service.settings import Settings
from latentwire.service.store.memory import MemoryStore
from tests.integration.service.conftest import HELD_SECONDS, READY_SECONDS, until

CONNECTIONS = 1000
SPARE = 4  # threads and file descriptors that a service may have more of than before: pools grow lazily
ASK: dict[str, Any] = {"inputs": [{"text": "Mara lives in Rome."}], "prompt": "Where?", "max_tokens": 4}
LONG: dict[str, Any] = {**ASK, "max_tokens": 200, "temperature": 1.0, "seed": 5}


@contextmanager
def listening(app: FastAPI) -> Iterator[int]:
    """The application behind a real server and real sockets, on a thread; gives its port."""
    server = app.state.server = Server(app)
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as bound:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            until(lambda: app.state.runtime.models.ready, READY_SECONDS)
            yield bound.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def app(checkpoint: Path) -> FastAPI:
    return create_app(Settings(encode_cache=False), {"tiny": str(checkpoint)})


@pytest.fixture(scope="module")
def port(app: FastAPI) -> Iterator[int]:
    with listening(app) as port:
        assert ask(port).status_code == 200
        yield port


def held(app: FastAPI) -> dict[str, int]:
    """What requests hold while they are answered; all zero when nobody is there."""
    runtime = app.state.runtime
    states = [runtime.residency.find(name) for served in runtime.bridges.values() for name in served.model_names]
    server = getattr(app.state, "server", None)
    return {
        "requests": 0 if server is None else len(server.server_state.tasks),
        "admitted": runtime.admission.admitted,
        "waiting": runtime.admission.waiting + runtime.admission.running,
        "running": sum(engine.running for engine in runtime.models.engines.all()),
        "blocks": sum(engine.blocks_in_use for engine in runtime.models.engines.all()),
        "soft": sum(engine.soft_ids.users for engine in runtime.models.engines.all()),
        "loans": sum(state.users for state in states if state is not None),
    }


def at_rest(app: FastAPI) -> None:
    try:
        until(lambda: not any(held(app).values()))
    except AssertionError:
        raise AssertionError(held(app)) from None


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def ask(port: int, path: str = "/generate", body: dict[str, Any] = ASK) -> httpx.Response:
    return httpx.post(f"http://127.0.0.1:{port}{path}", json=body, timeout=HELD_SECONDS)


def request(body: dict[str, Any], path: str = "/generate") -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


def connect(port: int, receive_buffer: int | None = None) -> socket.socket:
    caller = socket.socket()
    if receive_buffer is not None:
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    caller.settimeout(HELD_SECONDS)
    caller.connect(("127.0.0.1", port))
    return caller


def rest(caller: socket.socket) -> bytes:
    """Everything until the server closes the connection."""
    return b"".join(iter(lambda: caller.recv(1 << 16), b""))


def leave(port: int, number: int, met: Counter[str]) -> None:
    """Connect, go as far as the number says, and leave: politely, or with a reset."""
    draw = random.Random(number)
    stage = ("nothing", "head", "body", "asked", "encode", "stream")[number % 6]
    body = {**LONG, "stream": stage == "stream", "seed": number}
    whole = request({"inputs": ["Mara lives in Rome."]}, "/encode") if stage == "encode" else request(body)
    head = whole.index(b"\r\n\r\n") + 4
    end = {"nothing": 0, "head": draw.randrange(1, head), "body": draw.randrange(head, len(whole))}
    with connect(port) as caller, suppress(ConnectionError):
        caller.sendall(whole[: end.get(stage, len(whole))])
        if stage == "stream":
            met[caller.recv(12).decode()] += 1
        elif draw.random() < 0.3:
            time.sleep(draw.random() * 0.05)
        if draw.random() < 0.5:
            caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    met[stage] += 1


def test_a_thousand_callers_who_leave_at_every_stage_leave_nothing_behind(app: FastAPI, port: int) -> None:
    at_rest(app)
    before, met = (threading.active_count(), descriptors()), Counter[str]()
    with ThreadPoolExecutor(16) as callers:
        for done in [callers.submit(leave, port, number, met) for number in range(CONNECTIONS)]:
            done.result(2 * HELD_SECONDS)
    assert sum(met[stage] for stage in ("nothing", "head", "body", "asked", "encode", "stream")) == CONNECTIONS
    assert met["HTTP/1.1 200"]  # some streams had begun
    at_rest(app)
    assert ask(port).status_code == 200
    until(lambda: threading.active_count() <= before[0] + SPARE and descriptors() <= before[1] + SPARE)
    assert app.state.runtime.models.dead is None and not app.state.runtime.models.stalled


@pytest.mark.parametrize("stream", [False, True])
def test_a_caller_who_shuts_its_half_of_the_connection_still_gets_the_answer(
    app: FastAPI, port: int, stream: bool
) -> None:
    with connect(port) as caller:
        caller.sendall(request({**LONG, "stream": stream}))
        caller.shutdown(socket.SHUT_WR)
        answer = rest(caller)
    assert b"HTTP/1.1 200 OK\r\n" in answer
    assert (b"event: done" if stream else b'"finish_reason"') in answer
    at_rest(app)


@pytest.mark.parametrize("sent", [0.5, 0.99])
def test_a_caller_who_shuts_its_half_in_the_middle_of_a_request_is_hung_up_on(
    app: FastAPI, port: int, sent: float
) -> None:
    whole = request(ASK)
    with connect(port) as caller:
        caller.sendall(whole[: int(len(whole) * sent)])
        caller.shutdown(socket.SHUT_WR)
        assert b" 200 " not in rest(caller)
    at_rest(app)


def test_a_caller_who_closes_the_connection_is_told_from_one_who_shuts_half_of_it(
    app: FastAPI, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While no token comes, so that no answer could tell."""
    (engine,) = app.state.runtime.models.engines.all()
    forward, opened = engine.lm.model.forward, threading.Event()
    monkeypatch.setattr(engine.lm.model, "forward", lambda *a, **k: opened.wait(HELD_SECONDS) and forward(*a, **k))
    try:
        with connect(port) as stays, connect(port) as leaves:
            for caller in (stays, leaves):
                caller.sendall(request(ASK))
                caller.shutdown(socket.SHUT_WR)
            until(lambda: engine.running == 2)
            leaves.close()
            until(lambda: engine.running == 1)
            time.sleep(0.5)
            assert app.state.runtime.admission.admitted == 1
            opened.set()
            assert b"HTTP/1.1 200 OK\r\n" in rest(stays)
    finally:
        opened.set()
    at_rest(app)


def test_a_slow_reader_of_a_long_stream_holds_nobody_up_and_leaves_nothing(app: FastAPI, port: int) -> None:
    threads = threading.active_count()
    with connect(port, receive_buffer=4096) as slow:
        slow.sendall(request({**LONG, "stream": True, "n": 16, "logprobs": 20}))  # megabytes: no buffer takes them
        for _ in range(5):
            assert len(slow.recv(1)) == 1
            time.sleep(0.2)
            assert ask(port).status_code == 200
        until(lambda: held(app)["running"] == 0)  # its rows are done, whether it reads or not
        assert ask(port).status_code == 200
    at_rest(app)
    until(lambda: threading.active_count() <= threads + SPARE)


def test_a_slow_writer_is_answered_in_the_end_and_holds_nobody_up(app: FastAPI, port: int) -> None:
    whole = request(ASK)
    with connect(port) as slow:
        for begin in range(0, len(whole), 20):
            assert app.state.runtime.admission.admitted == 0  # no place is taken before the request is whole
            slow.sendall(whole[begin : begin + 20])
            assert ask(port, "/encode", {"inputs": ["a"]}).status_code == 200
        assert slow.recv(12) == b"HTTP/1.1 200"
    at_rest(app)


def test_a_body_that_never_comes_to_its_end_is_told_so_and_let_go(checkpoint: Path) -> None:
    app = create_app(Settings(request_timeout=0.5), {"tiny": str(checkpoint)})
    with listening(app) as port, connect(port) as slow:
        slow.sendall(request(ASK)[:-5])
        assert slow.recv(12) == b"HTTP/1.1 504"
        at_rest(app)


SHOW = "show a token"  # which only streams do
STAGES: dict[str, tuple[Any, str]] = {
    "tokenise": (opening, "source_tokens"),
    "encode": (engine, "encode"),
    "make a message": (opening.wire, "encode"),
    "read a message": (opening.wire, "decode"),
    "compose": (opening, "compose"),
    "check the receiver": (opening, "check_receiver"),
    "soften": (opening, "soften"),
    "submit": (continuous.ContinuousEngine, "_begin"),
    "take a token": (answer.OutputTokens, "add"),
    SHOW: (answer.OutputText, "read"),
    "finish": (answer, "Generation"),
    "find": (MemoryStore, "get_many"),
    "keep": (MemoryStore, "put_many"),
    "count": (Metrics, "observe_times"),
    "measure": (answering, "diversity"),
    "charge": (Limiter, "charge"),
}
LATE = {"finish", "count", "measure", "charge"}  # when a stream has begun for certain


class Broken(Exception):
    """What no part of this product raises."""


def break_once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, at: int = 1) -> Callable[[], int]:
    """Let the ``at``-th call fail; gives how many there were."""
    real, calls = getattr(owner, name), [0]

    def broken(*given: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            raise Broken("a broken part")
        return real(*given, **named)

    monkeypatch.setattr(owner, name, broken)
    return lambda: calls[0]


@pytest.fixture(scope="module")
def faulty(checkpoint: Path) -> Iterator[TestClient]:
    """A service with its cache, so that the store is asked too."""
    app = create_app(Settings(), {"tiny": str(checkpoint)})
    with TestClient(app, "http://127.0.0.1", raise_server_exceptions=False) as client:
        until(lambda: app.state.runtime.models.ready, READY_SECONDS)
        yield client


@pytest.mark.parametrize(
    ("stage", "stream"), [(stage, stream) for stage in STAGES for stream in (False, True) if stream or stage != SHOW]
)
def test_a_part_that_fails_at_any_stage_fails_its_request_and_no_other(
    faulty: TestClient, monkeypatch: pytest.MonkeyPatch, stage: str, stream: bool
) -> None:
    app: Any = faulty.app
    body = {**ASK, "inputs": [{"text": f"{stage} {stream}"}] * 2, "n": 2, "stream": stream}
    calls = break_once(monkeypatch, *STAGES[stage])
    response = faulty.post("/generate", json=body)
    monkeypatch.undo()
    assert calls() >= 1
    if stream and (stage in LATE or response.status_code == 200):
        assert response.status_code == 200 and "event: done" not in response.text
        error = json.loads(response.text.split("event: error\ndata: ")[1].splitlines()[0])["error"]
    else:
        assert response.status_code == 500, response.text
        error = response.json()["error"]
    assert error["type"] in ("InternalError", "InferenceFailed")
    assert set(error) == {"type", "message", "param", "request_id"} and "a broken part" not in error["message"]
    assert error["request_id"] == response.headers["x-request-id"]
    at_rest(app)
    again = faulty.post("/generate", json=body)
    assert again.status_code == 200 and ("event: done" in again.text or not stream)
    at_rest(app)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_part_that_fails_late_ends_a_stream_of_openai_s_with_the_error_too(
    faulty: TestClient, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    asked = {"prompt": "Where?"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "Where?"}]}
    break_once(monkeypatch, *STAGES["measure"])
    response = faulty.post(path, json={"model": "tiny", "source": "a", "max_tokens": 4, "stream": True, **asked})
    last = json.loads(response.text.strip().splitlines()[-1].removeprefix("data: "))
    assert last["error"]["type"] == "server_error" and last["error"]["code"] == "InternalError"
    at_rest(faulty.app)  # type: ignore[arg-type]


def test_a_part_that_fails_for_one_output_of_many_gives_up_the_others(
    faulty: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_once(monkeypatch, *STAGES["submit"], at=3)
    assert faulty.post("/generate", json={**LONG, "n": 4}).status_code == 500
    at_rest(faulty.app)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["load", "open_engine"])
def test_a_model_or_engine_that_cannot_be_brought_in_fails_those_who_wait_and_is_tried_again(
    faulty: TestClient, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    app: Any = faulty.app
    at_rest(app)
    until(lambda: faulty.post("/admin/bridges/tiny/unload").status_code == 200)
    break_once(monkeypatch, app.state.runtime.residency if name == "load" else engines, name)
    with ThreadPoolExecutor(4) as callers:
        asked = [callers.submit(faulty.post, "/generate", json=ASK) for _ in range(4)]
        statuses = {done.result(HELD_SECONDS).status_code for done in asked}
    assert 500 in statuses and statuses <= {200, 500}  # who came after the failure met none
    at_rest(app)
    assert faulty.post("/generate", json=ASK).status_code == 200
    at_rest(app)


def test_a_start_that_fails_ends_the_process_before_it_counts_as_started(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_app(Settings(), {"tiny": str(checkpoint)})

    async def fails() -> None:
        raise RuntimeError("as it should")

    monkeypatch.setattr(app.state.runtime, "start", fails)
    started: list[bool] = []
    before = {number: signal.getsignal(number) for number in ENDING}
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(SystemExit):
        serve(app, [listener], lambda: started.append(True))
    for number, handler in before.items():
        signal.signal(number, handler)
    assert not started
