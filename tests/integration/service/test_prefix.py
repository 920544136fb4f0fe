"""Below a path of somebody else's site, behind a proxy that takes the path off and behind one that leaves it in."""

import json
from collections.abc import Callable
from urllib.parse import urljoin

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr

from latentwire.service.auth.keys import hash_of, key_line
from latentwire.service.settings import Settings

Start = Callable[..., TestClient]
ASK = {"inputs": [{"text": "Mara sings."}], "prompt": "What?", "max_tokens": 2}


@pytest.fixture
def below(start: Start) -> TestClient:
    return start(Settings(root_path="/lw"))


def test_every_address_is_there_with_the_prefix_and_without(below: TestClient) -> None:
    for path in ("/", "/page/page.js", "/docs", "/redoc", "/openapi.json", "/bridges/tiny", "/health/live", "/metrics"):
        assert [below.get(base + path).status_code for base in ("/lw", "")] == [200, 200]
    assert below.post("/lw/generate", json=ASK).status_code == 200
    assert below.get("/lwx/bridges").status_code == below.get("/lw/lw/bridges").status_code == 404


def test_a_prefix_ends_where_a_part_of_the_path_ends(start: Start) -> None:
    assert start(Settings(root_path="/doc")).get("/docs").status_code == 200


def test_the_bare_prefix_leads_to_the_page_whose_addresses_are_relative(below: TestClient) -> None:
    answer = below.get("/lw", follow_redirects=False)
    assert urljoin("http://proxy/lw", answer.headers["location"]) == "http://proxy/lw/"


def test_no_answer_names_an_address_that_the_proxy_would_not_know(start: Start) -> None:
    """The service need not know what path a proxy takes off."""
    client = start()
    for page in ("/docs", "/redoc"):
        text = client.get(page).text
        assert "openapi.json" in text and '="/' not in text and "'/" not in text
    servers = client.get("/openapi.json").json()["servers"]
    assert urljoin("http://proxy/lw/openapi.json", servers[0]["url"]) == "http://proxy/lw/"
    assert "location" not in client.get("/docs/", follow_redirects=False).headers


def test_a_key_is_asked_for_below_the_prefix_too(start: Start) -> None:
    keys = "\n".join(key_line(name, hash_of(name.encode()), [name]) for name in ("infer", "admin"))
    client = start(Settings(root_path="/lw", api_keys=SecretStr(keys)))
    for path, other in (("/bridges", "admin"), ("/admin/bridges/tiny/pin", "infer")):
        method = "POST" if "admin" in path else "GET"
        allowed = {"admin": "infer", "infer": "admin"}[other]
        for base in ("", "/lw"):
            found = [
                client.request(method, base + path, headers={"authorization": f"Bearer {key}"}).status_code
                for key in ("none", other, allowed)
            ]
            assert found == [401, 403, 200]


def test_errors_and_metrics_know_one_name_for_each_path(below: TestClient) -> None:
    error = below.post("/lw/v1/completions", json={"model": "nobody", "prompt": "x"}).json()["error"]
    assert error == below.post("/v1/completions", json={"model": "nobody", "prompt": "x"}).json()["error"] | {
        "request_id": error["request_id"]
    }
    assert below.put("/lw/encode").headers["allow"] == "POST"
    below.get("/lw/bridges/tiny")
    assert 'route="/bridges/{name}"' in below.get("/lw/metrics").text and "/lw" not in below.get("/metrics").text


def test_the_reference_of_a_service_says_where_it_is_in_terms_of_itself_alone(below: TestClient) -> None:
    assert "/lw" not in json.dumps(below.get("/lw/openapi.json").json())
