"""What a key opens, over the real application: every route of it, its limits, and the messages that it signs."""

import base64
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from fastapi.testclient import TestClient
from pydantic import SecretStr

from latentwire.bridge import wire
from latentwire.bridge.generation.steps import Choices
from latentwire.service.app import create_app
from latentwire.service.auth.guard import access_of
from latentwire.service.auth.keys import SCOPES, hash_of, key_line
from latentwire.service.settings import Settings

Start = Callable[..., TestClient]
ASK = {"prompt": "Where?", "max_tokens": 2}
READY_SECONDS = 60.0
SIGNING_KEY = "sixteen bytes ok"
OPEN = {
    "/openapi.json", "/static-offline-docs/anything", "/docs", "/docs/oauth2-redirect", "/redoc", "/health/live",
    "/health/ready", "/", "/page/anything",
}  # fmt: skip
KEYS = "\n".join(
    [
        *(key_line(scope, hash_of(scope.encode()), [scope]) for scope in sorted(SCOPES)),
        key_line("all", hash_of(b"all"), SCOPES),
        key_line("prometheus", hash_of(b"prometheus"), []),
        key_line("few", hash_of(b"few"), ["infer"], requests_per_minute=2),
        key_line("leaver", hash_of(b"leaver"), ["infer"], tokens_per_minute=20),
        key_line("short", hash_of(b"short"), ["infer"], tokens_per_minute=10),
    ]
)


def bearing(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def routes(app: FastAPI) -> list[tuple[str, str]]:
    """Method and a path of every route there is, in the document or not."""
    found = []
    for route in iter_route_contexts(app.routes):
        assert route.path is not None
        path = route.path.replace("{name}", "tiny") if route.methods else f"{route.path}/anything"  # a mount
        found += [(method, path) for method in sorted(route.methods or {"GET"})]
    return found


@pytest.fixture(scope="module")
def guarded(checkpoint: Path) -> Iterator[TestClient]:
    """One service with the keys above and a signing key."""
    settings = Settings(api_keys=SecretStr(KEYS), signing_key=SecretStr(SIGNING_KEY))
    with TestClient(create_app(settings, {"tiny": str(checkpoint)}), raise_server_exceptions=False) as client:
        deadline = time.monotonic() + READY_SECONDS
        while client.get("/health/ready").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield client


@pytest.fixture
def app(guarded: TestClient) -> FastAPI:
    assert isinstance(guarded.app, FastAPI)
    return guarded.app


def test_every_route_but_the_open_ones_asks_for_a_key(guarded: TestClient, app: FastAPI) -> None:
    every = routes(app)
    assert {"/encode", "/generate", "/bridges", "/bridges/tiny", "/metrics", "/health/live"} <= {p for _, p in every}
    for method, path in every:
        response = guarded.request(method, path)
        if path in OPEN:
            assert response.status_code not in (401, 403), (method, path)
        else:
            assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer"), (method, path)


def test_every_route_is_listed_and_opens_to_the_keys_that_hold_its_scope_and_to_no_other(
    guarded: TestClient, app: FastAPI
) -> None:
    for method, path in routes(app):
        access = access_of(path)
        assert access is not None, f"{path} is in no entry of ACCESS"
        may = {"open": {*SCOPES, "all", "prometheus"}, "any key": {*SCOPES, "all", "prometheus"}}.get(
            access, {access, "all"}
        )
        for key in (*SCOPES, "all", "prometheus"):
            status = guarded.request(method, path, headers=bearing(key)).status_code
            assert (status != 403) == (key in may), (method, path, key)
            assert status != 401


def test_a_route_that_nobody_listed_is_closed_even_to_a_key_with_every_scope(guarded: TestClient, app: FastAPI) -> None:
    before = list(app.router.routes)

    @app.get("/forgotten")
    async def forgotten() -> str:
        raise AssertionError("it was reached")

    try:
        assert guarded.get("/forgotten").status_code == 401
        response = guarded.get("/forgotten", headers=bearing("all"))
    finally:
        app.router.routes[:] = before
    assert (response.status_code, response.json()["error"]["type"]) == (403, "Forbidden")
    assert "/forgotten" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "path, headers, status, kind",
    [
        ("/encode", {}, 401, "Unauthenticated"),
        ("/encode", bearing("nobody"), 401, "Unauthenticated"),
        ("/encode", {"Authorization": "Basic all"}, 401, "Unauthenticated"),
        ("/encode?key=all", {"X-Api-Key": "all"}, 401, "Unauthenticated"),
        ("/encode", bearing("evaluate"), 403, "Forbidden"),
        ("/encode", bearing("prometheus"), 403, "Forbidden"),
    ],
)
def test_a_refusal_comes_in_the_one_body_and_repeats_no_key(
    guarded: TestClient, path: str, headers: dict[str, str], status: int, kind: str
) -> None:
    response = guarded.post(path, json={"inputs": ["a"]}, headers={**headers, "x-request-id": "r-1"})
    assert response.status_code == status
    error = response.json()["error"]
    assert (set(error), error["type"]) == ({"type", "message", "param", "request_id"}, kind)
    assert error["request_id"] == response.headers["x-request-id"] == "r-1"
    assert ("www-authenticate" in response.headers) == (status == 401)
    assert "nobody" not in response.text


