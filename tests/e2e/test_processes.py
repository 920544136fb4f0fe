"""HTTP and the models in processes of their own: one service to whoever calls, whichever of the two is killed."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from latentwire.bridge.checkpoint import BUILTIN_BRIDGE, read_manifest
from latentwire.service.cli.demo import running
from latentwire.service.processes.door import SECRET_BYTES
from latentwire.service.processes.supervisor import ROLES
from tests.ports import free_port

WAIT_SECONDS = 60.0
SOURCE = "Mara lives in Rome. Otto wants seven lamps."
ASK: dict[str, Any] = {"inputs": [{"text": SOURCE}], "prompt": "Where does Mara live?", "max_tokens": 24}
SLOW = {**ASK, "max_tokens": 200, "n": 16, "temperature": 1.0, "inputs": ASK["inputs"] * 4}
OF_A_CALL = {"id", "timing", "request_id", "created", "system_fingerprint"}
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "encode": ("/encode", {"inputs": [SOURCE, "Ben sings."], "dtype": "rq4"}),
    "generate": ("/generate", {**ASK, "logprobs": 3}),
    "sampled": ("/generate", {**ASK, "temperature": 1.0, "seed": 7, "n": 3, "stop": ["\n"]}),
    "sources": ("/generate", {**ASK, "inputs": [{"sources": [{"text": SOURCE}, {"text": "Ben sings."}]}]}),
    "direct": ("/generate", {**ASK, "condition": "direct"}),
    "fallback": ("/generate", {**ASK, "fallback": "text"}),
    "score": ("/score", {"inputs": ASK["inputs"], "prompt": ASK["prompt"], "choices": [" Rome", " Oslo"]}),
    "read": ("/read", {"inputs": ASK["inputs"], "against": [SOURCE]}),
    "chat": ("/v1/completions", {"model": "demo", "prompt": "Who?", "text": SOURCE, "max_tokens": 5}),
    "unknown bridge": ("/generate", {**ASK, "bridge": "nobody"}),
    "too long for the receiver": ("/generate", {**ASK, "prompt": "lamp " * 600}),
    "no text": ("/encode", {"inputs": [""]}),
}


@dataclass
class Service:
    """A service, and who makes it up."""

    url: str
    parent: psutil.Process
    log: Path

    def process(self, role: str) -> psutil.Process:
        """The one of a role, as soon as it is there: that of ``http`` listens on TCP, that of the models does not."""
        found: list[psutil.Process] = []

        def look() -> bool:
            children = self.parent.children()
            try:
                ports = {child.pid: child.net_connections("tcp") for child in children}
            except psutil.NoSuchProcess:  # it ended meanwhile
                return False
            listens = {pid: any(port.status == "LISTEN" for port in found) for pid, found in ports.items()}
            found[:] = [child for child in children if listens[child.pid] == (role == "http")]
            return len(children) == 2 and len(found) == 1

        until(look)
        return found[0]

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health/ready").status_code == 200
        except httpx.TransportError:
            return False

    def rows(self) -> float:
        """Rows in a batch now."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return next((float(line.split()[1]) for line in lines if line.startswith("latentwire_running_rows ")), 0.0)


