"""``"fallback": "text"``: answers from latents where the gate trusts them, else from the texts."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from latentwire.bridge.bridge import Bridge
from latentwire.bridge.checkpoint import BUILTIN_BRIDGE, read_manifest
from latentwire.bridge.errors import IncompatibleBridge, InvalidRequest
from latentwire.bridge.gate import SIGNALS, Gate, load_gates, save_gates

Start = Callable[..., TestClient]
TEXTS = ["Mara lives in Rome.", "Ben sings.", "Lola wants a cup of tea.", "Kira lives in Bern."]
ASKED = {"inputs": [{"text": text} for text in TEXTS], "prompt": "Where?", "max_tokens": 6, "fallback": "text"}


def gated(checkpoint: Path, folder: Path, least: float) -> Path:
    """The tiny bridge with a gate that is sure of an answer as far as its least likely token is."""
    shutil.copytree(checkpoint, folder)
    manifest, (gate,) = read_manifest(folder), load_gates(BUILTIN_BRIDGE, read_manifest("builtin")).values()
    (receiver,) = manifest.heads
    made: Gate = replace(
        gate,
        head_sha256=manifest.heads[receiver].sha256,
        weights=dict.fromkeys(SIGNALS, 0.0) | {"lowest_logprob": 0.5},
        intercept=0.0,
        reached=replace(gate.reached, trust=least),
    )
    save_gates(folder, manifest.bridge_id, {receiver: made})
    return folder


@pytest.fixture(scope="module")
def least(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> float:
    """A trust that two of the four answers reach."""
    bridge = Bridge.load(gated(checkpoint, tmp_path_factory.mktemp("all") / "tiny", 0.0))
    outputs = bridge.generate(TEXTS, "Where?", max_tokens=6, fallback="text").outputs
    assert {output.answered_from for output in outputs} == {"latent"}
    trusts = sorted(output.trust or 0.0 for output in outputs)
    assert trusts[1] < trusts[2]
    return (trusts[1] + trusts[2]) / 2


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path, least: float) -> Path:
    return gated(checkpoint, tmp_path / "tiny", least)


def test_an_answer_is_the_latents_where_that_is_trusted_and_else_the_texts(
    start: Start, folder: Path, samples: Any
) -> None:
    client = start(checkpoints={"tiny": str(folder)})
    answer = client.post("/generate", json=ASKED).json()
    plain = {
        condition: client.post("/generate", json={**ASKED, "fallback": None, "condition": condition}).json()
        for condition in ("bridge", "direct")
    }
    sides = {"latent": "bridge", "text": "direct"}
    assert sorted(output["answered_from"] for output in answer["outputs"]) == ["latent"] * 2 + ["text"] * 2
    for index, output in enumerate(answer["outputs"]):
        same = plain[sides[output["answered_from"]]]["outputs"][index]
        assert {**same, "answered_from": output["answered_from"], "trust": output["trust"]} == output
        assert same["answered_from"] is same["trust"] is same["logprobs"] is None
    refused = [i for i, output in enumerate(answer["outputs"]) if output["answered_from"] == "text"]
    spent = plain["bridge"]["usage"]["generated_tokens"]
    assert answer["usage"]["generated_tokens"] == spent + sum(
        plain["direct"]["outputs"][i]["token_count"] for i in refused
    )
    assert answer["usage"]["soft_tokens"] == plain["bridge"]["usage"]["soft_tokens"]
    assert answer["usage"]["prompt_tokens"] > plain["bridge"]["usage"]["prompt_tokens"]
    seen = samples(client)
    assert seen["latentwire_gated_answers_total", "latent", "tiny"] == 2
    assert seen["latentwire_gated_answers_total", "text", "tiny"] == 2
    assert seen["latentwire_trust_count", "tiny"] == 4


def test_a_bridge_in_this_process_gives_the_same_answers(start: Start, folder: Path) -> None:
    served = start(checkpoints={"tiny": str(folder)}).post("/generate", json={**ASKED, "n": 2, "seed": 1}).json()
    here = Bridge.load(folder).generate(TEXTS, "Where?", max_tokens=6, n=2, seed=1, fallback="text")
    assert [output.text for output in here.outputs] == [output["text"] for output in served["outputs"]]
    assert [output.answered_from for output in here.outputs] == [
        output["answered_from"] for output in served["outputs"]
    ]
    trusts = [output["trust"] for output in served["outputs"]]
    assert [output.trust for output in here.outputs] == pytest.approx(trusts, abs=1e-4)
    assert here.usage.generated_tokens == served["usage"]["generated_tokens"]


def test_log_probabilities_are_those_asked_for(folder: Path) -> None:
    bridge = Bridge.load(folder)
    for count in (None, 0, 2):
        for output in bridge.generate(TEXTS, "Where?", max_tokens=2, logprobs=count, fallback="text").outputs:
            assert (output.logprobs is None) == (count is None)
            assert all(len(token.top) == count for token in output.logprobs or ())


def test_a_client_reads_where_an_answer_is_from(start: Start, folder: Path) -> None:
    from latentwire.service.client.protocol import read_json
    from latentwire.service.client.types import Generated

    raw = start(checkpoints={"tiny": str(folder)}).post("/generate", json=ASKED).content
    assert {output.answered_from for output in read_json(Generated, raw).outputs} == {"latent", "text"}


SCORED = {"inputs": ASKED["inputs"], "prompt": "Where?", "choices": [" Rome.", " the sea"], "fallback": "text"}


@pytest.fixture(scope="module")
def least_scored(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> float:
    """A trust that two of the four latents reach by what the receiver answers in as many tokens as a choice has."""
    bridge = Bridge.load(gated(checkpoint, tmp_path_factory.mktemp("scored") / "tiny", 0.0))
    trusts = sorted(
        one.trust or 0.0 for one in bridge.score(TEXTS, "Where?", SCORED["choices"], fallback="text").scores
    )
    assert trusts[1] < trusts[2]
    return (trusts[1] + trusts[2]) / 2


def test_choices_are_scored_from_the_latent_where_that_is_trusted_and_else_from_the_text(
    start: Start, checkpoint: Path, tmp_path: Path, least_scored: float, samples: Any
) -> None:
    folder = gated(checkpoint, tmp_path / "tiny", least_scored)
    client = start(checkpoints={"tiny": str(folder)})
    answer = client.post("/score", json=SCORED).json()
    plain = {
        condition: client.post("/score", json={**SCORED, "fallback": None, "condition": condition}).json()
        for condition in ("bridge", "direct")
    }
    assert sorted(score["answered_from"] for score in answer["scores"]) == ["latent"] * 2 + ["text"] * 2
    for index, score in enumerate(answer["scores"]):
        same = plain["bridge" if score["answered_from"] == "latent" else "direct"]["scores"][index]
        assert [one["logprob"] for one in score["choices"]] == pytest.approx(
            [one["logprob"] for one in same["choices"]], abs=1e-3
        )
        assert (score["trust"] >= least_scored) == (score["answered_from"] == "latent")
        assert "answered_from" not in same and "trust" not in same
    assert 0 < answer["usage"]["generated_tokens"] <= 4 * 9
    seen = samples(client)
    assert seen["latentwire_gated_answers_total", "latent", "tiny"] == 2
    assert seen["latentwire_gated_answers_total", "text", "tiny"] == 2
    here = Bridge.load(folder).score(TEXTS, "Where?", SCORED["choices"], fallback="text")
    assert [score.answered_from for score in here.scores] == [score["answered_from"] for score in answer["scores"]]
    assert [score.best for score in here.scores] == [score["best"] for score in answer["scores"]]
    assert here.usage.generated_tokens == answer["usage"]["generated_tokens"]


def test_scores_fall_back_on_texts_alone_and_only_with_a_gate(
    refused: Any, start: Start, folder: Path, samples: Any
) -> None:
    assert refused("/score", 422, json=SCORED)["param"] == "fallback"
    client = start(checkpoints={"tiny": str(folder)})
    latents = {**SCORED, "inputs": [{"latent_id": "a"}]}
    assert "give every input as text" in refused("/score", 422, on=client, json=latents)["message"]
    long = {**SCORED, "inputs": [{"text": "long " * 20}], "prompt": "why " * 40}
    assert client.post("/score", json={**long, "fallback": None}).status_code == 200
    assert "fit" in refused("/score", 422, on=client, json=long)["message"]
    assert not [key for key, value in samples(client).items() if key[0] == "latentwire_gated_answers_total" and value]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_an_answer_in_openais_format_says_what_it_is_from(start: Start, folder: Path, path: str, samples: Any) -> None:
    client = start(checkpoints={"tiny": str(folder)})
    expected = client.post("/generate", json=ASKED).json()["outputs"]
    asked = {"prompt": "Where?"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "Where?"}]}
    asked |= {"model": "tiny", "max_tokens": 6, "temperature": 0}
    for text, output in zip(TEXTS, expected, strict=True):
        (choice,) = client.post(path, json={**asked, "source": text, "fallback": "text"}).json()["choices"]
        assert (choice["text"] if "text" in choice else choice["message"]["content"]) == output["text"]
        assert choice["latentwire"]["answered_from"] == output["answered_from"]
        assert choice["latentwire"]["trust"] == pytest.approx(output["trust"], abs=1e-4)
        (choice,) = client.post(path, json={**asked, "source": text}).json()["choices"]
        assert "latentwire" not in choice
    assert samples(client)["latentwire_gated_answers_total", "text", "tiny"] == 4


@pytest.mark.parametrize(
    "change, message",
    [
        ({"stream": True}, "a fallback cannot be given with stream"),
        ({"condition": "direct"}, "a fallback cannot be given with condition direct"),
        ({"source": None, "latent_id": "a"}, "give it as text, not as a latent"),
        ({"fallback": "luck"}, "'text'"),
    ],
)
def test_what_cannot_fall_back_is_refused_in_openais_format(
    client: TestClient, change: dict[str, Any], message: str
) -> None:
    asked = {"model": "tiny", "prompt": "Where?", "source": "Ben sings.", "fallback": "text", **change}
    response = client.post("/v1/completions", json=asked)
    assert 400 <= response.status_code < 500 and message in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"stream": True}, "a fallback cannot be given with stream"),
        ({"condition": "none"}, "a fallback cannot be given with condition none"),
        ({"inputs": [{"text": "a"}, {"latent_id": "b"}]}, "give every input as text"),
        ({"fallback": "luck"}, "'text'"),
    ],
)
def test_what_cannot_fall_back_is_refused(refused: Any, change: dict[str, Any], message: str) -> None:
    assert message in refused("/generate", 422, json={**ASKED, **change})["message"]


def test_a_bridge_without_a_gate_says_who_makes_one(refused: Any, checkpoint: Path) -> None:
    error = refused("/generate", 422, json=ASKED)
    assert error["param"] == "fallback"
    assert error["message"] == "bridge 'tiny' has no gate; latentwire calibrate makes one"
    with pytest.raises(InvalidRequest, match="has no gate; latentwire calibrate makes one"):
        Bridge.load(checkpoint).generate("a", "b", fallback="text")


def test_a_text_without_room_is_refused_however_trusted_its_latent(
    refused: Any, start: Start, folder: Path, samples: Any
) -> None:
    client = start(checkpoints={"tiny": str(folder)})
    asked = {**ASKED, "inputs": [{"text": "long " * 20}], "prompt": "why " * 40}
    assert client.post("/generate", json={**asked, "fallback": None}).status_code == 200
    assert "250 fit" in refused("/generate", 422, on=client, json=asked)["message"]
    assert not [key for key, value in samples(client).items() if key[0] == "latentwire_gated_answers_total" and value]


def test_bad_fallbacks_are_named_in_python(folder: Path) -> None:
    bridge = Bridge.load(folder)
    with pytest.raises(InvalidRequest, match="fallback is 'luck'; expected 'text'"):
        bridge.generate("a", "b", fallback="luck")
    with pytest.raises(InvalidRequest, match="needs every input as text; one is of type Latent"):
        bridge.generate([bridge.encode("a")[0], "b"], "c", fallback="text")


def test_a_gate_of_other_weights_stops_the_loading(folder: Path) -> None:
    (gate,) = load_gates(folder, read_manifest(folder)).values()
    save_gates(folder, "f" * 32, {"llama": gate})
    with pytest.raises(IncompatibleBridge, match=f"{'f' * 32}; this one is {read_manifest(folder).bridge_id}"):
        Bridge.load(folder)