def test_a_refusal_is_counted_like_any_other_answer(
    guarded: TestClient, samples: Callable[..., dict[tuple[str, ...], float]]
) -> None:
    guarded.headers.update(bearing("prometheus"))
    try:
        counted = ("latentwire_requests_total", "/encode", "403")
        before = samples(guarded).get(counted, 0)
        assert guarded.post("/encode", json={"inputs": ["a"]}).status_code == 403
        assert samples(guarded)[counted] == before + 1
    finally:
        del guarded.headers["authorization"]


def test_requests_over_a_keys_limit_are_told_when_to_come_back(guarded: TestClient) -> None:
    answers = [guarded.get("/bridges", headers=bearing("few")) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert answers[2].json()["error"]["type"] == "RateLimited"
    assert 20 < int(answers[2].headers["retry-after"]) <= 61  # what is left of the minute that has just begun
    assert guarded.get("/bridges", headers=bearing("infer")).status_code == 200


def test_tokens_of_an_answer_that_nobody_waited_for_are_charged_too(
    guarded: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Choices.prepare_tensor_args

    def slowly(*given: Any, **named: Any) -> Any:
        time.sleep(0.05)
        return real(*given, **named)

    monkeypatch.setattr(Choices, "prepare_tensor_args", slowly)
    asked = {"inputs": [{"text": "a"}], "prompt": "Where?", "max_tokens": 100, "timeout_seconds": 2.0}
    assert guarded.post("/generate", json=asked, headers=bearing("leaver")).status_code == 504
    refused = guarded.post("/generate", json=asked, headers=bearing("leaver"))
    assert (refused.status_code, refused.json()["error"]["type"]) == (429, "RateLimited")


def test_tokens_are_charged_to_the_key_that_used_them(guarded: TestClient) -> None:
    inputs = {"inputs": ["a text of many more than ten tokens"]}
    assert guarded.post("/encode", json=inputs, headers=bearing("short")).status_code == 200
    refused = guarded.post("/generate", json={"inputs": [{"text": "a"}], **ASK}, headers=bearing("short"))
    assert (refused.status_code, refused.json()["error"]["type"]) == (429, "RateLimited")
    assert "10 tokens" in refused.json()["error"]["message"]
    assert guarded.get("/bridges", headers=bearing("short")).status_code == 200
    assert guarded.post("/encode", json=inputs, headers=bearing("infer")).status_code == 200


def test_without_keys_every_route_is_open_and_nothing_is_limited(client: TestClient) -> None:
    assert isinstance(client.app, FastAPI)
    for method, path in routes(client.app):
        assert client.request(method, path).status_code not in (401, 403, 429), (method, path)


def test_messages_of_a_signing_service_are_signed_and_only_those_are_taken(guarded: TestClient) -> None:
    def encode(**options: Any) -> dict[str, Any]:
        response = guarded.post("/encode", json={"inputs": ["Rome"], **options}, headers=bearing("infer"))
        latent: dict[str, Any] = response.json()["latents"][0]
        return latent

    def ask(**given: str) -> Any:
        return guarded.post("/generate", json={"inputs": [given], **ASK}, headers=bearing("infer"))

    latent = encode(store=True)
    message = base64.b64decode(latent["data"])
    decoded = wire.decode(message, key=SIGNING_KEY.encode())
    assert latent["bytes"] == len(message)
    answers = [ask(latent=latent["data"]), ask(latent_id=latent["id"]), ask(text="Rome")]
    assert [answer.status_code for answer in answers] == [200, 200, 200]
    assert len({answer.json()["outputs"][0]["text"] for answer in answers}) == 1
    altered = bytearray(message)
    altered[40] ^= 1
    other = wire.encode(decoded.latent, decoded.bridge_id, key=b"another key of 16")
    for wrong in (bytes(altered), wire.encode(decoded.latent, decoded.bridge_id), other):
        refused = ask(latent=base64.b64encode(wrong).decode())
        assert (refused.status_code, refused.json()["error"]["type"]) == (403, "Forbidden")
        assert refused.json()["error"]["param"] == "inputs.0.latent"


def test_a_service_that_signs_nothing_takes_signed_messages_too(guarded: TestClient, client: TestClient) -> None:
    signed = guarded.post("/encode", json={"inputs": ["Rome"]}, headers=bearing("infer")).json()["latents"][0]["data"]
    assert client.post("/generate", json={"inputs": [{"latent": signed}], **ASK}).status_code == 200
