"""Health, bridges, metrics and the envelope around every request."""

import math
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from latentwire.bridge import engine
from latentwire.bridge.checkpoint import read_manifest
from latentwire.bridge.errors import IncompatibleBridge, InsufficientMemory
from latentwire.bridge.generation import select
from latentwire.service.settings import Settings
from tests.integration.service.conftest import READY_SECONDS, Gate, until, wait_until_ready

Start = Callable[..., TestClient]
Samples = Callable[[TestClient], dict[tuple[str, ...], float]]
DEPLOY = Path(__file__).parents[3] / "deploy"
ASK = {"inputs": [{"text": "Mara lives in Rome."}], "prompt": "Where?", "max_tokens": 4, "n": 2, "temperature": 1.0}


def test_a_bridge_is_described_with_what_its_checkpoint_says(client: TestClient, checkpoint: Path) -> None:
    (listed,) = client.get("/bridges").json()["bridges"]
    assert client.get("/bridges/tiny").json() == listed
    manifest = read_manifest(checkpoint)
    assert listed["bridge_id"] == manifest.bridge_id
    assert listed["sender"] == manifest.bridge.sender.name
    assert listed["receivers"] == list(manifest.bridge.heads)
    assert (listed["encoder"], listed["ratio"], listed["latent_dim"]) == ("pooling", 4, 16)
    assert (listed["max_source_tokens"], listed["template"]) == (128, "{latent}\n{prompt}")
    assert set(listed["loaded"]) == {listed["sender"], *listed["receivers"]}


def test_several_bridges_are_served_and_the_first_is_the_default(start: Start, checkpoint: Path) -> None:
    client = start(None, {"one": str(checkpoint), "two": str(checkpoint)})
    assert [bridge["name"] for bridge in client.get("/bridges").json()["bridges"]] == ["one", "two"]
    assert client.post("/encode", json={"inputs": ["a"]}).json()["bridge"] == "one"
    assert client.post("/encode", json={"inputs": ["a"], "bridge": "two"}).json()["bridge"] == "two"


def test_a_bridge_nobody_serves_is_a_404(client: TestClient) -> None:
    response = client.get("/bridges/other")
    assert response.status_code == 404
    assert response.json()["error"]["param"] == "bridge"


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", "/nothing", 404, "NotFound"),
        ("POST", "/encode/now", 404, "NotFound"),
        ("GET", "/encode", 405, "MethodNotAllowed"),
        ("DELETE", "/bridges/tiny", 405, "MethodNotAllowed"),
        ("POST", "/metrics", 405, "MethodNotAllowed"),
    ],
)
def test_a_wrong_path_or_method_is_refused_in_the_one_body(
    client: TestClient, method: str, path: str, status: int, kind: str
) -> None:
    response = client.request(method, path)
    assert response.status_code == status
    error = response.json()["error"]
    assert error["type"] == kind
    assert method in error["message"] and path in error["message"]
    assert error["request_id"] == response.headers["x-request-id"]


def test_the_callers_request_id_comes_back(client: TestClient) -> None:
    response = client.post("/encode", json={"inputs": ["a"]}, headers={"x-request-id": "mine-7"})
    assert response.headers.get_list("x-request-id") == ["mine-7"]
    refused = client.post("/encode", json={}, headers={"x-request-id": "mine-8"})
    assert refused.json()["error"]["request_id"] == refused.headers["x-request-id"] == "mine-8"


def test_two_requests_without_an_id_get_two(client: TestClient) -> None:
    one, other = (client.get("/health/live").headers["x-request-id"] for _ in range(2))
    assert one != other


