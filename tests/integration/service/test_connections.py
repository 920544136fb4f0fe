"""Connections as callers and proxies use them: idle ones end, halves may be shut, refusals come before bodies.

nginx and HAProxy are the real ones, where they are installed, each with a configuration of its own.
"""

import asyncio
import getpass
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest
from fastapi import FastAPI
from pydantic import ByteSize

from latentwire.service.app import create_app
from latentwire.service.cli import server as serving
from latentwire.service.settings import Settings
from tests.integration.service.conftest import HELD_SECONDS, until
from tests.integration.service.test_storm import ASK, ask, at_rest, connect, listening, request, rest
from tests.ports import free_port

SLOW_SECONDS = 1.2  # a dozen interim answers long
IDLE_SECONDS = 0.3
MOST, TOGETHER = 100_000, 250_000  # bytes of one body, and of all
HEAD = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
TOOLS = Path(sys.executable).parent.parent / "proxies"  # where the Makefile unpacks what is not installed


@pytest.fixture(scope="module")
def app(checkpoint: Path) -> FastAPI:
    settings = Settings(encode_cache=False, max_body=ByteSize(MOST), max_bodies=ByteSize(TOGETHER))
    return create_app(settings, {"tiny": str(checkpoint)})


@pytest.fixture(scope="module")
def port(app: FastAPI) -> Iterator[int]:
    """A service that waits for a request no longer than ``IDLE_SECONDS``."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(serving, "KEEP_ALIVE_SECONDS", IDLE_SECONDS)
        with listening(app) as port:
            assert ask(port).status_code == 200
            yield port


@pytest.fixture
def slow(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer takes its time."""
    (engine,) = app.state.runtime.models.engines.all()
    forward = engine.lm.model.forward
    pauses = iter([SLOW_SECONDS])

    def slowly(*given: Any, **named: Any) -> Any:
        time.sleep(next(pauses, 0))
        return forward(*given, **named)

    monkeypatch.setattr(engine.lm.model, "forward", slowly)


# A request has to come


@pytest.mark.parametrize("sent", [b"", HEAD[:20], HEAD])
@pytest.mark.parametrize("before", [0, 1])
def test_a_connection_on_which_no_request_comes_is_closed(port: int, sent: bytes, before: int) -> None:
    with connect(port) as caller:
        for _ in range(before):
            caller.sendall(request(ASK))
            assert caller.recv(1 << 16).startswith(b"HTTP/1.1 200")
        caller.sendall(sent)
        rest(caller)  # to its end; or the socket's own time is over, which is an error


def trickled(caller: socket.socket) -> bool:
    """Whether the connection is closed on one who goes on sending a byte now and then."""
    caller.settimeout(IDLE_SECONDS / 10)
    deadline = time.monotonic() + HELD_SECONDS
    with suppress(ConnectionError):
        while time.monotonic() < deadline:
            caller.sendall(b"x")
            with suppress(TimeoutError):
                if caller.recv(1 << 16) == b"":
                    return True
        return False
    return True


def test_bytes_that_never_become_a_request_hold_no_connection_open(port: int) -> None:
    with connect(port) as caller:
        caller.sendall(HEAD + b"X-Slow: ")
        assert trickled(caller)


def test_a_body_that_trickles_in_after_its_refusal_holds_no_connection_open(port: int) -> None:
    with connect(port) as caller:
        caller.sendall(HEAD.replace(b"localhost", b"evil.example") + b"Content-Length: 90000\r\n\r\n")
        assert caller.recv(12) == b"HTTP/1.1 403"
        assert trickled(caller)


def test_a_caller_who_is_answered_slowly_is_not_taken_for_an_idle_one(port: int, slow: None) -> None:
    whole = request(ASK)
    with connect(port) as caller:
        for begin in range(0, len(whole), 40):
            caller.sendall(whole[begin : begin + 40])
            if begin >= whole.index(b"\r\n\r\n"):
                time.sleep(IDLE_SECONDS / 2)  # the body takes longer than a request may be awaited; so does the answer
        assert caller.recv(12) == b"HTTP/1.1 200"


# Bodies


def test_a_body_is_asked_for_when_it_is_wanted_and_a_refusal_instead_ends_the_connection(port: int) -> None:
    head, _, body = request(ASK).partition(b"\r\n\r\n")
    with connect(port) as caller:
        caller.sendall(head + b"\r\nExpect: 100-continue\r\n\r\n")
        assert caller.recv(1 << 16) == b"HTTP/1.1 100 Continue\r\n\r\n"
        caller.sendall(body)
        assert caller.recv(1 << 16).startswith(b"HTTP/1.1 200")
    with connect(port) as caller:
        caller.sendall(head.replace(b"localhost", b"evil.example") + b"\r\nExpect: 100-continue\r\n\r\n")
        answer = rest(caller)  # at once: the connection is not left to its idle time
    assert answer.startswith(b"HTTP/1.1 403") and b"\r\nconnection: close\r\n" in answer


