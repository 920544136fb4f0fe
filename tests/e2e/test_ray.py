"""Models on Ray: one service to whoever calls, on two nodes, one of which is killed."""

import json
import math
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from time import monotonic as now
from typing import Any

import httpx
import psutil
import pytest
import yaml
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tests.cluster import Cluster, cluster, kill
from tests.e2e.test_processes import ASK, CALLS, comparable, serving
from tests.ports import free_port

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed: pip install 'latentwire[ray]'")

CONFIG = Path(__file__).parents[2] / "deploy/ray/serve.yaml"
LONG = {**ASK, "max_tokens": 60, "temperature": 1.0, "n": 2}
SETTINGS = {"LW_ENGINE": "ray", "LW_RAY_CPUS": "0.5", "LW_RAY_ENCODERS": "2", "LW_RAY_GENERATORS": "2"}
CALLERS, EACH = 6, 12
HELD_SECONDS = 2.0  # many times what a token takes
WAIT_SECONDS = 400.0  # six processes that import torch, beside the rest of the suite


@dataclass
class OnRay:
    """A service over a cluster."""

    url: str
    cluster: Cluster
    second: psutil.Process
    proxy: int
    log: Path


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnRay]:
    """Two nodes, two replicas of each half of the models on them, and on the head a proxy for who wants one."""
    folder, port, proxy = tmp_path_factory.mktemp("on_ray"), free_port(), free_port()
    with cluster() as made:
        made.add()
        at = ["--proxy-location", "HeadOnly", "--http-host", "127.0.0.1", "--http-port", str(proxy)]
        made.run("serve", "start", *at)
        second = made.add()
        command = [sys.executable, "-m", "latentwire", "serve", "--bridge", "demo=builtin", "--port", str(port)]
        with (folder / "log").open("w") as out:
            server = psutil.Popen(command, env=os.environ | made.variables | SETTINGS, stdout=out, stderr=out)
        try:
            found = OnRay(f"http://127.0.0.1:{port}", made, second, proxy, folder / "log")
            until(lambda: is_ready(found.url) or server.poll() is not None)
            assert server.poll() is None, found.log.read_text()
            yield found
            server.terminate()
            assert server.wait(WAIT_SECONDS) == 0
        finally:
            kill(server)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The same service in one process."""
    with serving(tmp_path_factory.mktemp("alone"), LW_FRONTENDS="0") as service:
        yield service.url


def test_a_service_on_ray_gives_the_answers_of_a_local_one(service: OnRay, alone: str) -> None:
    for name, (path, body) in CALLS.items():
        answers = [httpx.post(f"{at}{path}", json=body, timeout=60) for at in (service.url, alone)]
        assert answers[0].status_code == answers[1].status_code, name
        assert same(*(comparable(answer.json()) for answer in answers)), (name, [answer.text for answer in answers])
    for path in ("/bridges", "/v1/models", "/openapi.json"):
        both = [comparable(httpx.get(f"{at}{path}", timeout=60).json()) for at in (service.url, alone)]
        assert both[0] == both[1], path


def test_pieces_come_from_a_replica_as_they_are_said(service: OnRay, alone: str) -> None:
    streams = [
        httpx.post(f"{at}/generate", json={**LONG, "seed": 1, "stream": True}).text for at in (service.url, alone)
    ]
    assert texts(streams[0]) == texts(streams[1]) and streams[0].count("event: token") > 3


def test_metrics_tell_what_each_replica_counts(service: OnRay) -> None:
    def told() -> list[Metric]:
        return list(text_string_to_metric_families(httpx.get(f"{service.url}/metrics", timeout=60).text))

    def samples(name: str) -> dict[str | None, Sample]:
        return {one.labels.get("replica"): one for family in told() for one in family.samples if one.name == name}

    def kinds(name: str) -> Counter[str]:
        return Counter(str(replica).partition("-")[0] for replica in samples(name))

    until(lambda: kinds("latentwire_batch_rows_count") == {"Encoder": 2, "Generator": 2})  # the last one may be late
    assert kinds("latentwire_kv_tokens") == {"Generator": 2} and list(samples("latentwire_ready")) == [None]
    names = [family.name for family in told()]
    assert len(set(names)) == len(names)


def test_models_come_and_go_in_every_replica(service: OnRay) -> None:
    def ask(verb: str) -> Any:
        return httpx.post(f"{service.url}/admin/bridges/demo/{verb}", timeout=60).json()

    assert ask("unload")["freed_bytes"] > 0
    for _ in range(4):  # whichever replica says
        assert httpx.get(f"{service.url}/bridges/demo").json()["loaded"] == {}
    assert len(ask("load")["loaded"]) == 2
    assert ask("pin")["pinned"] is True and ask("unpin")["pinned"] is False


def test_another_service_of_the_same_bridges_leaves_the_replicas_alone(service: OnRay) -> None:
    before, port = replicas(), free_port()
    command = [sys.executable, "-m", "latentwire", "serve", "--bridge", "demo=builtin", "--port", str(port)]
    with (service.log.parent / "other").open("w") as out:
        other = psutil.Popen(command, env=os.environ | service.cluster.variables | SETTINGS, stdout=out, stderr=out)
    try:
        until(lambda: is_ready(f"http://127.0.0.1:{port}") or other.poll() is not None)
        assert outputs(f"http://127.0.0.1:{port}", 1, stream=False) == outputs(service.url, 1, stream=False)
        other.terminate()
        assert other.wait(WAIT_SECONDS) == 0
        assert len(before) == 4 and replicas() == before
    finally:
        kill(other)


def test_an_evaluation_is_refused_in_one_sentence(service: OnRay) -> None:
    refused = httpx.post(f"{service.url}/evaluations", json={"bridge": "demo", "task": "world"})
    assert refused.status_code == 422 and "do not run on Ray" in refused.json()["error"]["message"]
    assert httpx.get(f"{service.url}/evaluations").json()["evaluations"] == []


def test_a_node_killed_under_load_loses_no_request(service: OnRay, alone: str) -> None:
    expected = [outputs(alone, seed, stream=False) for seed in range(EACH)]
    met: Counter[str] = Counter()
    heard: dict[int, float] = {}  # when each stream under way said something last
    over = threading.Event()

    def call(number: int) -> None:
        for seed in cycle(range(EACH)):
            if over.is_set():
                return
            said = outputs(service.url, seed, stream=bool(number % 2), told=lambda: heard.update({number: now()}))
            heard.pop(number, None)
            met["right" if said == expected[seed] else f"lost: {str(said)[-400:]}"] += 1

    held = [process for process in service.second.children(recursive=True) if is_replica(process.name())]

    def is_cut_short() -> bool:
        """Hold the node's replicas: whether a stream that one of them has begun waits for it; if not they go on."""
        for process in held:
            process.suspend()
        since = now()
        time.sleep(HELD_SECONDS)
        if any(at < since for at in list(heard.values())):
            return True
        for process in held:
            process.resume()
        return False

    callers = [threading.Thread(target=call, args=(number,)) for number in range(CALLERS)]
    for caller in callers:
        caller.start()
    until(lambda: met.total() >= CALLERS)
    assert held
    until(is_cut_short)
    kill(service.second)
    over.set()
    for caller in callers:
        caller.join()
    assert set(met) == {"right"}, met
    assert re.search("Generate is asked again", service.log.read_text())