@pytest.mark.parametrize("family", ["neox", "llama"])
def test_a_service_is_ready_only_after_every_model_has_been_loaded_and_has_answered(
    start: Start, hold: Callable[..., Gate], samples: Samples, model_folders: dict[str, Path], family: str
) -> None:
    gates: list[Gate] = []

    def before(app: FastAPI) -> None:
        gates.append(hold(app.state.runtime.residency, "load", str(model_folders[family])))

    client = start(ready=False, before=before)
    assert gates[0].entered.wait(READY_SECONDS)
    response = client.get("/health/ready")
    assert response.status_code == 503
    assert response.json()["error"]["type"] == "NotReady"
    assert response.json()["error"]["message"] == "the bridges are still loading"
    assert "retry-after" in response.headers
    assert client.get("/health/live").status_code == 200
    assert samples(client)[("latentwire_ready",)] == 0
    gates[0].opened.set()
    wait_until_ready(client)


def test_loading_may_take_longer_than_a_request(start: Start) -> None:
    start(Settings(request_timeout=1e-6))  # waits until the service is ready


def test_models_that_could_never_fit_the_budget_stop_the_start(start: Start) -> None:
    with pytest.raises(InsufficientMemory, match=r"needs [0-9]+ bytes; the memory budget is 1000$"):
        start(Settings(memory_budget=1000))


@pytest.fixture
def movable(checkpoint: Path, model_folders: dict[str, Path], tmp_path: Path) -> tuple[Path, dict[str, Path]]:
    """A copy of the checkpoint over copies of its models, by role."""
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    text = (copy / "config.json").read_text()
    folders = {"sender": tmp_path / "reads", "receiver": tmp_path / "answers"}
    for original, folder in zip((model_folders["neox"], model_folders["llama"]), folders.values(), strict=True):
        shutil.copytree(original, folder)
        text = text.replace(str(original), str(folder))
    (copy / "config.json").write_text(text)
    return copy, folders


def change(folder: Path) -> None:
    """Other weights under the same name."""
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))


@pytest.mark.parametrize("role", ["sender", "receiver"])
def test_a_model_that_is_not_the_one_trained_with_stops_the_start(
    start: Start, movable: tuple[Path, dict[str, Path]], role: str
) -> None:
    copy, folders = movable
    change(folders[role])
    with pytest.raises(IncompatibleBridge, match=f"trained with {role} .* whose weights is"):
        start(None, {"tiny": str(copy)})


def empty(client: TestClient) -> None:
    """Let every model go."""
    residency = client.app.state.runtime.residency  # type: ignore[attr-defined]
    for name in residency.resident():
        until(lambda name=name: residency.find(name).users == 0)
        residency.unload(name)


@pytest.mark.parametrize("role", ["sender", "receiver"])
def test_a_model_that_changed_while_it_was_out_of_memory_is_refused(
    start: Start, movable: tuple[Path, dict[str, Path]], role: str
) -> None:
    copy, folders = movable
    client = start(None, {"tiny": str(copy)})
    empty(client)
    change(folders[role])
    response = client.post("/generate", json=ASK)
    assert response.status_code == 409
    assert response.json()["error"]["type"] == "IncompatibleBridge"
    assert f"{role} {str(folders[role])!r}" in response.json()["error"]["message"]


@pytest.mark.parametrize("role", ["sender", "receiver"])
def test_a_service_that_cannot_warm_up_is_never_ready_and_says_why(
    start: Start, movable: tuple[Path, dict[str, Path]], caplog: pytest.LogCaptureFixture, role: str
) -> None:
    copy, folders = movable
    weights = folders[role] / "model.safetensors"
    client = start(None, {"tiny": str(copy)}, ready=False, before=lambda app: weights.unlink())
    until(lambda: "still loading" not in client.get("/health/ready").text)
    cause = f"model {str(folders[role])!r} has no model.safetensors"
    for _ in range(2):
        response = client.get("/health/ready")
        assert response.status_code == 503
        assert response.json()["error"]["type"] == "NotReady"
        assert response.json()["error"]["message"].startswith(cause)
    (logged,) = [
        record.getMessage() for record in caplog.records if record.name == "latentwire.service.inference.runtime"
    ]
    assert logged.startswith(f"warming up failed: {cause}")


