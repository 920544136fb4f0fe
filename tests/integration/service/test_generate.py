"""``POST /generate`` over the real application: what it answers and what it refuses."""

import base64
import json
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient

from latentwire.bridge import engine, opened, wire
from latentwire.bridge.checkpoint import load_bridge, make_bridge, save_bridge
from latentwire.bridge.generation.continuous import token_bytes
from latentwire.service.settings import Settings

Refused = Callable[..., dict[str, Any]]
Start = Callable[..., TestClient]
Samples = Callable[[TestClient], dict[tuple[str, ...], float]]
TEXT = "Mara lives in Rome."
SHORT = {"prompt": "Where?", "max_tokens": 8}
FREE = {**SHORT, "temperature": 1.0}


def generate(client: TestClient, *inputs: dict[str, str], **options: Any) -> dict[str, Any]:
    response = client.post("/generate", json={"inputs": list(inputs), **{**SHORT, **options}})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def texts(answer: dict[str, Any]) -> list[str]:
    return [output["text"] for output in answer["outputs"]]


def latent_of(client: TestClient, text: str = TEXT, **options: Any) -> dict[str, Any]:
    latent: dict[str, Any] = client.post("/encode", json={"inputs": [text], **options}).json()["latents"][0]
    return latent


def message_of(client: TestClient, text: str = TEXT, **options: Any) -> bytes:
    return base64.b64decode(latent_of(client, text, **options)["data"])


def sealed(message: bytes) -> bytes:
    """The same message with the right checksum."""
    crc = zlib.crc32(message[36:], zlib.crc32(message[:32] + bytes(4)))
    return message[:32] + struct.pack("<I", crc) + message[36:]


def asked(message: bytes) -> dict[str, Any]:
    return {"inputs": [{"latent": base64.b64encode(message).decode()}], **SHORT}


def test_the_answer_has_an_output_for_each_input_and_counts_what_was_used(client: TestClient) -> None:
    answer = generate(client, {"text": TEXT}, {"text": "abc"})
    assert set(answer) == {"id", "bridge", "outputs", "diversity", "usage", "timing"}
    assert answer["id"].startswith("gen_")
    assert [output["index"] for output in answer["outputs"]] == [0, 1]
    for output in answer["outputs"]:
        assert set(output) == {"index", "text", "finish_reason", "token_count", "logprobs", "answered_from", "trust"}
        assert output["answered_from"] is None and output["trust"] is None
        assert output["finish_reason"] in ("stop", "length")
        assert 1 <= output["token_count"] <= 8
    assert answer["usage"] == {
        "source_tokens": len(TEXT) + 1 + 4,
        "prompt_tokens": 2 * (1 + len("\nWhere?")),
        "soft_tokens": 5 + 1,
        "generated_tokens": sum(output["token_count"] for output in answer["outputs"]),
    }
    assert answer["diversity"]["outputs"] == 2
    assert answer["diversity"]["distinct_ratio"] == len(set(texts(answer))) / 2
    timing = answer["timing"]
    assert timing["total_ms"] == pytest.approx(timing["encode_ms"] + timing["generate_ms"], abs=0.01)


def test_text_latent_and_stored_latent_of_a_source_get_the_same_output(client: TestClient) -> None:
    latent = latent_of(client, store=True)
    forms = [{"text": TEXT}, {"latent": latent["data"]}, {"latent_id": latent["id"]}]
    together = texts(generate(client, *forms))
    assert together == [texts(generate(client, form))[0] for form in forms]
    assert len(set(together)) == 1


def test_what_the_receiver_says_depends_on_the_source(client: TestClient) -> None:
    said = texts(generate(client, *({"text": text} for text in (TEXT, "x", "The lamp is red.", "1234567"))))
    assert len(set(said)) > 1


def test_a_latent_alone_reads_no_source_tokens(client: TestClient) -> None:
    assert generate(client, {"latent": latent_of(client)["data"]})["usage"]["source_tokens"] == 0