def test_a_serve_config_serves_the_same_routes_through_the_proxies_of_ray(
    service: OnRay, alone: str, tmp_path: Path
) -> None:
    config = yaml.safe_load(CONFIG.read_text())
    config["http_options"]["port"] = service.proxy
    (application,) = config["applications"]
    application["args"]["bridges"] = {"demo": "builtin"}
    for deployment in application["deployments"]:
        deployment["ray_actor_options"] = {"num_cpus": 0.1}
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
    service.cluster.run("serve", "run", str(tmp_path / "serve.yaml"), "--non-blocking")
    url = f"http://127.0.0.1:{service.proxy}"
    until(lambda: is_ready(url))
    for name, (path, body) in CALLS.items():
        answers = [httpx.post(f"{at}{path}", json=body, timeout=60) for at in (url, alone)]
        assert answers[0].status_code == answers[1].status_code, name
        assert same(*(comparable(answer.json()) for answer in answers)), (name, [answer.text for answer in answers])
    assert outputs(url, 1, stream=True) == outputs(alone, 1, stream=False)


def test_a_service_starts_a_ray_of_its_own_that_wants_a_token_also_where_there_never_was_one(tmp_path: Path) -> None:
    with serving(tmp_path, LW_ENGINE="ray", LW_RAY_CPUS="0.1", HOME=str(tmp_path)) as made:
        until(lambda: is_ready(made.url))
        assert outputs(made.url, 1, stream=True) == outputs(made.url, 1, stream=False)
        assert {psutil.Process(pid).nice() for pid in replicas()} == {made.parent.nice()}
    assert (tmp_path / ".ray/auth_token").read_text()


def same(one: Any, other: Any) -> bool:
    """Whether two answers are, but for the rounding of numbers, in which batches differ."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-4)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def replicas() -> set[int]:
    """The processes that hold models."""
    children = psutil.Process().children(recursive=True)
    return {process.pid for process in children if is_replica(process.name())}


def is_replica(name: str) -> bool:
    return "ServeReplica" in name or "SERVE_REPLICA" in name


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/ready", timeout=60).status_code == 200
    except httpx.TransportError:
        return False


def outputs(url: str, seed: int, *, stream: bool, told: Callable[[], None] = lambda: None) -> Any:
    """The texts that a seed gives; of a stream, put together of its pieces, each of which is ``told``."""
    body = {**LONG, "seed": seed, "stream": stream}
    if not stream:
        response = httpx.post(f"{url}/generate", json=body, timeout=90)
        return [output["text"] for output in response.json()["outputs"]] if response.is_success else response.text
    said = ""
    with httpx.stream("POST", f"{url}/generate", json=body, timeout=90) as pieces:
        for piece in pieces.iter_text():
            said += piece
            told()
    return texts(said) if "event: done" in said else said


def texts(stream: str) -> list[str]:
    """Of each of two outputs, put together of its pieces."""
    made = ["", ""]
    for line in re.findall(r"event: token\ndata: (.*)", stream):
        piece = json.loads(line)
        made[piece["index"]] += piece["text"]
    return made
