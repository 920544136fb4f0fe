"""Senders on a device of their own: each half of a bridge touches its own device alone, and a service knows both."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient

import latentwire
from latentwire.bridge.bridge import Bridge
from latentwire.bridge.checkpoint import make_bridge, save_bridge
from latentwire.bridge.generation.continuous import token_bytes
from latentwire.bridge.models import FrozenLM
from latentwire.bridge.residency import Residency
from latentwire.service import settings
from latentwire.service.inference import runtime as module
from latentwire.service.settings import Settings
from tests.conftest import bridge_config
from tests.integration.service.conftest import Start, until

Samples = Callable[[TestClient], dict[tuple[str, ...], float]]
CPU, NOWHERE = torch.device("cpu"), torch.device("meta")  # where nothing can be computed
ASKED = "Mara wants a cup of tea.", "Question: What does Mara want?\nAnswer:"


@pytest.fixture(scope="module")
def whole() -> Bridge:
    return latentwire.Bridge.load()


def opened(sending: torch.device, receiving: torch.device, checkpoint: str | Path = "builtin") -> Bridge:
    return Bridge.open("halves", checkpoint, Residency(None, receiving), senders=Residency(None, sending))


def devices(bridge: Bridge) -> tuple[set[str], set[str]]:
    encoder, heads = bridge.model.encoder.parameters(), bridge.model.heads.parameters()
    return {weights.device.type for weights in encoder}, {weights.device.type for weights in heads}


def test_texts_are_encoded_where_the_sender_is_without_a_receiver(whole: Bridge) -> None:
    bridge = opened(CPU, NOWHERE)
    assert devices(bridge) == ({"cpu"}, {"meta"})
    assert bridge.encode(ASKED[0])[0].data == whole.encode(ASKED[0])[0].data
    assert list(bridge.senders.resident()) == [bridge.sender] and bridge.residency.resident() == {}
    assert bridge.unload() > 0 and bridge.senders.resident() == {}


def test_latents_are_answered_where_the_receiver_is_without_a_sender(whole: Bridge) -> None:
    bridge = opened(NOWHERE, CPU)
    assert devices(bridge) == ({"meta"}, {"cpu"})
    latents = whole.encode(ASKED[0])
    assert bridge.generate(latents, ASKED[1]).texts == whole.generate(latents, ASKED[1]).texts
    assert list(bridge.residency.resident()) == bridge.receivers and bridge.senders.resident() == {}


def test_a_sender_that_receives_too_is_with_the_receivers(lms: dict[str, FrozenLM], tmp_path: Path) -> None:
    save_bridge(tmp_path, make_bridge(bridge_config(lms["llama"], lms["llama"])))
    bridge = opened(NOWHERE, CPU, tmp_path)
    assert devices(bridge) == ({"cpu"}, {"cpu"})
    assert bridge.generate("Mara sings.", "Who?", max_tokens=2).outputs
    assert list(bridge.residency.resident()) == [bridge.sender] and bridge.senders.resident() == {}


def test_a_service_with_a_device_for_each_half_answers_measures_and_manages_models_on_both(
    start: Start, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"inputs": [{"text": ASKED[0]}], "prompt": ASKED[1], "max_tokens": 8}
    budgets = 300_000_000, 200_000_000
    held = Residency(budgets[0], CPU), Residency(budgets[1], CPU)
    monkeypatch.setattr(module, "residencies", lambda _: held)
    client = start(None, {"builtin": "builtin"})
    answer = client.post("/generate", json=asked)
    assert answer.status_code == 200 and answer.json()["outputs"][0]["text"] == " Mara wants a cup of tea."
    bridge = client.get("/bridges/builtin").json()
    assert [list(one.resident()) for one in held] == [[bridge["sender"]], bridge["receivers"]]
    assert set(bridge["loaded"]) == {bridge["sender"], *bridge["receivers"]}
    metrics = samples(client)
    assert {key[1] for key in metrics if key[0] == "latentwire_model_bytes"} == set(bridge["loaded"])
    assert metrics[("latentwire_memory_budget_bytes",)] == sum(budgets)
    made = client.post("/evaluations", json={"bridge": "builtin", "task": "world", "limit": 2}).json()
    until(lambda: client.get(f"/evaluations/{made['id']}").json()["state"] in ("done", "failed"))
    assert client.get(f"/evaluations/{made['id']}").json()["state"] == "done"
    admin = "/admin/bridges/builtin"
    assert client.post(f"{admin}/pin").json()["pinned"] is True
    assert [one.is_pinned(name) for one, name in zip(held, bridge["loaded"], strict=True)] == [True, True]
    assert client.post(f"{admin}/unload").json()["loaded"] == {} and not any(one.resident() for one in held)
    assert client.post(f"{admin}/unpin").json()["pinned"] is False
    assert set(client.post(f"{admin}/load").json()["loaded"]) == set(bridge["loaded"])
    assert [len(one.resident()) for one in held] == [1, 1]


def test_idle_models_of_both_halves_leave_when_their_time_is_over(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Residency(None, CPU), Residency(None, CPU)
    monkeypatch.setattr(module, "residencies", lambda _: held)
    start(Settings(keep_alive=0.1))
    until(lambda: not any(one.resident() for one in held))
    assert all(one.history for one in held)


def test_a_service_with_an_accelerators_sizes_fills_what_models_and_batches_leave_and_pushes_none_out(
    start: Start, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "ON_CPU", replace(settings.ON_ACCELERATOR, memory_budget="120MB"))
    client = start(Settings(batch_tokens=1000), {"builtin": "builtin"})
    bridge, metrics = client.get("/bridges/builtin").json(), samples(client)
    assert set(bridge["loaded"]) == {bridge["sender"], *bridge["receivers"]}
    runtime = client.app.state.runtime  # type: ignore[attr-defined]
    (engine,) = runtime.models.engines.all()
    room = metrics["latentwire_kv_tokens", "room", *bridge["receivers"]]
    assert room == runtime.models.engines._cache_bytes // token_bytes(engine.lm) > 8192
    assert engine.kind == "continuous" and engine.max_rows == 256
    answer = client.post("/generate", json={"inputs": [{"text": ASKED[0]}], "prompt": ASKED[1], "max_tokens": 8})
    assert answer.json()["outputs"][0]["text"] == " Mara wants a cup of tea."
    assert [event for event, *_ in runtime.residency.history] == ["load", "load"]
