"""A real Prometheus scrapes a real service under load, and has an answer to every query of the dashboards."""

import itertools
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import pytest
import yaml

from deploy.grafana.build import RULES
from deploy.grafana.dashboards import DASHBOARDS, Panel
from latentwire.service.cli.demo import running
from latentwire.service.metrics import FEWEST
from tests.ports import free_port

WAIT_SECONDS = 60.0
NEEDS_A_GPU = {"Device utilisation", "Device power", "Reserved and not allocated", "Allocator retries"}
VARIABLES = {"$instance": ".*", "$bridge": ".*", "$__rate_interval": "30s"}
PANELS = [panel for board in DASHBOARDS for row in board.rows for panel in row.panels]


def program(name: str) -> str:
    """A program on PATH or beside the interpreter; the test is skipped without it."""
    path = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if path is None:
        pytest.skip(f"{name} is not installed: make .venv/bin/prometheus")
    return path


def ask_everything(client: httpx.Client, number: int) -> None:
    """One request of each kind that a panel tells something about."""
    text = f"Mara sings. Otto wants {number} lamps."
    body = {"inputs": [{"text": text}], "prompt": "Question: What does Mara do?\nAnswer:", "max_tokens": 8}
    kept = client.post("/encode", json={"inputs": [text], "store": True}).raise_for_status().json()["latents"][0]
    for path, asked in (
        ("/generate", body),
        ("/generate", {**body, "stream": True, "inputs": [{"latent_id": kept["id"]}]}),
        ("/generate", {**body, "fallback": "text"}),
        ("/score", {"inputs": body["inputs"], "prompt": body["prompt"], "choices": [" Mara sings.", " Otto sings."]}),
        ("/read", {"inputs": body["inputs"]}),
        ("/v1/completions", {"model": "demo", "prompt": "Who?", "source": text, "max_tokens": 5, "user": "me"}),
    ):
        answer = client.post(path, json=asked)
        assert answer.status_code == 200, answer.text
    long = {**body, "max_tokens": 200, "n": 8, "temperature": 1.0, "stream": True}
    with client.stream("POST", "/generate", json=long) as answer:
        next(answer.iter_raw())  # and no more: the caller leaves
    assert client.post("/generate", json={**body, "max_tokens": 0}).status_code == 422
    assert client.post("/generate", json={**body, "n": 16, "inputs": body["inputs"] * 3}).status_code in (413, 429)


@contextmanager
def under_load(url: str) -> Iterator[None]:
    """Requests of all kinds, over and over, and one evaluation; one that fails is raised at the end."""
    stop = Event()

    def call() -> None:
        with httpx.Client(base_url=url, timeout=WAIT_SECONDS, trust_env=False) as client:
            for number in itertools.count():
                ask_everything(client, number)
                if stop.is_set():
                    return

    evaluation = {"bridge": "demo", "task": "world", "conditions": ["bridge", "direct"], "limit": 4}
    httpx.post(f"{url}/evaluations", json=evaluation, trust_env=False).raise_for_status()
    for start in range(0, FEWEST, 16):  # a drift is told of no fewer
        texts = {"inputs": [f"Mara has {start + number} cups." for number in range(16)]}
        httpx.post(f"{url}/encode", json=texts, trust_env=False, timeout=WAIT_SECONDS).raise_for_status()
    with ThreadPoolExecutor(1) as caller:
        calling = caller.submit(call)
        try:
            yield
        finally:
            stop.set()
        calling.result()


@contextmanager
def prometheus(folder: Path, target: str) -> Iterator[str]:
    """A Prometheus with our rules, which scrapes every second: its address."""
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [{"job_name": "latentwire", "static_configs": [{"targets": [target]}]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    at = f"127.0.0.1:{free_port()}"
    command = [
        program("prometheus"), f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={at}", "--log.level=error",
    ]  # fmt: skip
    with subprocess.Popen(command) as process:
        try:
            yield f"http://{at}"
        finally:
            process.terminate()


def answered(client: httpx.Client, panel: Panel) -> bool:
    """Whether each query of a panel gives a number."""
    for expression, _ in panel.queries:
        for name, value in VARIABLES.items():
            expression = expression.replace(name, value)
        answer = client.get("/api/v1/query", params={"query": expression}).json()
        assert answer["status"] == "success", (panel.title, answer)
        if all(math.isnan(float(series["value"][1])) for series in answer["data"]["result"]):
            return False
    return True


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    with running("builtin", port, tmp_path_factory.mktemp("metered") / "log", LW_MAX_QUEUE="32"):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def measured(service: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A Prometheus that has seen the service under load."""
    folder = tmp_path_factory.mktemp("prometheus")
    with (
        prometheus(folder, service.removeprefix("http://")) as address,
        under_load(service),
        httpx.Client(base_url=address, trust_env=False, timeout=WAIT_SECONDS) as client,
    ):
        until = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                if answered(client, next(panel for panel in PANELS if panel.title == "Bridge over text")):
                    break
            except httpx.TransportError:
                pass
            assert time.monotonic() < until, "the evaluation has no score after a minute"
            time.sleep(0.2)
        yield client


def test_every_query_of_every_panel_has_an_answer(measured: httpx.Client) -> None:
    until, waiting = time.monotonic() + WAIT_SECONDS, PANELS
    while waiting and time.monotonic() < until:
        waiting = [panel for panel in waiting if not answered(measured, panel)]
        if {panel.title for panel in waiting} <= NEEDS_A_GPU:
            break
        time.sleep(0.5)
    assert {panel.title for panel in waiting} == NEEDS_A_GPU


def test_a_stream_that_its_caller_leaves_counts_as_aborted(measured: httpx.Client) -> None:
    aborted = 'latentwire_outcomes_total{route="/generate", bridge="demo", outcome="aborted"} > 0'
    until = time.monotonic() + WAIT_SECONDS
    while not measured.get("/api/v1/query", params={"query": aborted}).json()["data"]["result"]:
        assert time.monotonic() < until
        time.sleep(0.5)


def test_prometheus_evaluates_every_alert_and_none_fires(measured: httpx.Client) -> None:
    def rules() -> list[dict[str, Any]]:
        return list(measured.get("/api/v1/rules").json()["data"]["groups"][0]["rules"])

    until = time.monotonic() + WAIT_SECONDS
    while any(rule["health"] == "unknown" for rule in rules()) and time.monotonic() < until:
        time.sleep(0.2)
    assert {rule["health"] for rule in rules()} == {"ok"}
    assert not [rule["name"] for rule in rules() if rule["state"] == "firing"]
