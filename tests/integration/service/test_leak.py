"""Nothing made from a text reaches another request's soft tokens, whatever the tokenizer was made to hold."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from latentwire.bridge.checkpoint import make_bridge, save_bridge
from latentwire.bridge.errors import InvalidRequest
from latentwire.bridge.generation.base import Engine, Soft
from latentwire.bridge.generation.continuous import ContinuousEngine
from latentwire.bridge.generation.padded import PaddedEngine
from latentwire.bridge.models import load_model
from latentwire.bridge.prompt import TEXT, compose, layout_for
from latentwire.bridge.sampling import SamplingParams
from latentwire.training.loop import train
from tests.conftest import bridge_config, write_model
from tests.integration.conftest import MakeConfig
from tests.integration.runs import quiet

Start = Callable[..., TestClient]
ROWS = 259  # of the byte tokenizer: three special tokens and an id for each byte
SPELLED, ADDED = ROWS + 5, ROWS + 9


def crafted(folder: Path, family: str, spelled: str = "qz") -> str:
    """A model whose tokenizer has ids beyond its embedding: a piece that two letters make, and a token "@@"."""
    write_model(folder, family, seed=5)
    path = folder / "tokenizer.json"
    described = json.loads(path.read_text())
    described["model"]["vocab"][spelled], described["model"]["merges"] = SPELLED, [list(spelled)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    described["added_tokens"].append({"id": ADDED, "content": "@@", **flags})
    path.write_text(json.dumps(described))
    return str(folder)


@pytest.fixture
def service(start: Start, tmp_path: Path, model_folders: dict[str, Path]) -> TestClient:
    """A service in which both models are crafted, and a caller's latent is held."""
    sender, receiver = (load_model(crafted(tmp_path / family, family)) for family in ("neox", "llama"))
    torch.manual_seed(1)
    save_bridge(tmp_path / "bridge", make_bridge(bridge_config(sender, receiver)))
    client = start(None, {"crafted": str(tmp_path / "bridge")})
    said = client.post("/generate", json={"inputs": [{"text": "Ben."}], "prompt": "Where?", "max_tokens": 4})
    assert said.status_code == 200 and engine_of(client).soft_ids.tokens > 0
    return client


def engine_of(client: TestClient) -> ContinuousEngine:
    app: Any = client.app
    (engine,) = app.state.runtime.models.engines.all()
    assert isinstance(engine, ContinuousEngine)
    return engine


@pytest.fixture
def soft_reads(service: TestClient, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Ids of soft tokens that are read from now on."""
    read: list[int] = []
    embedding = engine_of(service).lm.model.get_input_embeddings()
    embed = embedding.forward

    def noted(ids: torch.Tensor) -> torch.Tensor:
        read.extend(ids[ids < 0].tolist())
        return embed(ids)

    monkeypatch.setattr(embedding, "forward", noted)
    return read


@pytest.mark.parametrize("where", ["prompt", "text"])
def test_a_token_beyond_the_embedding_is_refused_where_a_text_spells_it(
    service: TestClient, soft_reads: list[int], where: str
) -> None:
    asked = {"inputs": [{"text": "Mara qzants." if where == "text" else "Ben."}], "prompt": "Who?", "max_tokens": 4}
    if where == "prompt":
        asked |= {"prompt": "Who qz?", "condition": "none"}
    refused = service.post("/generate", json=asked)
    error = refused.json()["error"]
    assert refused.status_code == 422 and error["type"] == "InvalidRequest"
    assert "the token 'qz' with the id 264" in error["message"] and "has 259 rows" in error["message"]
    assert error["param"] == ("inputs.0.text" if where == "text" else "prompt")
    assert not soft_reads


def test_an_added_token_beyond_the_embedding_is_no_token_of_a_text(service: TestClient, soft_reads: list[int]) -> None:
    asked = {"inputs": [{"text": "Ben."}], "prompt": "@@ hello", "condition": "none", "max_tokens": 8}
    said = service.post("/generate", json=asked)
    assert said.status_code == 200 and said.json()["usage"]["prompt_tokens"] == 2 + len("@@ hello")  # BOS, line, bytes
    assert not soft_reads
    assert service.post("/encode", json={"inputs": ["@@ hello"]}).json()["usage"]["source_tokens"] == 1 + len(
        "@@ hello"
    )


@pytest.mark.parametrize("stop_id", [ROWS, SPELLED, ADDED, (1 << 31) - 1, 1 << 40])
def test_a_stop_id_beyond_the_embedding_is_refused(service: TestClient, soft_reads: list[int], stop_id: int) -> None:
    asked = {"inputs": [{"text": "Ben."}], "prompt": "Who?", "condition": "none", "stop_ids": [stop_id]}
    error = service.post("/generate", json=asked).json()["error"]
    assert error["param"] == "stop_ids" and f"id {stop_id} " in error["message"] and not soft_reads


def test_an_id_below_zero_is_no_stop_id(service: TestClient) -> None:
    asked = {"inputs": [{"text": "Ben."}], "prompt": "Who?", "stop_ids": [-1]}
    assert service.post("/generate", json=asked).json()["error"]["param"] == "stop_ids.0"


def test_no_id_that_a_tokenizer_can_have_names_a_soft_token(service: TestClient, soft_reads: list[int]) -> None:
    engine = engine_of(service)
    asked = {"inputs": [{"text": "Mara."}], "prompt": "Where?", "max_tokens": 1}
    assert service.post("/generate", json=asked).status_code == 200 and soft_reads
    held = engine.lm.embed(torch.tensor([soft_reads]))[0]
    assert held.any(dim=-1).all()  # none that the table has dropped
    for i in range(ROWS):
        embedded = engine.lm.embed(torch.tensor([[i]]))[0, 0]
        assert not (held == embedded).all(dim=-1).any()
    for i in (ROWS, ROWS + 1, SPELLED, ADDED, ROWS + 1000):
        with pytest.raises(IndexError):
            engine.lm.embed(torch.tensor([[i]]))


@pytest.mark.parametrize("kind", [ContinuousEngine, PaddedEngine])
@pytest.mark.parametrize("forged", [-1, -3, ROWS, ADDED])
def test_an_engine_takes_no_row_whose_text_has_an_id_of_another_table(
    tmp_path: Path, kind: type[Engine], forged: int
) -> None:
    lm = load_model(crafted(tmp_path / "llama", "llama"))
    engine = kind(lm)
    try:
        row = compose(lm, layout_for(lm, "{latent}x"), "{latent}x", latent=2)
        at = row.slots.index(TEXT)
        row.ids[at] = forged
        soft = Soft("held", lambda: torch.ones(2, lm.width))
        with pytest.raises(InvalidRequest, match=f"the id {forged} "):
            engine.submit(row, SamplingParams(2), soft, lambda _: None)
        assert engine.running == 0
    finally:
        engine.close()


@pytest.mark.parametrize("role", ["sender", "receiver"])
def test_training_refuses_it_too(make: MakeConfig, tmp_path: Path, role: str) -> None:
    family = {"sender": "neox", "receiver": "llama"}[role]
    config = make(**{role: crafted(tmp_path / "crafted", family, "wa")})
    with pytest.raises(InvalidRequest, match=r"the token 'wa' with the id 264 .* has 259 rows"):
        train(config, quiet())
