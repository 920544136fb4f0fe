"""Web pages that call, over the real application: foreign names and pages are refused everywhere, allowed ones read."""

from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from fastapi.testclient import TestClient
from pydantic import SecretStr

from latentwire.service.auth.keys import hash_of, key_line
from latentwire.service.settings import Settings

Start = Callable[..., TestClient]
ORIGIN = "https://app.example"
FOREIGN = {"origin": "https://evil.example", "sec-fetch-site": "cross-site"}
ASK: dict[str, Any] = {"inputs": [{"text": "a"}], "prompt": "Where?", "max_tokens": 2}
KEY = SecretStr(key_line("page", hash_of(b"key"), ["infer"]))


def routes(app: FastAPI) -> list[tuple[str, str]]:
    """Method and a path of every route there is."""
    found = []
    for route in iter_route_contexts(app.routes):
        assert route.path is not None
        path = route.path.replace("{name}", "tiny") if route.methods else f"{route.path}/anything"
        found += [(method, path) for method in sorted(route.methods or {"GET"})]
    return found


def test_a_foreign_name_is_refused_on_every_route(client: TestClient, app: FastAPI) -> None:
    for method, path in routes(app):
        response = client.request(method, path, headers={"host": "evil.example"})
        assert response.status_code == 403, (method, path)
        if method != "HEAD":
            said = response.json()["error"]
            assert "'evil.example' is no name of this service" in said["message"] and said["param"] == "host"
            assert said["request_id"] == response.headers["x-request-id"]


def test_a_foreign_page_can_have_nothing_done(client: TestClient, app: FastAPI) -> None:
    """Also not by what a browser sends without asking first: plain text, a form, or nothing."""
    acting = [(method, path) for method, path in routes(app) if method not in ("GET", "HEAD")]
    assert ("POST", "/admin/bridges/tiny/unload") in acting
    for method, path in acting:
        for kind in ("text/plain", "application/x-www-form-urlencoded", "application/json", None):
            headers = FOREIGN if kind is None else {**FOREIGN, "content-type": kind}
            assert client.request(method, path, headers=headers, content=b"{}").status_code == 403, (method, path)


def test_without_a_listed_origin_no_page_from_elsewhere_can_read(client: TestClient) -> None:
    for headers in ({"origin": ORIGIN}, FOREIGN):
        answers = [client.get("/bridges", headers=headers), client.options("/generate", headers=headers)]
        assert not any(name.startswith("access-control-") for answer in answers for name in answer.headers)


def test_pages_of_a_listed_origin_may_call_and_read_answers_refusals_and_crashes(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = start(Settings(cors_origins=(ORIGIN,), max_inputs=1))
    headers = {"origin": ORIGIN, "sec-fetch-site": "cross-site"}
    monkeypatch.setattr(client.app.state.jobs, "counts", lambda: 1 / 0)  # type: ignore[attr-defined]
    answers = {
        200: client.post("/generate", json=ASK, headers=headers),
        404: client.get("/bridges/other", headers=headers),
        413: client.post("/encode", json={"inputs": ["a", "b"]}, headers=headers),
        422: client.post("/generate", json={}, headers=headers),
        500: client.get("/metrics", headers=headers),
    }
    for status, answer in answers.items():
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, ORIGIN)
        shown = answer.headers["access-control-expose-headers"].lower()
        assert "x-request-id" in shown and "retry-after" in shown and answer.headers["x-request-id"]
    assert client.post("/generate", json=ASK, headers=FOREIGN).status_code == 403


def test_a_listed_page_is_allowed_before_it_shows_its_key_and_no_other_page_is(start: Start) -> None:
    client = start(Settings(cors_origins=(ORIGIN,), api_keys=KEY), ready=False)
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization, content-type"}
    allowed = client.options("/generate", headers={"origin": ORIGIN, **asks})
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, ORIGIN)
    assert {"authorization", "content-type"} <= set(allowed.headers["access-control-allow-headers"].split(", "))
    refused = client.options("/generate", headers={**FOREIGN, **asks})
    assert refused.status_code == 400 and "access-control-allow-origin" not in refused.headers
    unknown = client.post("/generate", json=ASK, headers={"origin": ORIGIN})
    assert (unknown.status_code, unknown.headers["access-control-allow-origin"]) == (401, ORIGIN)


def test_probes_by_address_are_answered_where_the_service_listens_on_all(start: Start) -> None:
    client = start(Settings(host="0.0.0.0", insecure=True))
    for host in ("10.42.0.7:8000", "[fd00::7]:8000", "localhost:8000"):
        for path in ("/health/live", "/health/ready"):
            assert client.get(path, headers={"host": host}).status_code == 200
    assert client.get("/health/live", headers={"host": "evil.example"}).status_code == 403
