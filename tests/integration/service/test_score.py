"""``POST /score`` over the real application: how likely continuations are, and what is refused."""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from latentwire.bridge.bridge import Bridge
from latentwire.service.settings import Settings

Start = Callable[..., TestClient]
Samples = Callable[[TestClient], dict[tuple[str, ...], float]]
TEXT = "Mara lives in Rome."
PROMPT = "Where?"
CHOICES = [" Rome", " Paris is where", " x"]


def score(client: TestClient, *inputs: dict[str, str], **options: Any) -> dict[str, Any]:
    body = {"inputs": list(inputs), "prompt": PROMPT, "choices": CHOICES, **options}
    response = client.post("/score", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def nats(answer: dict[str, Any]) -> list[list[float]]:
    return [[choice["logprob"] for choice in one["choices"]] for one in answer["scores"]]


def near(rows: list[list[float]]) -> list[Any]:
    return [pytest.approx(row, abs=1e-3) for row in rows]


def test_choices_are_as_likely_as_the_bridge_finds_them(client: TestClient, checkpoint: Path) -> None:
    answer = score(client, {"text": TEXT}, {"text": "Ben"}, logprobs=True)
    here = Bridge.load(checkpoint).score([TEXT, "Ben"], PROMPT, CHOICES, logprobs=True)
    assert nats(answer) == near([[choice.logprob for choice in one.choices] for one in here.scores])
    for at, (one, local) in enumerate(zip(answer["scores"], here.scores, strict=True)):
        assert (one["index"], one["best"]) == (at, local.best) and len({*nats(answer)[at]}) == 3
        for choice, same in zip(one["choices"], local.choices, strict=True):
            assert (choice["text"], choice["token_count"]) == (same.text, len(same.text) + 1)
            assert choice["mean"] == pytest.approx(same.mean, abs=1e-3)
            assert choice["probability"] == pytest.approx(same.probability, abs=1e-3)
            assert sum(token["logprob"] for token in choice["logprobs"]) == pytest.approx(choice["logprob"], abs=1e-3)
    read = [1 + len("\nWhere?") + sum(map(len, CHOICES)) + len(CHOICES)] * 2
    assert answer["usage"] == {
        "source_tokens": len(TEXT) + 1 + 4, "prompt_tokens": sum(read), "soft_tokens": 5 + 1, "generated_tokens": 0,
    }  # fmt: skip


def test_an_input_is_a_text_a_latent_or_a_stored_one_and_a_rival_takes_its_place(client: TestClient) -> None:
    latent = client.post("/encode", json={"inputs": [TEXT], "store": True}).json()["latents"][0]
    wanted = nats(score(client, {"text": TEXT}))
    assert nats(score(client, {"latent": latent["data"]})) == near(wanted)
    assert nats(score(client, {"latent_id": latent["id"]})) == near(wanted)
    others = [nats(score(client, {"text": TEXT}, condition=condition)) for condition in ("direct", "none")]
    assert all(other != near(wanted) for other in others) and others[0] != near(others[1])
    plain = score(client, {"text": TEXT}, end=False)["scores"][0]["choices"]
    assert [choice["token_count"] for choice in plain] == [len(choice) for choice in CHOICES]
    assert "logprobs" not in plain[0]


def test_company_changes_no_score(client: TestClient) -> None:
    texts = [TEXT, "Ben", "a much longer text than the others, to be read beside them"]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda text: score(client, {"text": text}), texts * 8))
    alone = [nats(score(client, {"text": text}))[0] for text in texts]
    assert [nats(answer)[0] for answer in answers] == near(alone * 8)
    together = nats(score(client, *({"text": text} for text in texts)))
    assert together == near(alone)


def test_scores_and_answers_of_one_receiver_at_once_are_those_alone(client: TestClient) -> None:
    asked = {"inputs": [{"text": TEXT}], "prompt": PROMPT, "max_tokens": 24}
    said, wanted = client.post("/generate", json=asked).json()["outputs"], nats(score(client, {"text": TEXT}))

    def both(number: int) -> bool:
        if number % 2:
            return nats(score(client, {"text": TEXT})) == near(wanted)
        return bool(client.post("/generate", json=asked).json()["outputs"] == said)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(both, range(32)))


def test_what_was_read_is_counted(client: TestClient, samples: Samples) -> None:
    before = samples(client)
    answer = score(client, {"text": TEXT})
    after = samples(client)

    def grown(*key: str) -> float:
        return after[key] - before.get(key, 0.0)

    assert grown("latentwire_tokens_total", "prompt") == answer["usage"]["prompt_tokens"]
    assert grown("latentwire_tokens_total", "soft") == answer["usage"]["soft_tokens"] == 5
    assert grown("latentwire_batch_rows_count", "score") == 1


@pytest.mark.parametrize(
    ("changes", "status", "param", "named"),
    [
        ({"choices": []}, 422, "choices", "at least 1 item"),
        ({"choices": ["a", ""]}, 422, "choices.1", "at least 1 character"),
        ({"choices": ["a"] * 257}, 422, "choices", "at most 256 items"),
        ({"choices": ["a"] * 256, "inputs": [{"text": "a"}] * 17}, 413, "choices", "4352 continuations; at most 4096"),
        ({"choices": ["a" * 60_000, "b" * 60_000]}, 413, "choices", "has 120000 characters; at most 100000"),
        ({"choices": ["a" * 400]}, 422, "prompt", "takes [0-9]* receiver tokens; 256 fit"),
        ({"inputs": []}, 422, "inputs", "at least 1 item"),
        ({"prompt": ["a", "b"]}, 422, None, "2 prompts for 1 inputs"),
        ({"n": 2}, 422, "n", "Extra inputs"),
        ({"bridge": "nowhere"}, 404, "bridge", "no bridge is called 'nowhere'"),
        ({"receiver": "nobody"}, 404, None, "nobody"),
        ({"inputs": [{"latent_id": "none"}]}, 404, "inputs.0.latent_id", "none"),
        ({"inputs": [{"latent_id": "a"}], "condition": "direct"}, 422, None, "give every input as text"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_refused_by_name(
    client: TestClient, changes: dict[str, Any], status: int, param: str | None, named: str
) -> None:
    body = {"inputs": [{"text": TEXT}], "prompt": PROMPT, "choices": CHOICES, **changes}
    response = client.post("/score", json=body)
    error = response.json()["error"]
    assert response.status_code == status and (param is None or error["param"] == param)
    assert re.search(named, error["message"]), error


def test_a_full_service_refuses_and_a_deadline_ends_a_score(start: Start) -> None:
    client = start(Settings(max_queue=2))
    inputs = [{"text": TEXT}] * 3
    response = client.post("/score", json={"inputs": inputs, "prompt": PROMPT, "choices": CHOICES})
    assert response.status_code == 413 and "makes 3 rows; at most 2 can wait" in response.json()["error"]["message"]
    body = {"inputs": inputs[:1], "prompt": PROMPT, "choices": CHOICES, "timeout_seconds": 1e-4}
    response = client.post("/score", json=body)
    assert response.status_code == 504 and response.json()["error"]["type"] == "DeadlineExceeded"
    assert client.post("/score", json={**body, "timeout_seconds": 30}).status_code == 200