def test_a_refusal_reaches_one_who_is_still_sending_although_the_connection_ends_with_it(port: int) -> None:
    """To close it at once would make the caller's machine forget what it has received."""
    with connect(port) as caller:
        caller.sendall(HEAD.replace(b"/1.1", b"/1.0") + f"Content-Length: {20 * MOST}\r\n\r\n".encode())
        assert caller.recv(12) == b"HTTP/1.1 413"
        caller.sendall(b" " * 20 * MOST)
        assert b'"TooLarge"' in rest(caller)


def test_bodies_under_way_have_a_common_bound(app: FastAPI, port: int) -> None:
    at_rest(app)
    bodies = taken(app)
    announced = HEAD + f"Content-Length: {MOST}\r\n\r\n".encode()
    with connect(port) as first, connect(port) as second, connect(port) as empty:
        for caller, sent in ((empty, 0), (first, MOST - 1), (second, MOST - 1)):
            caller.sendall(announced + b" " * sent)
        until(lambda: bodies() == 2 * (MOST - 1))
        refused = ask(port, body={**ASK, "prompt": "a" * (MOST // 2)})
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        said = refused.json()["error"]
        assert said["type"] == "Overloaded" and f"over {TOGETHER} bytes" in said["message"]
        assert ask(port).status_code == 200  # what fits is answered
        second.close()
        until(lambda: bodies() == MOST - 1)
        assert ask(port, body={**ASK, "prompt": "a" * (MOST // 2)}).status_code == 422  # read, and then too long
    until(lambda: bodies() == 0)


def taken(app: FastAPI) -> Callable[[], int]:
    """Reads the bytes of bodies under way."""
    layer: Any = app.middleware_stack
    while not hasattr(layer, "bodies"):
        layer = layer.app
    return lambda: int(layer.bodies.taken.all)


# Half-closed connections


@contextmanager
def half_closing(port: int) -> Iterator[tuple[int, list[bytes]]]:
    """A relay that shuts its half of the connection once the request is there: its port, and the answers it saw."""
    answers: list[bytes] = []

    def relay(caller: socket.socket) -> None:
        with caller, connect(port) as service:
            sent = b""
            while not (found := whole(sent)):
                sent += caller.recv(1 << 16)
            assert found
            service.sendall(sent)
            service.shutdown(socket.SHUT_WR)
            answers.append(b"")
            while got := service.recv(1 << 16):
                answers[-1] += got
                caller.sendall(got)

    def accept() -> None:
        with suppress(OSError):
            while True:
                relay(bound.accept()[0])

    with socket.create_server(("127.0.0.1", 0)) as bound:
        thread = threading.Thread(target=accept)
        thread.start()
        yield bound.getsockname()[1], answers
        bound.shutdown(socket.SHUT_RDWR)
        thread.join()


def whole(sent: bytes) -> bool:
    head, end, body = sent.partition(b"\r\n\r\n")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    return bool(end) and len(body) >= int(fields[b"content-length"])


def with_httpx(port: int, body: dict[str, Any]) -> tuple[int, str]:
    answer = ask(port, body=body)
    return answer.status_code, answer.text


def with_aiohttp(port: int, body: dict[str, Any]) -> tuple[int, str]:
    async def scenario() -> tuple[int, str]:
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"http://127.0.0.1:{port}/generate", json=body) as answer,
        ):
            return answer.status, await answer.text()

    return asyncio.run(scenario())


def with_the_standard_library(port: int, body: dict[str, Any]) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=HELD_SECONDS)
    connection.request("POST", "/generate", json.dumps(body), {"content-type": "application/json"})
    answer = connection.getresponse()
    said = answer.status, answer.read().decode()
    connection.close()
    return said


Library = Callable[[int, dict[str, Any]], tuple[int, str]]
LIBRARIES = [with_httpx, with_aiohttp, with_the_standard_library]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("library", LIBRARIES)
def test_libraries_skip_the_interim_answers_of_a_half_closed_connection(
    port: int, slow: None, library: Library, stream: bool
) -> None:
    with half_closing(port) as (relay, answers):
        status, text = library(relay, {**ASK, "stream": stream})
    assert status == 200 and ("event: done" if stream else '"finish_reason"') in text
    assert answers[0].count(b"HTTP/1.1 100 Continue\r\n\r\n") > 2


# Proxies

NGINX = """
user {user}; daemon off; pid {folder}/pid; error_log {folder}/error.log; worker_processes 1;
events {{}}
http {{
    access_log off; client_max_body_size 0; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    upstream service {{ server 127.0.0.1:{service}; keepalive 4; }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://service; proxy_http_version 1.1;
            proxy_set_header Connection ""; proxy_set_header Host $host;
        }}
    }}
}}
"""
HAPROXY = """
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
listen service
    bind 127.0.0.1:{port}
    {options}
    server one 127.0.0.1:{service}
"""
PROXIES: dict[str, tuple[str, str, str]] = {  # program, its flag for a configuration, the configuration
    "nginx": ("nginx", "-c", NGINX),
    "nginx, HTTP/1.0": ("nginx", "-c", NGINX.replace("proxy_http_version 1.1", "proxy_http_version 1.0")),
    "haproxy": ("haproxy", "-f", HAPROXY),
    "haproxy, abortonclose": ("haproxy", "-f", HAPROXY.replace("{options}", "option abortonclose")),
}


def program(name: str) -> tuple[str, dict[str, str]]:
    """Where a proxy is, and the environment it needs; without one the test says so."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:{TOOLS}/usr/sbin")
    if found is None:
        pytest.skip(f"{name} is not installed: apt-get install {name}")
    libraries = ":".join(map(str, TOOLS.glob("usr/lib/*-linux-gnu")))
    return found, {**os.environ, **({"LD_LIBRARY_PATH": libraries} if libraries else {})}


@contextmanager
def proxy(kind: str, service: int, folder: Path) -> Iterator[int]:
    """A proxy before the service: its port."""
    name, flag, text = PROXIES[kind]
    command, environment = program(name)
    port = free_port()
    configuration = folder / "proxy.conf"
    configuration.write_text(text.format(folder=folder, port=port, service=service, options="", user=getpass.getuser()))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([command, flag, configuration], env=environment, stdout=log, stderr=log)
    try:
        until(lambda: process.poll() is not None or answers(port))
        assert process.poll() is None, (folder / "log").read_text()
        yield port
    finally:
        process.terminate()
        process.wait(HELD_SECONDS)


def answers(port: int) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(f"http://127.0.0.1:{port}/health/live").status_code == 200
    return False


@pytest.mark.parametrize("kind", PROXIES)
def test_slow_answers_come_through_a_proxy_whole_and_streamed(
    app: FastAPI, port: int, slow: None, tmp_path: Path, kind: str
) -> None:
    with proxy(kind, port, tmp_path) as front:
        for library in LIBRARIES:
            for stream in (False, True):
                status, text = library(front, {**ASK, "stream": stream})
                assert status == 200 and ("event: done" if stream else '"finish_reason"') in text
        head, _, body = request(ASK).partition(b"\r\n\r\n")
        with connect(front) as caller:
            caller.sendall(head + b"\r\nExpect: 100-continue\r\n\r\n")
            assert caller.recv(1 << 16) == b"HTTP/1.1 100 Continue\r\n\r\n"
            caller.sendall(body)
            assert caller.recv(1 << 16).startswith(b"HTTP/1.1 200")
    at_rest(app)


@pytest.mark.parametrize("kind", PROXIES)
def test_what_is_refused_before_its_body_is_refused_through_a_proxy_too(port: int, tmp_path: Path, kind: str) -> None:
    with proxy(kind, port, tmp_path) as front:
        for _ in range(3):
            refused = ask(front, body={**ASK, "prompt": "a" * 20 * MOST})
            assert (refused.status_code, refused.json()["error"]["type"]) == (413, "TooLarge")
        assert ask(front).status_code == 200


@pytest.mark.parametrize("kind", PROXIES)
def test_behind_a_proxy_a_half_closed_connection_is_answered_or_ended_and_no_interim_answer_is_taken_for_the_last(
    app: FastAPI, port: int, slow: None, tmp_path: Path, kind: str
) -> None:
    """HAProxy keeps the half to itself; nginx, and HAProxy told so, take such a caller for one who left."""
    with proxy(kind, port, tmp_path) as front:
        with connect(front) as caller:
            caller.sendall(request(ASK))
            caller.shutdown(socket.SHUT_WR)
            answer = rest(caller)
        assert answer.startswith(b"HTTP/1.1 200") if kind == "haproxy" else b" 100 " not in answer
        at_rest(app)
        assert ask(front).status_code == 200


@pytest.mark.parametrize("kind", [kind for kind in PROXIES if kind != "haproxy"])
def test_the_work_of_a_caller_who_leaves_a_proxy_is_let_go(
    app: FastAPI, port: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    (engine,) = app.state.runtime.models.engines.all()
    forward, opened = engine.lm.model.forward, threading.Event()
    monkeypatch.setattr(engine.lm.model, "forward", lambda *a, **k: opened.wait(HELD_SECONDS) and forward(*a, **k))
    try:
        with proxy(kind, port, tmp_path) as front, connect(front) as leaves:
            leaves.sendall(request(ASK))
            until(lambda: engine.running == 1)
            leaves.close()
            until(lambda: engine.running == 0)
    finally:
        opened.set()
    at_rest(app)
