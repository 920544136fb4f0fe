"""Models on Ray: one service to whoever calls, on two nodes, one of which is killed."""

import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from latentwire.service.cli.demo import running
from tests.cluster import Cluster, cluster, kill
from tests.e2e.test_processes import ASK, CALLS, comparable, serving, until
from tests.ports import free_port

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed: pip install 'latentwire[ray]'")

CONFIG = Path(__file__).parents[2] / "deploy/ray/serve.yaml"
LONG = {**ASK, "max_tokens": 60, "temperature": 1.0, "n": 2}
CALLERS, EACH = 6, 12


@dataclass
class OnRay:
    """A service over a cluster."""

    url: str
    second: psutil.Process
    log: Path


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """The head of a cluster."""
    with cluster() as made:
        made.add()
        yield made


@pytest.fixture(scope="module")
def configured(nodes: Cluster, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The committed Serve config on the head, its HTTP service included: its address, before it is ready."""
    config, port = yaml.safe_load(CONFIG.read_text()), free_port()
    config["http_options"]["port"] = port
    (application,) = config["applications"]
    application["args"]["bridges"] = {"demo": "builtin"}
    for deployment in application["deployments"]:
        deployment["ray_actor_options"] = {"num_cpus": 0.1}
    file = tmp_path_factory.mktemp("configured") / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [str(Path(sys.executable).with_name("serve")), "run", str(file), "--non-blocking"]
    environment = {**os.environ, **nodes.variables}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def service(nodes: Cluster, configured: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnRay]:
    """A second node, and two replicas of each half of the models on the two."""
    folder, port, second = tmp_path_factory.mktemp("on_ray"), free_port(), nodes.add()
    variables = {**nodes.variables, "LW_ENGINE": "ray", "LW_RAY_ENCODERS": "2", "LW_RAY_GENERATORS": "2"}
    with running("builtin", port, folder / "log", **variables):
        yield OnRay(f"http://127.0.0.1:{port}", second, folder / "log")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The same service in one process."""
    with serving(tmp_path_factory.mktemp("alone"), LW_FRONTENDS="0") as service:
        yield service.url


def test_a_service_on_ray_gives_the_answers_of_a_local_one(service: OnRay, alone: str) -> None:
    for name, (path, body) in CALLS.items():
        answers = [httpx.post(f"{at}{path}", json=body, timeout=60) for at in (service.url, alone)]
        assert answers[0].status_code == answers[1].status_code, name
        assert comparable(answers[0].json()) == comparable(answers[1].json()), name
    for path in ("/bridges", "/v1/models", "/openapi.json"):
        both = [comparable(httpx.get(f"{at}{path}", timeout=60).json()) for at in (service.url, alone)]
        assert both[0] == both[1], path


def test_pieces_come_from_a_replica_as_they_are_said(service: OnRay, alone: str) -> None:
    streams = [
        httpx.post(f"{at}/generate", json={**LONG, "seed": 1, "stream": True}).text for at in (service.url, alone)
    ]
    pieces = [re.findall(r"event: token\ndata: (.*)", stream) for stream in streams]
    assert sorted(pieces[0]) == sorted(pieces[1]) and len(pieces[0]) > 3


def test_models_come_and_go_in_every_replica(service: OnRay) -> None:
    def ask(verb: str) -> Any:
        return httpx.post(f"{service.url}/admin/bridges/demo/{verb}", timeout=60).json()

    assert ask("unload")["freed_bytes"] > 0
    for _ in range(4):  # whichever replica says
        assert httpx.get(f"{service.url}/bridges/demo").json()["loaded"] == {}
    assert len(ask("load")["loaded"]) == 2
    assert ask("pin")["pinned"] is True and ask("unpin")["pinned"] is False


def test_an_evaluation_is_refused_in_one_sentence(service: OnRay) -> None:
    refused = httpx.post(f"{service.url}/evaluations", json={"bridge": "demo", "task": "world"})
    assert refused.status_code == 422 and "do not run on Ray" in refused.json()["error"]["message"]
    assert httpx.get(f"{service.url}/evaluations").json()["evaluations"] == []


def test_a_serve_config_serves_the_same_routes_through_the_proxies_of_ray(configured: str, alone: str) -> None:
    until(lambda: is_ready(configured))
    for name, (path, body) in CALLS.items():
        answers = [httpx.post(f"{at}{path}", json=body, timeout=60) for at in (configured, alone)]
        assert answers[0].status_code == answers[1].status_code, name
        assert comparable(answers[0].json()) == comparable(answers[1].json()), name
    assert outputs(configured, 1, stream=True) == outputs(alone, 1, stream=False)


def test_a_node_killed_under_load_loses_no_request(service: OnRay, alone: str) -> None:
    expected = [outputs(alone, seed, stream=False) for seed in range(EACH)]
    met: Counter[str] = Counter()

    def call(number: int) -> None:
        for seed in range(EACH):
            said = outputs(service.url, seed, stream=bool(number % 2))
            met["right" if said == expected[seed] else f"lost: {said}"] += 1

    callers = [threading.Thread(target=call, args=(number,)) for number in range(CALLERS)]
    for caller in callers:
        caller.start()
    until(lambda: met.total() >= CALLERS)
    ended = kill(service.second)
    for caller in callers:
        caller.join()
    assert any("ServeReplica" in name or "SERVE_REPLICA" in name for name in ended), ended
    assert met == {"right": CALLERS * EACH}
    assert "has gone" in service.log.read_text()  # requests were asked again


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/ready", timeout=60).status_code == 200
    except httpx.TransportError:
        return False


def outputs(url: str, seed: int, *, stream: bool) -> Any:
    """The texts that a seed gives; of a stream, put together of its pieces."""
    response = httpx.post(f"{url}/generate", json={**LONG, "seed": seed, "stream": stream}, timeout=90)
    if not stream:
        return [output["text"] for output in response.json()["outputs"]] if response.is_success else response.text
    if "event: done" not in response.text:
        return response.text
    texts = ["", ""]
    for line in re.findall(r"event: token\ndata: (.*)", response.text):
        piece = json.loads(line)
        texts[piece["index"]] += piece["text"]
    return texts