def test_a_receiver_that_needs_padded_batches_keeps_a_service_from_being_ready_where_continuous_ones_are_required(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select, "_trouble", lambda engine: "it says 'no'")
    client = start(Settings(require_engine="continuous"), ready=False)
    until(lambda: "still loading" not in client.get("/health/ready").text)
    why = client.get("/health/ready").json()["error"]["message"]
    assert "would run on padded batches, and continuous ones are required: it says 'no'" in why


def test_a_model_that_is_being_loaded_is_no_stall_and_its_arrival_is_progress(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = client.app.state.runtime  # type: ignore[attr-defined]
    load, encode, seen = runtime.residency.load, engine.encode, []

    def long_without_progress() -> bool:
        runtime.admission.last_progress = time.monotonic() - runtime.settings.stall_timeout - 1
        return bool(runtime.models.stalled)

    def loading(*given: Any, **named: Any) -> Any:
        seen.append(("loading", long_without_progress()))
        return load(*given, **named)

    def working(*given: Any) -> Any:
        seen.append(("loaded", runtime.models.stalled))
        seen.append(("working", long_without_progress()))
        return encode(*given)

    monkeypatch.setattr(runtime.residency, "load", loading)
    monkeypatch.setattr(engine, "encode", working)
    empty(client)
    assert client.post("/encode", json={"inputs": ["read for the first time"]}).status_code == 200
    assert seen == [("loading", False), ("loaded", False), ("working", True)]
    assert not runtime.models.stalled


def test_live_fails_when_work_waits_and_nothing_moves_and_only_then(client: TestClient) -> None:
    runtime = client.app.state.runtime  # type: ignore[attr-defined]
    long_ago = time.monotonic() - runtime.settings.stall_timeout - 1
    before = runtime.admission.last_progress
    try:
        runtime.admission.last_progress = long_ago
        assert client.get("/health/live").status_code == 200  # idle is not stalled
        runtime.admission.running = 1
        response = client.get("/health/live")
        assert response.status_code == 503
        assert "120 s" in response.json()["error"]["message"]
        runtime.admission.last_progress = time.monotonic()
        assert client.get("/health/live").status_code == 200  # busy is not stalled
    finally:
        runtime.admission.running, runtime.admission.last_progress = 0, before


def test_the_reference_is_served_and_needs_no_other_server(client: TestClient) -> None:
    page = client.get("/docs")
    assert page.status_code == 200
    sources = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert sources
    assert [client.get(source).status_code for source in sources] == [200] * len(sources)


def test_metrics_say_what_known_requests_did(start: Start, samples: Samples) -> None:
    client = start()
    before = samples(client)
    answer = client.post("/generate", json=ASK).json()
    client.post("/encode", json={"inputs": ["a", "b"]})
    client.post("/encode", json={})
    client.get("/nothing/at/all")
    after = samples(client)

    def grew(*key: str) -> float:
        return after[key] - before.get(key, 0.0)

    assert grew("latentwire_requests_total", "/generate", "200") == 1
    assert grew("latentwire_requests_total", "/encode", "200") == 1
    assert grew("latentwire_requests_total", "/encode", "422") == 1
    assert grew("latentwire_requests_total", "unknown", "404") == 1
    assert grew("latentwire_outcomes_total", "tiny", "ok", "/generate") == 1
    assert grew("latentwire_outcomes_total", "tiny", "ok", "/encode") == 1
    assert grew("latentwire_outcomes_total", "", "invalid", "/encode") == 1  # refused before a bridge was found
    assert not [key for key in after if "/nothing/at/all" in key]  # a caller cannot make up labels
    assert grew("latentwire_request_seconds_count", "/generate") == 1
    assert grew("latentwire_tokens_total", "source") == answer["usage"]["source_tokens"] + 4
    assert grew("latentwire_tokens_total", "soft") == answer["usage"]["soft_tokens"]
    assert grew("latentwire_tokens_total", "generated") == answer["usage"]["generated_tokens"]
    assert grew("latentwire_batch_rows_sum", "encode") == 3
    assert grew("latentwire_batch_rows_sum", "generate") == answer["usage"]["generated_tokens"]  # a row is a token
    assert grew("latentwire_first_token_seconds_count", "tiny") == 2
    assert grew("latentwire_encode_seconds_count", "tiny") == 2
    assert grew("latentwire_latent_bytes_count", "tiny") == grew("latentwire_queue_seconds_count", "encode") == 3
    assert grew("latentwire_queue_seconds_count", "generate") == 2
    assert grew("latentwire_batch_tokens_sum", "encode") == answer["usage"]["source_tokens"] + 4
    read = answer["usage"]["prompt_tokens"] + answer["usage"]["soft_tokens"]
    assert grew("latentwire_batch_tokens_sum", "generate") >= read
    assert grew("latentwire_tokens_total", "prompt") == answer["usage"]["prompt_tokens"]
    assert grew("latentwire_device_seconds_count", "encode") == 2
    assert after[("latentwire_ready",)] == 1
    assert after[("latentwire_queue_rows",)] == after[("latentwire_running_rows",)] == 0
    assert after["latentwire_output_distinct_ratio", "tiny"] == answer["diversity"]["distinct_ratio"]
    assert after["latentwire_output_top_ratio", "tiny"] == answer["diversity"]["top_output_ratio"]
    assert after["latentwire_output_entropy_nats", "tiny"] == pytest.approx(answer["diversity"]["entropy_nats"])
    assert 0 < after["latentwire_output_token_entropy_nats", "tiny"] < math.log(600)  # of its vocabulary
    assert after["latentwire_output_distinct_2", "tiny"] == answer["diversity"]["distinct_2"]
    assert after["latentwire_memory_bytes", "cpu", "resident"] > 1 << 20
    loaded = client.get("/bridges/tiny").json()["loaded"]
    assert {key[1]: value for key, value in after.items() if key[0] == "latentwire_model_bytes"} == loaded
    assert after[("latentwire_memory_budget_bytes",)] == 0
    (receiver,) = client.get("/bridges/tiny").json()["receivers"]
    assert after["latentwire_kv_tokens", "room", receiver] == 8192
    assert after["latentwire_kv_tokens", "used", receiver] == 0


def test_first_tokens_are_timed_from_the_arrival_of_their_request(
    start: Start, hold: Callable[..., Gate], samples: Samples
) -> None:
    client, held_seconds = start(Settings(encode_cache=False)), 0.2
    gate = hold(engine, "encode")
    with ThreadPoolExecutor(1) as caller:
        asking = caller.submit(client.post, "/generate", json=ASK)
        assert gate.entered.wait(READY_SECONDS)
        time.sleep(held_seconds)
        gate.opened.set()
        assert asking.result().status_code == 200
    assert samples(client)["latentwire_first_token_seconds_sum", "tiny"] >= 2 * held_seconds


def test_refusals_have_reasons(start: Start, samples: Samples) -> None:
    client = start(Settings(max_queue=2))
    assert client.post("/generate", json={**ASK, "n": 3}).status_code == 413
    assert client.get("/bridges/other").status_code == 404
    seen = samples(client)
    assert {key[1]: n for key, n in seen.items() if key[0] == "latentwire_refusals_total" and n} == {"TooLarge": 1}


def test_latents_by_id_are_hits_or_misses(client: TestClient, samples: Samples) -> None:
    before = samples(client)
    kept = client.post("/encode", json={"inputs": ["Mara sings."], "store": True}).json()["latents"][0]["id"]
    for name, status in ((kept, 200), ("lat_0", 404)):
        asked = {**ASK, "inputs": [{"latent_id": name}]}
        assert client.post("/generate", json=asked).status_code == status
    after = samples(client)
    grew = {result: after[key] - before[key] for result in ("hit", "miss", "error") for key in [
        ("latentwire_latent_lookups_total", result)]}  # fmt: skip
    assert grew == {"hit": 1, "miss": 1, "error": 0}


def test_warming_up_counts_no_tokens(start: Start, samples: Samples) -> None:
    assert not [key for key, value in samples(start()).items() if key[0] == "latentwire_tokens_total" and value]
