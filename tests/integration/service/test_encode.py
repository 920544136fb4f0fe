"""``POST /encode`` over the real application: what it answers and what it refuses."""

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from latentwire.bridge import wire
from latentwire.service.settings import Settings

Refused = Callable[..., dict[str, Any]]
Start = Callable[..., TestClient]
Samples = Callable[[TestClient], dict[tuple[str, ...], float]]
JSON = {"content-type": "application/json"}
TEXT = "Mara lives in Rome."
LIMIT = 128  # the bridge's max_source_tokens; the sender has a token for every byte, and a BOS


def encode(client: TestClient, *texts: str, **options: Any) -> dict[str, Any]:
    response = client.post("/encode", json={"inputs": list(texts), **options})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_the_answer_describes_each_latent_in_the_order_of_the_inputs(client: TestClient) -> None:
    answer = encode(client, TEXT, "Zoë")
    assert set(answer) == {"bridge", "latents", "usage", "timing"}
    assert answer["bridge"] == "tiny"
    first, second = answer["latents"]
    fields = {"data", "shape", "dtype", "bytes", "source_tokens", "source_bytes", "truncated"}
    assert set(first) == set(second) == fields  # no id: nothing was stored
    assert (first["source_tokens"], first["source_bytes"]) == (len(TEXT) + 1, len(TEXT))
    assert (second["source_tokens"], second["source_bytes"]) == (5, 4)
    assert (first["shape"], second["shape"]) == ([5, 16], [2, 16])
    assert not first["truncated"]
    assert answer["usage"] == {
        "source_tokens": len(TEXT) + 6,
        "prompt_tokens": 0,
        "soft_tokens": 0,
        "generated_tokens": 0,
    }
    assert answer["timing"]["total_ms"] >= answer["timing"]["encode_ms"] > 0


@pytest.mark.parametrize(("dtype", "size"), [("float16", 2), ("float32", 4), ("int8", 1)])
def test_the_data_is_a_message_of_this_bridge_in_the_dtype_asked_for(client: TestClient, dtype: str, size: int) -> None:
    latent = encode(client, TEXT, dtype=dtype)["latents"][0]
    message = base64.b64decode(latent["data"], validate=True)
    K, C = latent["shape"]
    assert latent["bytes"] == len(message) == 36 + K * C * size + (4 * K if dtype == "int8" else 0)
    (bridge,) = client.get("/bridges").json()["bridges"]
    decoded = wire.decode(message, bridge_id=bridge["bridge_id"], latent_dim=bridge["latent_dim"])
    assert decoded.dtype == latent["dtype"] == dtype
    exact = wire.decode(base64.b64decode(encode(client, TEXT, dtype="float32")["latents"][0]["data"])).latent
    assert np.abs(decoded.latent - exact).max() < np.abs(exact).max() / 100