@contextmanager
def serving(folder: Path, bridge: str = "builtin", **variables: str) -> Iterator[Service]:
    port = free_port()
    with running(bridge, port, folder / "log", **variables) as process:
        yield Service(f"http://127.0.0.1:{port}", psutil.Process(process.pid), folder / "log")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Two processes and their parent; each test leaves it ready."""
    with serving(tmp_path_factory.mktemp("two"), LW_FRONTENDS="1", LW_STALL_TIMEOUT="1") as service:
        yield service


@contextmanager
def callers(url: str, count: int) -> Iterator[Counter[str]]:
    """Ask over and over; what came of it is counted."""
    met: Counter[str] = Counter()
    stop = threading.Event()

    def call(number: int) -> None:
        with httpx.Client(base_url=url, timeout=WAIT_SECONDS) as client:
            while not stop.is_set():
                try:
                    response = client.post("/generate", json={**ASK, "temperature": 1.0, "stream": bool(number % 2)})
                    ended = re.search(r"event: done|event: error|outputs|NotReady", response.text)
                    met[str(response.status_code) if ended else "torn"] += 1
                    if response.status_code == 503:
                        assert int(response.headers["retry-after"]) >= 1
                        time.sleep(0.05)
                except httpx.TimeoutException:
                    met["hung"] += 1
                except httpx.TransportError:
                    met["connection lost"] += 1
                    time.sleep(0.05)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield met
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_two_processes_give_the_answers_of_one(service: Service, tmp_path: Path) -> None:
    with serving(tmp_path, LW_FRONTENDS="0") as alone:
        assert not alone.parent.children()
        for name, (path, body) in CALLS.items():
            answers = [httpx.post(f"{at.url}{path}", json=body) for at in (service, alone)]
            assert answers[0].status_code == answers[1].status_code, name
            assert comparable(answers[0].json()) == comparable(answers[1].json()), name
        for path in ("/bridges", "/v1/models", "/openapi.json"):
            both = [comparable(httpx.get(f"{at.url}{path}").json()) for at in (service, alone)]
            assert both[0] == both[1], path
        told = [httpx.get(f"{at.url}/metrics").text for at in (service, alone)]
        names = [set(re.findall(r"^# TYPE (\w+)", text, re.M)) for text in told]
        assert names[0] == names[1]
        assert all('latentwire_output_token_entropy_nats{bridge="demo"}' in text for text in told)


def test_pieces_come_as_they_are_said(service: Service) -> None:
    whole = httpx.post(f"{service.url}/generate", json=ASK).json()["outputs"][0]["text"]
    streamed = httpx.post(f"{service.url}/generate", json={**ASK, "stream": True}).text
    pieces = re.findall(r'event: token\ndata: \{"index": 0, "text": (".*?")\}', streamed)
    assert "".join(map(eval, pieces)) == whole and len(pieces) > 3


def test_a_caller_who_leaves_ends_the_work_of_the_models(service: Service) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{service.url}/generate", json=SLOW, timeout=0.15)
    until(lambda: service.rows() == 0)


def test_an_evaluation_runs_beside_the_models_and_is_asked_for_through_http(service: Service) -> None:
    body = {"bridge": "demo", "task": "world", "limit": 4, "conditions": ["bridge", "none"]}
    made = httpx.post(f"{service.url}/evaluations", json=body, headers={"Idempotency-Key": "once"}).json()
    again = httpx.post(f"{service.url}/evaluations", json=body, headers={"Idempotency-Key": "once"})
    assert again.json()["id"] == made["id"]
    other = httpx.post(f"{service.url}/evaluations", json={**body, "limit": 3}, headers={"Idempotency-Key": "once"})
    assert other.status_code == 409
    where = f"{service.url}/evaluations/{made['id']}"
    until(lambda: httpx.get(where).json()["state"] == "done")
    assert httpx.get(where).json()["report"]["conditions"]["bridge"]["value"] > 0.5
    assert "<html" in httpx.get(f"{where}/report").text
    assert [one["id"] for one in httpx.get(f"{service.url}/evaluations").json()["evaluations"]] == [made["id"]]
    assert httpx.delete(where).json()["state"] == "done"
    assert httpx.get(f"{where[:-1]}?").status_code == 404


def test_models_come_and_go_and_stay_as_operators_say(service: Service) -> None:
    def ask(verb: str) -> Any:
        return httpx.post(f"{service.url}/admin/bridges/demo/{verb}").json()

    until(lambda: service.rows() == 0)
    assert ask("unload")["freed_bytes"] > 0 and httpx.get(f"{service.url}/bridges/demo").json()["loaded"] == {}
    assert len(ask("load")["loaded"]) == 2
    assert ask("pin")["pinned"] is True and ask("unpin")["pinned"] is False


def test_models_killed_under_load_are_started_again_and_nobody_hangs(service: Service) -> None:
    http, models = service.process("http"), service.process("models")
    with callers(service.url, 8) as met:
        until(lambda: met["200"] >= 16)
        models.kill()
        until(lambda: met["503"] >= 1)
        assert httpx.get(f"{service.url}/health/live").status_code == 200
        before = met["200"]
        until(lambda: met["200"] >= before + 16)
    assert set(met) <= {"200", "503"}, met
    assert service.process("http").pid == http.pid and service.process("models").pid != models.pid
    assert "the models process ended with -9; another is started" in service.log.read_text()


def test_http_killed_under_load_is_started_again_over_the_same_models(service: Service) -> None:
    http, models = service.process("http"), service.process("models")
    with callers(service.url, 8) as met:
        until(lambda: met["200"] >= 16)
        http.kill()
        until(lambda: met["connection lost"] >= 1)
        before = met["200"]
        until(lambda: met["200"] >= before + 16)
    assert set(met) <= {"200", "503", "connection lost"}, met
    assert service.process("models").pid == models.pid and service.process("http").pid != http.pid
    until(lambda: service.rows() == 0)  # what nobody waits for is not answered to the end


def test_models_that_hang_fail_liveness_and_requests_end_at_their_deadline(service: Service) -> None:
    until(service.is_ready)
    models = service.process("models")
    models.suspend()
    try:
        assert httpx.post(f"{service.url}/generate", json={**ASK, "timeout_seconds": 0.5}).status_code == 504
        until(lambda: httpx.get(f"{service.url}/health/live").status_code == 503)
    finally:
        models.resume()
    until(lambda: httpx.get(f"{service.url}/health/live").status_code == 200)
    until(lambda: "latentwire_admitted_rows 0.0" in httpx.get(f"{service.url}/metrics").text)
    assert httpx.post(f"{service.url}/generate", json=ASK).status_code == 200


def test_a_process_that_does_not_say_the_secret_cannot_reach_the_models(service: Service) -> None:
    with open("/proc/net/unix", encoding="utf-8") as table:
        address = next(line.split()[-1] for line in table if f"@latentwire-{service.parent.pid}-" in line)
    with socket.socket(socket.AF_UNIX) as end:
        end.connect("\0" + address[1:])
        end.settimeout(WAIT_SECONDS)
        end.sendall(bytes(SECRET_BYTES))
        assert end.recv(100) == b""


@pytest.mark.parametrize("role", ["models", "http"])
def test_a_checkpoint_that_was_replaced_is_read_by_both_processes_when_one_starts_again(
    checkpoint: Path, tmp_path: Path, role: str
) -> None:
    bridge, new = tmp_path / "bridge", read_manifest(checkpoint).bridge_id
    shutil.copytree(BUILTIN_BRIDGE, bridge)
    with serving(tmp_path, str(bridge), LW_FRONTENDS="1") as service:
        before = [service.process(role).pid for role in ROLES]
        shutil.rmtree(bridge)
        shutil.copytree(checkpoint, bridge)
        service.process(role).kill()
        until(lambda: not {service.process(role).pid for role in ROLES} & {*before})
        until(service.is_ready)
        assert httpx.get(f"{service.url}/bridges/demo").json()["bridge_id"] == new
        assert httpx.post(f"{service.url}/generate", json=ASK).status_code == 200
        assert "a checkpoint was replaced" in service.log.read_text()


def test_a_parent_that_is_killed_leaves_nothing_behind(tmp_path: Path) -> None:
    with serving(tmp_path, LW_FRONTENDS="1") as service:
        children = [service.process("http"), service.process("models")]
        caller = threading.Thread(target=lambda: httpx.post(f"{service.url}/generate", json=ASK, timeout=WAIT_SECONDS))
        caller.start()
        service.parent.kill()
        caller.join()
        gone, _ = psutil.wait_procs(children, WAIT_SECONDS)
        assert len(gone) == 2


def started(code: str, folder: Path) -> Service:
    """A service that some code starts."""
    port = free_port()
    with (folder / "log").open("w") as log:
        command = [sys.executable, "-c", code, "serve", "--port", str(port)]
        parent = psutil.Popen(command, stdout=log, stderr=log, env={**os.environ, "LW_FRONTENDS": "1"})
    return Service(f"http://127.0.0.1:{port}", parent, folder / "log")


def test_models_that_are_killed_before_they_were_ready_end_the_service_which_says_so(tmp_path: Path) -> None:
    service = started(KILLED, tmp_path)
    assert service.parent.wait(WAIT_SECONDS) == 1 and not service.is_ready()
    assert "the models process was ended by SIGKILL before it was ready" in service.log.read_text()


def test_a_parent_that_inherits_the_orphans_of_a_container_goes_on(tmp_path: Path) -> None:
    service = started(INHERITING, tmp_path)
    try:
        until(service.is_ready)
        (orphan,) = (child for child in service.parent.children() if child.name() == "sleep")
        orphan.kill()
        until(lambda: not orphan.is_running())
        assert httpx.post(f"{service.url}/generate", json=ASK).status_code == 200
        service.parent.terminate()
        assert service.parent.wait(WAIT_SECONDS) == 0
    finally:
        with suppress(psutil.NoSuchProcess):
            service.parent.kill()


def test_models_that_hang_are_ended_by_force_at_the_second_signal(tmp_path: Path) -> None:
    with serving(tmp_path, LW_FRONTENDS="1") as service:
        http, models = service.process("http"), service.process("models")
        models.suspend()
        service.parent.terminate()
        psutil.wait_procs([http], WAIT_SECONDS)
        assert models.is_running() and service.parent.is_running()
        service.parent.terminate()
        assert service.parent.wait(WAIT_SECONDS) == 0 and not models.is_running()


def test_signals_at_every_moment_of_the_end_end_it_in_order(tmp_path: Path) -> None:
    with serving(tmp_path, LW_FRONTENDS="1", TMPDIR=str(tmp_path)) as service:
        while service.parent.is_running() and service.parent.status() != psutil.STATUS_ZOMBIE:
            service.parent.terminate()
            time.sleep(0.03)
        assert service.parent.wait(WAIT_SECONDS) == 0, service.log.read_text()
        assert not list(tmp_path.glob("latentwire*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_any_moment_of_the_start_ends_all_three_with_code_0(tmp_path: Path, number: signal.Signals) -> None:
    for wait in (0.0, 0.5):
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", AT_FORK, "serve", "--port", "0"], stdout=log, stderr=log,
                env={**os.environ, "LW_FRONTENDS": "1", "TMPDIR": str(tmp_path)},
            )  # fmt: skip
        until(lambda: "forks" in (tmp_path / "log").read_text())
        time.sleep(wait)
        children = psutil.Process(process.pid).children()
        process.send_signal(number)
        assert process.wait(WAIT_SECONDS) == 0, (tmp_path / "log").read_text()
        assert "Traceback" not in (tmp_path / "log").read_text()
        assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
        assert not list(tmp_path.glob("latentwire*"))


KILLED = """
import os
from latentwire.service.processes import answering
from latentwire.service.__main__ import main
answering.Answering.__init__ = lambda *parts: os.kill(os.getpid(), 9)
main()
"""
INHERITING = """
import ctypes, os
from latentwire.service.__main__ import main
assert ctypes.CDLL(None).prctl(36, 1) == 0  # as the first process of a container
os.system("sleep 600 &")
main()
"""
AT_FORK = """
from latentwire.service.processes.supervisor import Supervisor
from latentwire.service.__main__ import main
run = Supervisor.run
Supervisor.run = lambda self: print("forks", flush=True) or run(self)
main()
"""


def comparable(answer: Any) -> Any:
    """An answer without what differs from call to call."""
    if isinstance(answer, dict):
        return {key: comparable(value) for key, value in answer.items() if key not in OF_A_CALL}
    return [comparable(item) for item in answer] if isinstance(answer, list) else answer


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
