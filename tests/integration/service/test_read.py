"""``POST /read`` over the real application: what latents say, how likely that is, and what is refused."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from latentwire.bridge.bridge import Bridge
from latentwire.service.settings import Settings

Start = Callable[..., TestClient]
Samples = Callable[[TestClient], dict[tuple[str, ...], float]]
TEXTS = ["Mara lives in Rome.", "Ben"]


def read(client: TestClient, *inputs: dict[str, str], **options: Any) -> dict[str, Any]:
    response = client.post("/read", json={"inputs": list(inputs), **options})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_latents_say_what_the_bridge_finds_in_them(client: TestClient, checkpoint: Path) -> None:
    answer = read(client, *({"text": text} for text in TEXTS), against=TEXTS, max_tokens=12)
    here = Bridge.load(checkpoint).read(TEXTS, against=TEXTS, max_tokens=12)
    assert answer["trained"] is here.trained is False and answer["bridge"] == "tiny"
    for at, (one, local) in enumerate(zip(answer["readings"], here.readings, strict=True)):
        assert local.against is not None
        assert (one["index"], one["text"], one["finish_reason"]) == (at, local.text, local.finish_reason)
        for said, same in ((one, local), (one["against"], local.against)):
            assert (said["text"], said["token_count"]) == (same.text, same.token_count)
            assert said["logprob"] == pytest.approx(same.logprob, abs=1e-3)
            assert said["mean"] == pytest.approx(same.mean, abs=1e-3)
    assert answer["usage"]["soft_tokens"] == here.usage.soft_tokens
    assert answer["usage"]["generated_tokens"] == here.usage.generated_tokens


def test_the_built_in_bridge_says_its_sources_with_their_ends(start: Start) -> None:
    client = start(checkpoints={"builtin": "builtin"})
    texts = ["Ben lives in Oslo. Mara wants a cup of tea.", "Mara sings."]
    kept = client.post("/encode", json={"inputs": texts, "store": True}).json()["latents"]
    inputs = [{"latent_id": kept[0]["id"]}, {"latent": kept[1]["data"]}]
    answer = read(client, *inputs, against=texts)
    assert answer["trained"] is True and [one["text"] for one in answer["readings"]] == texts
    for one in answer["readings"]:
        assert one["finish_reason"] == "stop" and one["token_count"] == one["against"]["token_count"]
        assert one["logprob"] == pytest.approx(one["against"]["logprob"], abs=1e-3)
    assert "against" not in read(client, *inputs)["readings"][0]


def test_an_operators_limit_holds_unless_more_is_asked_for_by_name(start: Start) -> None:
    client = start(Settings(max_tokens=5))
    assert read(client, {"text": TEXTS[0]})["readings"][0]["token_count"] <= 5
    response = client.post("/read", json={"inputs": [{"text": TEXTS[0]}], "max_tokens": 6})
    assert response.status_code == 413 and response.json()["error"]["param"] == "max_tokens"


def test_what_was_read_is_counted(client: TestClient, samples: Samples) -> None:
    before = samples(client)
    alone = read(client, {"text": TEXTS[0]}, max_tokens=4)["usage"]
    held = read(client, {"text": TEXTS[0]}, against=TEXTS[0], max_tokens=4)["usage"]
    after = samples(client)
    for kind in ("prompt", "soft", "generated"):
        key = ("latentwire_tokens_total", kind)
        assert after[key] - before.get(key, 0.0) == alone[f"{kind}_tokens"] + held[f"{kind}_tokens"]
    assert held["soft_tokens"] == 2 * alone["soft_tokens"] and held["prompt_tokens"] > alone["prompt_tokens"] + 19
    assert after["latentwire_requests_total", "/read", "200"] >= 2


@pytest.mark.parametrize(
    ("changes", "status", "param", "named"),
    [
        ({"inputs": []}, 422, "inputs", "at least 1 item"),
        ({"inputs": [{}]}, 422, "inputs.0", "give exactly one of text, latent and latent_id, not 0"),
        ({"inputs": [{"sources": [{"text": "a"}]}]}, 422, "inputs.0.sources", "Extra inputs"),
        ({"inputs": [{"text": " "}]}, 422, "inputs.0.text", "empty"),
        ({"inputs": [{"latent": "////"}]}, 422, "inputs.0.latent", "the message has 3 bytes"),
        ({"inputs": [{"latent_id": "none"}]}, 404, "inputs.0.latent_id", "none"),
        ({"inputs": [{"text": "a"}] * 65}, 413, "inputs", "inputs is 65; at most 64"),
        ({"against": ["a", "b"]}, 422, None, "2 originals for 1 inputs; give one for each"),
        ({"against": ""}, 422, "against.0", "at least 1 character"),
        ({"against": "a" * 100_001}, 413, "against", "has 100001 characters; at most 100000"),
        ({"against": "a" * 400}, 422, "against", "takes [0-9]* receiver tokens; 256 fit"),
        ({"max_tokens": 0}, 422, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 255}, 422, "max_tokens", "is 255; beside a latent of [0-9]+ slots .* has room for 245"),
        ({"prompt": "a"}, 422, "prompt", "Extra inputs"),
        ({"bridge": "nowhere"}, 404, "bridge", "no bridge is called 'nowhere'"),
        ({"receiver": "nobody"}, 404, None, "nobody"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_by_name(
    refused: Callable[..., dict[str, Any]], changes: dict[str, Any], status: int, param: str | None, named: str
) -> None:
    error = refused("/read", status, json={"inputs": [{"text": "Mara"}], **changes})
    assert param is None or error["param"] == param
    assert re.search(named, error["message"]), error