def test_codes_are_kept_and_asked_like_numbers_and_refused_where_a_bridge_has_no_codebooks(
    start: Start, checkpoint: Path
) -> None:
    client = start(None, {"world": "builtin", "tiny": str(checkpoint)})
    source, prompt = "Ben lives in Rome. Mara wants a cup of tea.", "Question: Where does Ben live?\nAnswer:"
    latent = encode(client, source, bridge="world", dtype="rq8", store=True)["latents"][0]
    assert (latent["dtype"], latent["bytes"]) == ("rq8", 36 + 4 + 8 * latent["shape"][0])
    body = {"bridge": "world", "prompt": prompt, "max_tokens": 16}
    for given in ({"latent": latent["data"]}, {"latent_id": latent["id"]}):
        answer = client.post("/generate", json={**body, "inputs": [given]})
        assert answer.json()["outputs"][0]["text"] == " Ben lives in Rome.", answer.text
    refused = client.post("/encode", json={"inputs": [TEXT], "bridge": "tiny", "dtype": "rq8"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "dtype")
    assert "'rq8' needs 8 codebooks and the bridge has none" in refused.json()["error"]["message"]


def test_a_text_has_the_same_latent_alone_and_among_others(start: Start) -> None:
    client = start(Settings(encode_cache=False))
    alone = encode(client, TEXT, dtype="float32")["latents"][0]
    among = encode(client, "a", TEXT, "a much longer text " * 6, dtype="float32")["latents"][1]
    assert among["shape"] == alone["shape"]
    one, other = (wire.decode(base64.b64decode(latent["data"])).latent for latent in (alone, among))
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_text_that_comes_twice_is_read_once_and_answered_twice(start: Start, samples: Samples) -> None:
    client, read = start(Settings(encode_cache=False)), ("latentwire_batch_rows_sum", "encode")
    before = samples(client)[read]
    answer = encode(client, "twice", TEXT, "twice", dtype="float32")
    assert samples(client)[read] - before == 2
    first, second, third = answer["latents"]
    assert first == third != second
    assert answer["usage"]["source_tokens"] == sum(latent["source_tokens"] for latent in answer["latents"])


def test_a_stored_latent_has_the_same_id_every_time(client: TestClient) -> None:
    first, again, other = (
        encode(client, text, store=True)["latents"][0]["id"] for text in (TEXT, TEXT, "something else")
    )
    assert first == again != other


def test_a_text_at_the_limit_is_read_whole_and_one_over_it_is_refused(client: TestClient, refused: Refused) -> None:
    assert encode(client, "a" * (LIMIT - 1))["latents"][0]["source_tokens"] == LIMIT
    error = refused("/encode", 422, json={"inputs": ["b", "a" * LIMIT]})
    assert error["param"] == "inputs.1"
    assert f"{LIMIT + 1} sender tokens" in error["message"] and f"at most {LIMIT}" in error["message"]


def test_truncate_cuts_a_long_text_and_says_so(client: TestClient) -> None:
    cut, whole = encode(client, "a" * 300, "a" * 10, truncate=True)["latents"]
    assert (cut["truncated"], cut["source_tokens"], cut["source_bytes"]) == (True, LIMIT, 300)
    assert not whole["truncated"]


def test_a_refused_text_takes_nobody_down_with_it(client: TestClient, refused: Refused) -> None:
    error = refused("/encode", 422, json={"inputs": [TEXT, " "]})
    assert "' ' is empty" in error["message"]


@pytest.mark.parametrize(
    ("body", "status", "param", "said"),
    [
        ({"inputs": []}, 422, "inputs", "at least 1"),
        ({}, 422, "inputs", "required"),
        ({"inputs": "text"}, 422, "inputs", "list"),
        ({"inputs": [7]}, 422, "inputs.0", "string"),
        ({"inputs": [None]}, 422, "inputs.0", "string"),
        ({"inputs": ["a", ""]}, 422, "inputs.1", "''"),
        ({"inputs": [" \n\t "]}, 422, "inputs.0", "empty"),
        ({"inputs": ["a"], "bridge": "other"}, 404, "bridge", "'other'; there are tiny"),
        ({"inputs": ["a"], "dtype": "float64"}, 422, "dtype", "float64"),
        ({"inputs": ["a"], "tuncate": True}, 422, "tuncate", "not permitted"),
        ({"inputs": ["a"], "store": "yes"}, 422, "store", "yes"),
        ({"inputs": ["a"] * 65}, 413, "inputs", "65; at most 64"),
        ({"inputs": ["a"] * 300}, 413, "inputs", "300; at most 64"),
        ({"inputs": ["a" * 100_001]}, 413, "inputs.0", "100001 characters; at most 100000"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_bad_input_is_refused_and_named(
    refused: Refused, body: dict[str, Any], status: int, param: str, said: str
) -> None:
    error = refused("/encode", status, json=body)
    assert error["param"] == param
    assert said in error["message"]


@pytest.mark.parametrize(
    ("content", "status"),
    [(b'{"inputs":', 422), (b"\xff\xfe{", 400), (b"[1]", 422), (b"", 422), (b"null", 422), (b"[" * 100_000, 400)],
    ids=["cut", "not-utf8", "list", "empty", "null", "deep"],
)
def test_a_body_that_is_not_an_object_is_refused(refused: Refused, content: bytes, status: int) -> None:
    assert refused("/encode", status, content=content, headers=JSON)["param"] is None


@pytest.mark.parametrize("kind", ["text/plain", None])
def test_a_body_that_does_not_call_itself_json_is_told_what_to_say(refused: Refused, kind: str | None) -> None:
    headers = {"content-type": kind} if kind else {}
    error = refused("/encode", 415, content=b'{"inputs": ["a"]}', headers=headers)
    assert error["message"] == f"the content-type is {kind or 'none'}; expected application/json"


def test_a_body_that_cannot_be_read_is_told_why(refused: Refused) -> None:
    assert "can't decode byte 0xff" in refused("/encode", 400, content=b'{"inputs": ["\xff"]}', headers=JSON)["message"]
    assert "recursion" in refused("/encode", 400, content=b"[" * 100_000, headers=JSON)["message"]


def test_a_body_declared_too_long_is_refused_before_a_byte_of_it_is_read(client: TestClient) -> None:
    async def never() -> Any:
        raise AssertionError("the body was read")

    async def ask() -> list[Any]:
        sent: list[Any] = []
        scope = {
            "type": "http", "method": "POST", "path": "/encode", "raw_path": b"/encode", "query_string": b"",
            "root_path": "", "headers": [(b"content-length", b"99999999999"), (b"content-type", b"application/json")],
        }  # fmt: skip

        async def send(message: Any) -> None:
            sent.append(message)

        await client.app(scope, never, send)
        return sent

    assert client.portal is not None
    assert client.portal.call(ask)[0]["status"] == 413


def test_a_million_wrong_items_make_one_short_error(refused: Refused) -> None:
    error = refused("/encode", 422, json={"inputs": [1] * 200_000})
    assert (error["param"], error["message"]) == ("inputs.0", "inputs.0: Input should be a valid string, got 1")


def test_what_a_caller_sent_is_not_sent_back_whole(client: TestClient) -> None:
    body = {"inputs": ["a"], "bridge": "b" * 1_000_000, "c" * 1_000_000: 1}
    assert len(client.post("/encode", json=body).content) < 2000
    assert len(client.get("/bridges/" + "b" * 60_000).content) < 2000


def test_another_method_is_told_which_one_is_meant(client: TestClient) -> None:
    response = client.get("/encode")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")


def test_broken_json_is_told_where_it_breaks(refused: Refused) -> None:
    error = refused("/encode", 422, content=b'{"inputs":', headers=JSON)
    assert error["message"] == "the body is not JSON at character 10: Expecting value"


def test_half_a_surrogate_pair_is_the_callers_mistake(refused: Refused) -> None:
    error = refused("/encode", 422, content=b'{"inputs":["ok \\ud800"]}', headers=JSON)
    assert "'\\ud800' at character 3" in error["message"]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_a_413_however_it_is_sent(start: Start, refused: Refused, chunked: bool) -> None:
    small = start(Settings(max_body=2000))
    content: Any = b'{"inputs":["' + b"a" * 5000 + b'"]}'
    error = refused("/encode", 413, on=small, content=iter([content]) if chunked else content, headers=JSON)
    assert error["type"] == "TooLarge"
    assert error["param"] == "body"
    assert "2000 bytes" in error["message"]


def test_a_request_that_could_never_fit_the_queue_is_too_large_rather_than_early(
    start: Start, refused: Refused
) -> None:
    narrow = start(Settings(max_queue=3))
    error = refused("/encode", 413, on=narrow, json={"inputs": ["a"] * 4})
    assert "4 rows; at most 3" in error["message"]
    encode(narrow, "a", "b", "c")


def test_a_store_that_cannot_take_a_latent_says_so(start: Start, refused: Refused) -> None:
    tiny = start(Settings(store_memory=10))
    assert refused("/encode", 503, on=tiny, json={"inputs": ["a"], "store": True})["type"] == "StoreUnavailable"