def test_temperature_0_is_greedy_whatever_the_seed(client: TestClient) -> None:
    said = {texts(generate(client, {"text": TEXT}, seed=seed))[0] for seed in range(3)}
    assert len(said) == 1


def test_a_seed_gives_the_same_text_alone_and_among_others(client: TestClient) -> None:
    alone = texts(generate(client, {"text": TEXT}, temperature=1.0, seed=7))
    assert texts(generate(client, {"text": TEXT}, temperature=1.0, seed=7)) == alone
    assert texts(generate(client, {"text": TEXT}, temperature=1.0, seed=8)) != alone
    others = [{"text": "x"}, {"text": TEXT}, {"text": "a much longer source " * 5}]
    assert texts(generate(client, *others, temperature=1.0, seed=7))[1] == alone[0]


def test_without_a_seed_two_requests_differ(client: TestClient) -> None:
    assert texts(generate(client, {"text": TEXT}, **FREE)) != texts(generate(client, {"text": TEXT}, **FREE))


def test_samples_differ_and_the_first_is_the_one_asked_for_alone(client: TestClient) -> None:
    several = generate(client, {"text": TEXT}, {"text": "x"}, n=3, temperature=1.0, seed=7)
    assert [output["index"] for output in several["outputs"]] == list(range(6))
    assert len(set(texts(several))) == 6
    alone = [texts(generate(client, {"text": text}, temperature=1.0, seed=7))[0] for text in (TEXT, "x")]
    assert [texts(several)[0], texts(several)[3]] == alone


def test_each_input_may_have_its_own_prompt(client: TestClient) -> None:
    both = texts(generate(client, {"text": TEXT}, {"text": TEXT}, prompt=["Where?", "Who lives there?"]))
    assert both == [texts(generate(client, {"text": TEXT}, prompt=p))[0] for p in ("Where?", "Who lives there?")]
    assert both[0] != both[1]


def test_a_prompt_may_place_the_latent_itself(client: TestClient) -> None:
    implied = texts(generate(client, {"text": TEXT}, prompt="Where?"))
    assert texts(generate(client, {"text": TEXT}, prompt="{latent}\nWhere?")) == implied
    assert texts(generate(client, {"text": TEXT}, prompt="Where? {latent}")) != implied


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}], ids=str)
def test_top_k_and_top_p_leave_only_likely_tokens_to_choose_from(client: TestClient, narrow: dict[str, Any]) -> None:
    greedy, hot = texts(generate(client, {"text": TEXT})), {"temperature": 100, "seed": 1}
    assert texts(generate(client, {"text": TEXT}, **hot)) != greedy
    assert texts(generate(client, {"text": TEXT}, **hot, **narrow)) == greedy


