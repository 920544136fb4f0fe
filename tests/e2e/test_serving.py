"""A service as a process: how it ends, on which ports it listens, what it does under load."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.ports import free_port

READY_SECONDS = 120.0
ENDS_SECONDS = 60.0
ASK: dict[str, Any] = {"inputs": [{"text": "Mara lives in Rome."}], "prompt": "Where?", "max_tokens": 24}


Serve = Callable[..., tuple[subprocess.Popen[str], str]]


@pytest.fixture
def serve(checkpoint: Path, tmp_path: Path) -> Iterator[Serve]:
    """Start a real process, wait until it is ready; killed after the test."""
    processes: list[subprocess.Popen[str]] = []

    def start(*flags: str, code: str | None = None, **variables: str) -> tuple[subprocess.Popen[str], str]:
        port = free_port()
        main = ["-m", "latentwire"] if code is None else ["-c", textwrap.dedent(code)]
        command = [sys.executable, *main, "serve", "--bridge", f"tiny={checkpoint}", "--port", str(port), *flags]
        with (tmp_path / "serve.log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, text=True, env={**os.environ, **variables})
        processes.append(process)
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + READY_SECONDS
        while True:
            assert process.poll() is None, (tmp_path / "serve.log").read_text()
            assert time.monotonic() < deadline
            try:
                if httpx.get(f"{url}/health/ready").status_code == 200:
                    return process, url
            except httpx.TransportError:
                pass
            time.sleep(0.05)

    yield start
    for process in processes:
        process.kill()
        process.wait()


@contextmanager
def callers(url: str, count: int) -> Iterator[Counter[str]]:
    """Ask over and over on kept connections; what came of it is counted. A request that got no answer is ``lost``."""
    met: Counter[str] = Counter()
    stop = threading.Event()

    def call(number: int) -> None:
        with httpx.Client(base_url=url, timeout=60.0) as client:
            while not stop.is_set():
                try:
                    body = {**ASK, "temperature": 1.0, "seed": number, "stream": bool(number % 2)}
                    response = client.post("/generate", json=body)
                    whole = "event: done" in response.text if body["stream"] else "outputs" in response.text
                    met[str(response.status_code) if response.status_code != 200 or whole else "torn"] += 1
                    if response.status_code == 503:  # told to go elsewhere, as a proxy would
                        return
                except httpx.ConnectError:  # nobody listens any more: never accepted
                    met["refused"] += 1
                    return
                except httpx.TransportError as error:
                    met[f"lost: {error!r}"] += 1

    threads = [threading.Thread(target=call, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield met
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_service_that_is_told_to_end_while_it_starts_ends_with_code_0_and_leaves_no_file(
    checkpoint: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """It has said where it listens, to people and to probes, and its server does not hear signals yet."""
    code = f"""
        import gc, os
        from latentwire.service.__main__ import main

        gc.freeze = lambda: os.kill(os.getpid(), {number.value})
        main()
    """
    command = [sys.executable, "-c", textwrap.dedent(code), "serve", "--bridge", f"tiny={checkpoint}", "--port", "0"]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "LW_FRONTENDS": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=READY_SECONDS)
    assert (done.returncode, done.stderr) == (0, "") and "listens on" in done.stdout
    assert not list(tmp_path.glob("latentwire*"))


def test_sigterm_under_load_loses_no_accepted_request_and_exits_0(serve: Serve) -> None:
    process, url = serve()
    with callers(url, 8) as met:
        until(lambda: met["200"] >= 16)
        process.send_signal(signal.SIGTERM)
        assert process.wait(ENDS_SECONDS) == 0
    assert set(met) <= {"200", "503", "refused"}, met


def test_what_is_still_running_after_the_drain_time_gets_an_error_not_silence(serve: Serve) -> None:
    process, url = serve(LW_DRAIN_TIMEOUT="0.2", LW_MAX_TOKENS="100000")
    statuses: list[int] = []
    slow = {**ASK, "max_tokens": 200, "n": 16, "temperature": 1.0, "inputs": ASK["inputs"] * 4}
    caller = threading.Thread(
        target=lambda: statuses.append(httpx.post(f"{url}/generate", json=slow, timeout=60).status_code)
    )
    caller.start()
    until(lambda: running_rows(url) > 0)
    process.send_signal(signal.SIGTERM)
    assert process.wait(ENDS_SECONDS) == 0
    caller.join()
    assert statuses in ([503], [200])  # 200 only where the device was quicker than the drain time


def test_a_stopping_service_is_not_ready_and_tells_new_callers_to_come_back(serve: Serve) -> None:
    process, url = serve()
    slow = {**ASK, "max_tokens": 200, "n": 16, "temperature": 1.0, "inputs": ASK["inputs"] * 4}
    caller = threading.Thread(target=lambda: httpx.post(f"{url}/generate", json=slow, timeout=60))
    caller.start()
    until(lambda: running_rows(url) > 0)
    process.send_signal(signal.SIGTERM)
    until(lambda: httpx.get(f"{url}/health/ready").status_code == 503)
    assert httpx.get(f"{url}/health/live").status_code == 200
    response = httpx.post(f"{url}/generate", json=ASK)
    assert response.status_code == 503 and int(response.headers["retry-after"]) >= 1
    assert response.json()["error"]["type"] == "NotReady" and response.headers["connection"] == "close"
    assert process.wait(ENDS_SECONDS) == 0
    caller.join()


def test_a_service_that_leaves_answers_new_requests_until_balancers_have_noticed(serve: Serve) -> None:
    process, url = serve(LW_DRAIN_DELAY="600")
    process.send_signal(signal.SIGTERM)
    until(lambda: httpx.get(f"{url}/health/ready").status_code == 503)
    assert httpx.get(f"{url}/health/live").status_code == 200
    response = httpx.post(f"{url}/generate", json=ASK)
    assert (response.status_code, response.headers["connection"]) == (200, "close")
    process.send_signal(signal.SIGTERM)
    assert process.wait(ENDS_SECONDS) == 0


def test_an_engine_that_dies_ends_the_process_with_an_error_for_its_supervisor(serve: Serve) -> None:
    process, url = serve(
        code="""
        import sys
        from latentwire.bridge.sampling import Draws
        from latentwire.service.__main__ import main

        def broken(self, scores, numbers):
            raise ValueError("a broken part")

        Draws.draw = broken
        main()
        """,
        LW_FRONTENDS="0",
    )
    assert httpx.post(f"{url}/generate", json=ASK).status_code == 200
    assert httpx.post(f"{url}/generate", json={**ASK, "temperature": 1.0}).status_code == 500
    assert process.wait(ENDS_SECONDS) == 1


def test_operators_can_have_a_port_of_their_own(serve: Serve) -> None:
    port = free_port()
    _, url = serve(LW_ADMIN_PORT=str(port))
    admin = f"http://127.0.0.1:{port}"
    found = {
        (base == admin, path): httpx.get(f"{base}{path}").status_code
        for base in (url, admin)
        for path in ("/metrics", "/bridges", "/health/live", "/admin/bridges/tiny/load")
    }
    assert found == {
        (False, "/metrics"): 404, (False, "/bridges"): 200, (False, "/health/live"): 200,
        (False, "/admin/bridges/tiny/load"): 404,
        (True, "/metrics"): 200, (True, "/bridges"): 404, (True, "/health/live"): 200,
        (True, "/admin/bridges/tiny/load"): 405,
    }  # fmt: skip
    assert httpx.post(f"{admin}/admin/bridges/tiny/pin").json()["pinned"] is True
    for path in ("/metrics", "/health/live", "/admin/bridges/tiny/load"):
        assert httpx.get(f"{admin}{path}", headers={"host": "evil.example"}).status_code == 403
    assert httpx.post(f"{url}/admin/bridges/tiny/pin").json()["error"]["message"].endswith("is not on this port")


def test_all_addresses_of_both_families_are_served_and_probes_find_the_service_where_flags_put_it(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # probes of a container see its variables, and not the flags
    admin = free_port()
    process, url = serve("--host", "::", "--insecure", LW_ADMIN_PORT=str(admin), LW_PORT="9")
    port, probe = url.rpartition(":")[2], [sys.executable, "-Pm", "latentwire.service.health"]
    for host in ("127.0.0.1", "[::1]"):
        assert httpx.post(f"http://{host}:{port}/generate", json=ASK).status_code == 200
        assert httpx.get(f"http://{host}:{port}/metrics").status_code == 404
        assert httpx.get(f"http://{host}:{admin}/metrics").status_code == 200
    for question in ("live", "ready"):
        assert subprocess.run([*probe, question], check=True, capture_output=True, text=True).stdout
    assert f"listens on http://[::]:{port} (page: http://[::]:{port}/, " in (tmp_path / "serve.log").read_text()
    process.send_signal(signal.SIGTERM)
    assert process.wait(ENDS_SECONDS) == 0
    assert subprocess.run(probe, capture_output=True).returncode == 1
    assert not list(tmp_path.glob("latentwire*"))


def test_links_to_a_service_called_as_our_prefix_are_named_and_left_aside(serve: Serve, tmp_path: Path) -> None:
    serve(LW_PORT="tcp://10.0.0.1:80", LW_SERVICE_HOST="10.0.0.1", LW_SERVICE_PORT="80")
    (line,) = (line for line in (tmp_path / "serve.log").read_text().splitlines() if "WARNING" in line)
    assert "Kubernetes" in line and line.endswith(": LW_PORT, LW_SERVICE_HOST, LW_SERVICE_PORT")


def running_rows(url: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("latentwire_running_rows "))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + ENDS_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
