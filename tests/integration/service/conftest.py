"""The real application over a tiny bridge, in this process."""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingUnixStreamServer
from threading import Event, Thread
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from latentwire.service.app import create_app
from latentwire.service.settings import Settings
from latentwire.service.store import redis as redis_store

Start = Callable[..., TestClient]
READY_SECONDS = 60.0
HELD_SECONDS = 20.0


def until(condition: Callable[[], Any], seconds: float = HELD_SECONDS) -> None:
    """Wait for what another thread is about to do; a promise that is broken ends the test."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def wait_until_ready(client: TestClient) -> None:
    until(lambda: client.get("/health/ready").status_code == 200, READY_SECONDS)


@pytest.fixture
def start(checkpoint: Path) -> Iterator[Start]:
    """Start services with other settings, or other bridges; all are stopped after the test."""
    with ExitStack() as stack:

        def run(
            settings: Settings | None = None,
            checkpoints: dict[str, str] | None = None,
            *,
            ready: bool = True,
            before: Callable[[FastAPI], object] = lambda app: None,
        ) -> TestClient:
            app = create_app(settings or Settings(), checkpoints or {"tiny": str(checkpoint)})
            before(app)
            client = stack.enter_context(TestClient(app, "http://127.0.0.1", raise_server_exceptions=False))
            if ready:
                wait_until_ready(client)
            return client

        yield run


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is no slow Redis where a test does not mean it to be."""
    monkeypatch.setattr(redis_store, "WAIT_SECONDS", HELD_SECONDS)


class Slow(ThreadingUnixStreamServer):
    """Redis behind somebody with whom every answer takes ``seconds``, by the clock that a store goes by."""

    daemon_threads = True

    def __init__(self, path: Path, redis_path: Path | str) -> None:
        self.seconds = self.now = 0.0
        self.redis_path = str(redis_path)
        super().__init__(str(path), _Passing)

    def monotonic(self) -> float:
        return self.now


class _Passing(BaseRequestHandler):
    server: Slow

    def handle(self) -> None:
        with socket.socket(socket.AF_UNIX) as answers:
            answers.connect(self.server.redis_path)
            Thread(target=self.ask, args=(answers,), daemon=True).start()
            while answer := answers.recv(65536):
                self.server.now += self.server.seconds
                self.request.sendall(answer)

    def ask(self, answers: socket.socket) -> None:
        with suppress(OSError):  # either side may have hung up
            while question := self.request.recv(65536):
                answers.sendall(question)
            answers.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Slow]]:
    """Puts somebody slow before a Redis; a request may wait 50 seconds by the same clock."""
    monkeypatch.setattr(redis_store, "WAIT_SECONDS", 50.0)
    monkeypatch.setattr(redis_store, "ENOUGH_SECONDS", 25.0)
    with ExitStack() as stack:

        def before(redis_path: Path | str) -> Slow:
            server = stack.enter_context(Slow(tmp_path / "slow", redis_path))
            stack.callback(server.shutdown)
            Thread(target=server.serve_forever, daemon=True).start()
            monkeypatch.setattr(redis_store, "time", server)
            return server

        yield before


class Gate:
    """A function that, while the gate is closed, does not return; ``calls`` and ``named`` hold what it was given."""

    def __init__(self, real: Callable[..., Any], only: object) -> None:
        self.real, self.only = real, only
        self.calls: list[tuple[Any, ...]] = []
        self.named: list[dict[str, Any]] = []
        self.entered, self.opened = Event(), Event()

    def __call__(self, *given: Any, **named: Any) -> Any:
        self.calls.append(given)
        self.named.append(named)
        if self.only is None or given[0] == self.only:
            self.entered.set()
            assert self.opened.wait(HELD_SECONDS)
        return self.real(*given, **named)


@pytest.fixture
def hold(start: Start, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Gate]]:
    """Put a gate before a function that the device's thread calls; it is opened before any service must stop."""
    gates: list[Gate] = []

    def install(owner: object, name: str, only: object = None) -> Gate:
        gate = Gate(getattr(owner, name), only)
        monkeypatch.setattr(owner, name, gate)
        gates.append(gate)
        return gate

    yield install
    for gate in gates:
        gate.opened.set()


@pytest.fixture(scope="module")
def client(checkpoint: Path) -> Iterator[TestClient]:
    """One service with default settings for the tests of a file."""
    app = create_app(Settings(), {"tiny": str(checkpoint)})
    with TestClient(app, "http://127.0.0.1", raise_server_exceptions=False) as client:
        wait_until_ready(client)
        yield client


@pytest.fixture
def refused(client: TestClient) -> Iterator[Callable[..., dict[str, Any]]]:
    """Post something bad: the answer is a clear 4xx in the one body. Afterwards the service still works."""

    def post(path: str, status: int, *, on: TestClient = client, **request: Any) -> dict[str, Any]:
        response = on.post(path, **request)
        assert response.status_code == status, response.text
        assert set(response.json()) == {"error"}
        error: dict[str, Any] = response.json()["error"]
        assert set(error) == {"type", "message", "param", "request_id"}
        assert error["message"]
        assert error["request_id"] == response.headers["x-request-id"]
        assert "Traceback" not in response.text
        assert on.post("/encode", json={"inputs": ["still here"]}).status_code == 200
        return error

    yield post


@pytest.fixture(scope="session")
def samples() -> Callable[[TestClient], dict[tuple[str, ...], float]]:
    """Read /metrics into {(name, label value, …): number}."""

    def read(client: TestClient) -> dict[tuple[str, ...], float]:
        response = client.get("/metrics")
        assert response.status_code == 200
        return {
            (sample.name, *(sample.labels[key] for key in sorted(sample.labels))): sample.value
            for family in text_string_to_metric_families(response.text)
            for sample in family.samples
        }

    return read


@pytest.fixture
def app(client: TestClient) -> FastAPI:
    """The application behind ``client``."""
    assert isinstance(client.app, FastAPI)
    return client.app