def test_a_text_crosses_the_same_wire_as_a_message(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    real, read = opened.soften, []

    def spied(*given: Any) -> Any:
        read.extend(given[-1])
        return real(*given)

    text = "Nobody has asked about this before."
    rounded, exact = (message_of(client, text, dtype=dtype) for dtype in ("float16", "float32"))
    monkeypatch.setattr(opened, "soften", spied)
    generate(client, {"text": text})
    (latent,) = read
    np.testing.assert_array_equal(latent, wire.decode(rounded).latent)
    assert not np.array_equal(latent, wire.decode(exact).latent)


def test_an_output_ends_before_a_stop_string(client: TestClient) -> None:
    free = generate(client, {"text": TEXT}, max_tokens=24, temperature=1.0, seed=3)["outputs"][0]
    stop = next(letter for letter in free["text"][1:] if letter.isascii() and letter != free["text"][0])
    for given in (stop, ["never said", stop]):
        cut = generate(client, {"text": TEXT}, max_tokens=24, temperature=1.0, seed=3, stop=given)["outputs"][0]
        assert cut["text"] == free["text"][: free["text"].index(stop)]
        assert cut["finish_reason"] == "stop"
        assert cut["token_count"] < free["token_count"]


def test_max_tokens_is_the_most_that_is_generated(client: TestClient) -> None:
    output = generate(client, {"text": TEXT}, max_tokens=1)["outputs"][0]
    assert (output["token_count"], output["finish_reason"]) == (1, "length")


def test_concurrent_requests_share_batches_and_each_gets_what_it_gets_alone(
    client: TestClient, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [f"Source number {i} says {'so ' * i}" for i in range(8)]
    alone = [generate(client, {"text": s}, temperature=1.0, seed=i) for i, s in enumerate(sources)]
    before = samples(client)
    with ThreadPoolExecutor(8) as pool:
        together = list(
            pool.map(lambda i: generate(client, {"text": sources[i]}, temperature=1.0, seed=i), range(len(sources)))
        )
    assert [answer["outputs"] for answer in together] == [answer["outputs"] for answer in alone]
    after = samples(client)
    rows, batches = (
        after[f"latentwire_batch_rows_{kind}", "generate"] - before[f"latentwire_batch_rows_{kind}", "generate"]
        for kind in ("sum", "count")
    )
    assert rows == sum(answer["usage"]["generated_tokens"] for answer in together)
    assert batches < rows / 2


def test_a_crash_of_the_sender_fails_its_request_and_the_next_works(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = engine.encode, 0

    def once(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("secret of the device")
        return real(*given)

    monkeypatch.setattr(engine, "encode", once)
    failed = client.post("/generate", json={"inputs": [{"text": "never encoded before"}], **SHORT})
    assert failed.status_code == 500
    assert failed.json()["error"]["type"] == "InferenceFailed"
    assert "secret" not in failed.text and "Traceback" not in failed.text
    assert generate(client, {"text": TEXT})["outputs"]
    assert client.get("/health/live").status_code == 200


def test_a_crash_of_the_receivers_engine_fails_its_requests_and_ends_the_service(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, died = start(), Event()
    runtime = client.app.state.runtime  # type: ignore[attr-defined]
    runtime.on_death = died.set
    (made,) = runtime.models.engines.all()

    def crash(**_: Any) -> Any:
        raise RuntimeError("secret of the device")

    monkeypatch.setattr(made.lm.model, "forward", crash)
    for _ in range(2):
        failed = client.post("/generate", json={"inputs": [{"text": TEXT}], **SHORT})
        assert failed.status_code == 500 and failed.json()["error"]["type"] == "InferenceFailed"
        assert "secret" not in failed.text and "Traceback" not in failed.text
    assert died.wait(20)
    for probe in ("/health/live", "/health/ready"):
        response = client.get(probe)
        assert response.status_code == 503 and "engine died" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "status", "param", "said"),
    [
        ({"bridge": "other"}, 404, "bridge", "'other'"),
        ({"receiver": "other"}, 404, "receiver", "'other'"),
        ({"inputs": []}, 422, "inputs", "at least 1"),
        ({"inputs": [{}]}, 422, "inputs.0", "exactly one"),
        ({"inputs": [{"text": "a", "latent": "b"}]}, 422, "inputs.0", "exactly one"),
        ({"inputs": [{"text": "a", "url": "b"}]}, 422, "inputs.0.url", "not permitted"),
        ({"inputs": [{"text": 5}]}, 422, "inputs.0.text", "string"),
        ({"inputs": [{"text": ""}]}, 422, "inputs.0.text", "''"),
        ({"inputs": [{"text": "  \n"}]}, 422, "inputs.0.text", "empty"),
        ({"inputs": [{"text": "a" * 128}]}, 422, "inputs.0.text", "129 sender tokens; this bridge reads at most 128"),
        ({"inputs": [{"text": "a"}] * 65}, 413, "inputs", "65; at most 64"),
        ({"inputs": [{"text": "a"}] * 64, "n": 16}, 413, "inputs", "1024 rows; at most 256"),
        ({"n": 17}, 413, "n", "17; at most 16"),
        ({"n": 0}, 422, "n", "got 0"),
        ({"max_tokens": 513}, 413, "max_tokens", "513; at most 512"),
        ({"max_tokens": 300}, 422, "prompt", "receiver tokens"),
        ({"max_tokens": "many"}, 422, "max_tokens", "many"),
        ({"temperature": -1}, 422, "temperature", "got -1"),
        ({"top_p": 0}, 422, "top_p", "got 0"),
        ({"seed": 1.5}, 422, "seed", "1.5"),
        ({"max_tokens": "3"}, 422, "max_tokens", "'3'"),
        ({"n": True}, 422, "n", "True"),
        ({f"f{i}": 1 for i in range(65)}, 422, None, "fields; expected bridge"),
        ({"stop": ""}, 422, "stop.0", "at least 1"),
        ({"prompt": None}, 422, None, "exactly one of prompt and messages"),
        ({"prompt": [5]}, 422, "prompt", "string"),
        ({"stop": ["a", ""]}, 422, "stop.1", "at least 1"),
        ({"prompt": ["a", "b"]}, 422, None, "2 prompts for 1 inputs"),
        ({"prompt": "{latent}{latent}"}, 422, "prompt", "2 times"),
        ({"prompt": "a" * 100_001}, 413, "prompt", "100001 characters"),
        ({"prompt": "a" * 300}, 422, "prompt", "receiver tokens"),
        ({"inputs": [{"latent_id": "lat_nothing"}]}, 404, "inputs.0.latent_id", "'lat_nothing'"),
        ({"inputs": [{"latent": "no base64!"}]}, 422, "inputs.0.latent", "'no base64!' is not base64"),
        ({"inputs": [{"text": "a"}, {"latent": ""}], "prompt": "b"}, 422, "inputs.1.latent", "0 bytes"),
        ({"model": "x"}, 422, "model", "not permitted"),
    ],
    ids=lambda value: str(value)[:50] if isinstance(value, dict) else "",
)
def test_bad_input_is_refused_and_named(
    refused: Refused, body: dict[str, Any], status: int, param: str | None, said: str
) -> None:
    error = refused("/generate", status, json={"inputs": [{"text": "a"}], **SHORT, **body})
    assert error["param"] == param
    assert said in error["message"]


def test_a_long_text_may_be_cut(client: TestClient) -> None:
    assert generate(client, {"text": "a" * 300}, truncate=True)["usage"]["source_tokens"] == 128


@pytest.mark.parametrize("place", ["text", "prompt", "latent_id"])
def test_half_a_surrogate_pair_is_the_callers_mistake(refused: Refused, place: str) -> None:
    body: dict[str, Any] = {"inputs": [{"text": "a"}], **SHORT}
    if place == "prompt":
        body["prompt"] = "\ud800"
    else:
        body["inputs"] = [{place: "\ud800"}]
    content = json.dumps(body)  # escaped: JSON can say what Unicode forbids
    refused(
        "/generate", 404 if place == "latent_id" else 422, content=content, headers={"content-type": "application/json"}
    )


def test_a_bad_row_leaves_its_batch_mates_alone(client: TestClient) -> None:
    with ThreadPoolExecutor(6) as pool:
        bodies = [{"inputs": [{"text": " " if i % 2 else TEXT}], **SHORT} for i in range(6)]
        statuses = [r.status_code for r in pool.map(lambda body: client.post("/generate", json=body), bodies)]
    assert statuses == [200, 422] * 3


def test_a_latent_of_another_bridge_is_refused_with_both_ids(
    client: TestClient, refused: Refused, checkpoint: Path, tmp_path: Path
) -> None:
    manifest, _ = load_bridge(str(checkpoint))
    torch.manual_seed(2)
    other = save_bridge(tmp_path / "other", make_bridge(manifest.bridge)).bridge_id
    decoded = wire.decode(message_of(client))
    error = refused("/generate", 409, json=asked(wire.encode(decoded.latent, other)))
    assert error["type"] == "IncompatibleBridge"
    assert other in error["message"] and manifest.bridge_id in error["message"]
    assert error["param"] == "inputs.0.latent"


def test_a_latent_of_another_width_is_refused(client: TestClient, refused: Refused) -> None:
    decoded = wire.decode(message_of(client))
    narrow = wire.encode(np.ascontiguousarray(decoded.latent[:, :8]), decoded.bridge_id)
    assert "8 wide; this bridge reads 16" in refused("/generate", 409, json=asked(narrow))["message"]


def test_more_slots_than_the_bridge_sends_are_refused(client: TestClient, refused: Refused) -> None:
    decoded = wire.decode(message_of(client))
    long = wire.encode(np.ones((33, 16), dtype=np.float32), decoded.bridge_id)
    assert "33 slots; this bridge sends at most 32" in refused("/generate", 422, json=asked(long))["message"]


def test_a_cut_message_is_refused_wherever_it_is_cut(client: TestClient, refused: Refused) -> None:
    message = message_of(client)
    for length in (0, 1, 35, 36, len(message) - 1):
        error = refused("/generate", 422, json=asked(message[:length]))
        assert (error["type"], error["param"]) == ("InvalidMessage", "inputs.0.latent")
    refused("/generate", 422, json=asked(message + b"\0"))


def test_a_message_with_any_byte_flipped_is_refused(client: TestClient) -> None:
    message = message_of(client)
    for at in [*range(36), *range(36, len(message), 17), len(message) - 1]:
        altered = message[:at] + bytes([message[at] ^ 0x40]) + message[at + 1 :]
        response = client.post("/generate", json=asked(altered))
        assert response.status_code == 422, (at, response.text)
        assert response.json()["error"]["type"] == "InvalidMessage"
    assert client.post("/generate", json=asked(message)).status_code == 200


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_numbers_no_encoder_sends_are_refused_under_a_right_checksum_and_leave_no_trace(
    client: TestClient, refused: Refused, bad: float
) -> None:
    before = texts(generate(client, {"text": TEXT}))
    message = message_of(client, dtype="float32")
    poisoned = sealed(message[:36] + struct.pack("<f", bad) + message[40:])
    assert refused("/generate", 422, json=asked(poisoned))["type"] == "InvalidMessage"
    assert texts(generate(client, {"text": TEXT})) == before


def test_a_full_queue_answers_429_at_once_and_says_when_to_come_back(start: Start) -> None:
    client = start(Settings(max_queue=4))
    admission = client.app.state.runtime.admission  # type: ignore[attr-defined]
    admission.admitted = 4
    try:
        response = client.post("/generate", json={"inputs": [{"text": "a"}], **SHORT})
    finally:
        admission.admitted = 0
    assert response.status_code == 429
    assert response.json()["error"]["type"] == "Overloaded"
    assert int(response.headers["retry-after"]) >= 1
    assert generate(client, {"text": "a"})["outputs"]


def test_a_request_that_takes_too_long_gets_504_and_the_next_works(
    client: TestClient, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurried = start(Settings(request_timeout=1e-6))
    response = hurried.post("/generate", json={"inputs": [{"text": "a"}], **SHORT})
    assert response.status_code == 504
    assert response.json()["error"]["type"] == "DeadlineExceeded"
    assert hurried.get("/health/live").status_code == 200
    assert hurried.get("/health/ready").status_code == 200


def test_models_that_do_not_fit_together_take_turns(start: Start, client: TestClient) -> None:
    sizes = client.get("/bridges").json()["bridges"][0]["loaded"]
    budget = max(sizes.values())  # and a small cache
    (lm,) = (made.lm for made in client.app.state.runtime.models.engines.all())  # type: ignore[attr-defined]
    small = start(Settings(memory_budget=budget + 256 * token_bytes(lm)))
    history = small.app.state.runtime.residency.history  # type: ignore[attr-defined]
    assert texts(generate(small, {"text": TEXT})) == texts(generate(client, {"text": TEXT}))
    sender, receiver = sizes
    steps = [(event, model) for event, model, _ in history]
    turn = [("load", sender), ("drop", sender), ("load", receiver), ("drop", receiver)]
    assert steps == (turn * 2)[: len(steps)]  # the warm-up and the request, one turn each
    assert len(steps) == 7
    assert all(resident <= budget for _, _, resident in history)
    assert len(small.get("/bridges/tiny").json()["loaded"]) == 1


def test_several_sources_of_any_kind_are_asked_in_one_prompt(client: TestClient) -> None:
    other = "Ben has a cat."
    stored = latent_of(client, other, store=True)
    sources = [{"text": TEXT}, {"latent_id": stored["id"]}, {"latent": stored["data"]}]
    asked = {"prompt": "{latents}\nWhere?"}
    together = generate(client, {"sources": sources}, {"text": TEXT}, {"sources": sources[::-1]}, **asked)
    apart = [
        generate(client, one, **asked) for one in ({"sources": sources}, {"text": TEXT}, {"sources": sources[::-1]})
    ]
    assert texts(together) == [texts(one)[0] for one in apart]
    assert together["usage"]["soft_tokens"] == sum(one["usage"]["soft_tokens"] for one in apart)
    assert apart[0]["usage"]["soft_tokens"] == 5 + 2 * stored["shape"][0]
    spelt = generate(client, {"sources": sources}, prompt="[1] {latent}\n[2] {latent}\n[3] {latent}\nWhere?")
    assert texts(spelt) == texts(apart[0])
    scored = client.post("/score", json={"inputs": [{"sources": sources}], "choices": [" a", " b"], **asked}).json()
    assert scored["usage"]["soft_tokens"] == apart[0]["usage"]["soft_tokens"]


def test_a_receiver_reads_several_sources_itself_or_none_of_them(client: TestClient) -> None:
    sources = {"sources": [{"text": TEXT}, {"text": "Ben has a cat."}]}
    direct = generate(client, sources, condition="direct")
    written = generate(client, {"text": f"[1] {TEXT}\n[2] Ben has a cat."}, condition="direct")
    none = generate(client, sources, condition="none")
    assert texts(direct) == texts(written)
    assert direct["usage"] == written["usage"] and none["usage"]["soft_tokens"] == 0
    assert direct["usage"]["prompt_tokens"] - none["usage"]["prompt_tokens"] == len(TEXT) + len("Ben has a cat.")


@pytest.mark.parametrize(
    ("inputs", "options", "status", "param", "said"),
    [
        ([{"sources": []}], {}, 422, "inputs.0.sources", "at least 1"),
        (
            [{"sources": [{"text": "a"}, {}]}],
            {},
            422,
            "inputs.0.sources.1",
            "exactly one of text, latent and latent_id",
        ),
        ([{"sources": [{"text": "a"}, {"text": " "}]}], {}, 422, "inputs.0.sources.1.text", "is empty"),
        ([{"sources": [{"latent_id": "no"}]}], {}, 404, "inputs.0.sources.0.latent_id", "no latent is stored"),
        ([{"sources": [{"latent": "?"}]}], {}, 422, "inputs.0.sources.0.latent", "not base64"),
        ([{"sources": [{"text": "a"}] * 65}], {}, 413, "sources", "sources is 65; at most 64"),
        ([{"sources": [{"text": "a"}] * 2}], {"prompt": "{latent}?"}, 422, "prompt", "for 2 sources expected"),
        ([{"sources": [{"text": "a" * 120}] * 9}], {}, 422, "prompt", "the input with 9 sources takes"),
        ([{"sources": [{"latent": "a"}]}], {"condition": "direct"}, 422, None, "give every input as text"),
    ],
)
def test_sources_that_cannot_be_asked_are_named(
    refused: Refused, inputs: list[Any], options: dict[str, Any], status: int, param: str | None, said: str
) -> None:
    error = refused("/generate", status, json={"inputs": inputs, **SHORT, **options})
    assert error["param"] == param
    assert said in error["message"]
