"""One encoder, two receivers of different families: a request says which of them answers."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from latentwire.bridge.bridge import Bridge
from latentwire.bridge.checkpoint import make_bridge, save_bridge
from latentwire.bridge.config import Head
from latentwire.bridge.models import FrozenLM
from latentwire.bridge.prompt import layout_for
from tests.conftest import TEMPLATE, bridge_config

Start = Callable[..., TestClient]
TEXT = "Mara lives in Rome."


@pytest.fixture
def forked(tmp_path: Path, lms: dict[str, FrozenLM]) -> tuple[str, list[str]]:
    """A bridge from the NeoX to the Llama and to the GPT-2; and the receivers' names, the default first."""
    config, second = bridge_config(lms["neox"], lms["llama"]), lms["gpt2"]
    head = Head(second.ref, layout_for(second, TEMPLATE), second.embedding_rms())
    torch.manual_seed(1)
    save_bridge(tmp_path, make_bridge(replace(config, heads={**config.heads, second.name: head})))
    return str(tmp_path), [*config.heads, second.name]


def test_the_receiver_asked_for_answers_and_the_first_where_none_is(
    start: Start, forked: tuple[str, list[str]]
) -> None:
    folder, receivers = forked
    client = start(None, {"forked": folder})
    assert client.get("/bridges/forked").json()["receivers"] == receivers
    here = Bridge.load(folder)
    sent = here.encode(TEXT)
    alone = [here.generate(sent, "Where?", receiver=name, max_tokens=8).texts[0] for name in receivers]
    assert alone[0] != alone[1]

    def said(**options: Any) -> str:
        body = {"inputs": [{"text": TEXT}], "prompt": "Where?", "max_tokens": 8, **options}
        return str(client.post("/generate", json=body).json()["outputs"][0]["text"])

    assert [said(), *(said(receiver=name) for name in receivers)] == [alone[0], *alone]
    refused = client.post("/generate", json={"inputs": [{"text": TEXT}], "prompt": "Where?", "receiver": "nobody"})
    assert refused.status_code == 404
    assert all(name in refused.json()["error"]["message"] for name in ("'nobody'", *receivers))
