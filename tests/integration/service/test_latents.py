"""``/latents`` over the real application: encode once, keep, ask many times."""

import base64
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from pydantic import SecretStr

from latentwire.bridge import wire
from latentwire.bridge.bridge import Bridge
from latentwire.bridge.bulk import Source, encode_corpus
from latentwire.bridge.config import BridgeConfig
from latentwire.bridge.corpus import CorpusWriter
from latentwire.bridge.errors import CorruptCheckpoint, IncompatibleBridge, InvalidRequest
from latentwire.service.app import create_app
from latentwire.service.auth.keys import hash_of, key_line
from latentwire.service.client.client import Client
from latentwire.service.client.types import KeptLatent
from latentwire.service.settings import Settings
from tests.integration.service.conftest import wait_until_ready
from tests.integration.service.test_storm import listening

Refused = Callable[..., dict[str, Any]]
Start = Callable[..., TestClient]
TEXTS = ["Mara lives in Rome.", "Zoë"]
ASKED = {"prompt": "Where?", "max_tokens": 4}


@pytest.fixture(scope="module")
def client(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """One service that keeps latents on disk."""
    app = create_app(Settings(store_dir=tmp_path_factory.mktemp("kept")), {"tiny": str(checkpoint)})
    with TestClient(app, "http://127.0.0.1", raise_server_exceptions=False) as client:
        wait_until_ready(client)
        yield client


def keep(client: TestClient, *inputs: Any, **options: Any) -> list[dict[str, Any]]:
    each = [{"text": one} if isinstance(one, str) else one for one in inputs]
    response = client.post("/latents", json={"inputs": each, **options})
    assert response.status_code == 200, response.text
    kept: list[dict[str, Any]] = response.json()["latents"]
    return kept


def ask(client: TestClient, *inputs: dict[str, str]) -> list[str]:
    response = client.post("/generate", json={"inputs": inputs, **ASKED})
    assert response.status_code == 200, response.text
    return [output["text"] for output in response.json()["outputs"]]


def test_texts_are_kept_under_ids_that_are_asked_as_often_as_one_likes(client: TestClient) -> None:
    first, second = keep(client, *TEXTS)
    assert (first["source_tokens"], first["source_bytes"], first["shape"]) == (
        len(TEXTS[0]) + 1,
        len(TEXTS[0]),
        [5, 16],
    )
    assert (second["bridge"], second["dtype"], second["truncated"]) == ("tiny", "float16", False)
    assert second["bridge_id"] == client.get("/bridges/tiny").json()["bridge_id"]
    read = ask(client, *({"text": text} for text in TEXTS))
    for _ in range(2):
        assert ask(client, {"latent_id": first["id"]}, {"latent_id": second["id"]}) == read


def test_a_kept_latent_is_given_back_whole_and_as_bytes(client: TestClient) -> None:
    (kept,) = keep(client, TEXTS[0], dtype="int8")
    one = client.get(f"/latents/{kept['id']}").json()
    data = base64.b64decode(one.pop("data"))
    assert one == {**kept, "text": None} and len(data) == kept["bytes"]
    assert wire.decode(data).dtype == kept["dtype"] == "int8"
    raw = client.get(f"/latents/{kept['id']}", headers={"accept": "application/octet-stream"})
    assert (raw.content, raw.headers["content-type"]) == (data, "application/octet-stream")


def test_the_same_text_bridge_and_dtype_have_the_same_id_whatever_they_are_read_with(start: Start) -> None:
    client = start(Settings(encode_cache=False))
    (alone,) = keep(client, TEXTS[0])
    among = keep(client, "a much longer text " * 6, TEXTS[0], TEXTS[1], truncate=True)[1]
    stored = client.post("/encode", json={"inputs": TEXTS[:1], "store": True}).json()["latents"][0]
    assert alone["id"] == among["id"] == stored["id"]
    assert len({alone["id"], keep(client, TEXTS[0], dtype="float32")[0]["id"], keep(client, TEXTS[1])[0]["id"]}) == 3


def test_a_message_made_elsewhere_is_kept_beside_texts(client: TestClient) -> None:
    made = client.post("/encode", json={"inputs": TEXTS}).json()["latents"]
    of_text, of_message = keep(client, TEXTS[0], {"latent": made[1]["data"]})
    assert of_message["id"] == keep(client, {"latent": made[1]["data"]})[0]["id"] != of_text["id"]
    assert (of_message["source_tokens"], of_message["source_bytes"]) == (None, None)
    assert client.get(f"/latents/{of_message['id']}").json()["data"] == made[1]["data"]


def test_kept_latents_are_listed_page_by_page_and_gone_when_deleted(start: Start) -> None:
    client = start()
    ids = sorted(one["id"] for one in keep(client, *(f"text {i}" for i in range(5))))
    first = client.get("/latents", params={"limit": 3}).json()
    second = client.get("/latents", params={"limit": 3, "after": first["next"]}).json()
    assert [one["id"] for one in first["latents"] + second["latents"]] == ids
    assert (first["next"], second["next"]) == (ids[2], None)
    assert client.delete(f"/latents/{ids[0]}").json() == first["latents"][0]
    assert client.get(f"/latents/{ids[0]}").status_code == client.delete(f"/latents/{ids[0]}").status_code == 404
    assert [one["id"] for one in client.get("/latents").json()["latents"]] == ids[1:]


def test_what_a_caller_says_of_a_latent_is_kept_and_listed_with_it(client: TestClient) -> None:
    said = {"title": "\N{GRINNING FACE}" * 160, "year": 1996, "share": 0.5, "new": True, "by": None}  # near the most
    one, other = keep(client, {"text": TEXTS[0], "metadata": said}, {"text": TEXTS[1]})
    assert (one["metadata"], other["metadata"], one["excerpt"]) == (said, None, None)
    assert one in client.get("/latents").json()["latents"]
    assert keep(client, TEXTS[0])[0]["metadata"] is None  # kept anew, with nothing said
    assert client.delete(f"/latents/{one['id']}").status_code == 200


def test_they_are_kept_for_the_callers_time_or_the_operators_or_for_ever(start: Start) -> None:
    client = start(Settings(store_ttl=600))
    for seconds, options in ((60, {"ttl_seconds": 60}), (600, {})):
        (kept,) = keep(client, TEXTS[0], **options)
        created, expires = (datetime.fromisoformat(kept[name]) for name in ("created", "expires"))
        assert expires - created == timedelta(seconds=seconds)
    assert keep(client, TEXTS[0], ttl_seconds="forever")[0]["expires"] is None
    assert keep(start(Settings(store_ttl="forever")), TEXTS[0])[0]["expires"] is None


def test_latents_on_disk_outlive_the_service_and_are_shared_by_those_beside_it(start: Start, tmp_path: Path) -> None:
    settings = Settings(store_dir=tmp_path / "kept")
    one, other = start(settings), start(settings)
    (kept,) = keep(one, TEXTS[0], ttl_seconds="forever")
    answer = ask(one, {"latent_id": kept["id"]})
    assert ask(other, {"latent_id": kept["id"]}) == answer
    again = start(settings)
    assert again.get("/latents").json()["latents"] == [kept]
    assert ask(again, {"latent_id": kept["id"]}) == answer


def test_no_tenant_sees_asks_or_deletes_what_another_one_keeps(start: Start) -> None:
    lines = [key_line(name, hash_of(name.encode()), ["infer"]) for name in ("mine", "yours")]
    client = start(Settings(api_keys=SecretStr("\n".join(lines))), ready=False)

    def as_(name: str) -> TestClient:
        client.headers["authorization"] = f"Bearer {name}"
        return client

    wait_until_ready(as_("mine"))
    (kept,) = keep(as_("mine"), TEXTS[0])
    assert keep(as_("yours"), TEXTS[1])[0]["id"] != kept["id"]
    where = f"/latents/{kept['id']}"
    assert as_("yours").get(where).status_code == as_("yours").delete(where).status_code == 404
    body = {"inputs": [{"latent_id": kept["id"]}], **ASKED}
    assert as_("yours").post("/generate", json=body).status_code == 404
    assert [one["id"] for one in as_("mine").get("/latents").json()["latents"]] == [kept["id"]]
    assert as_("nobody").get("/latents").status_code == 401


@pytest.mark.parametrize(
    ("body", "status", "param", "said"),
    [
        ({"inputs": []}, 422, "inputs", "at least 1"),
        ({"inputs": ["a"]}, 422, "inputs.0", "valid dictionary"),
        ({"inputs": [{}]}, 422, "inputs.0", "exactly one of text and latent"),
        ({"inputs": [{"text": "a", "latent": "b"}]}, 422, "inputs.0", "exactly one of text and latent"),
        ({"inputs": [{"text": " "}]}, 422, "inputs.0.text", "' ' is empty"),
        ({"inputs": [{"text": "a"}, {"latent": "?"}]}, 422, "inputs.1.latent", "'?' is not base64"),
        ({"inputs": [{"latent": "AAAA"}]}, 422, "inputs.0.latent", "3 bytes"),
        ({"inputs": [{"text": "a"}] * 65}, 413, "inputs", "65; at most 64"),
        ({"inputs": [{"text": "a" * 100_001}]}, 413, "inputs.0.text", "100001 characters"),
        ({"inputs": [{"text": "a", "metadata": {"a": []}}]}, 422, "inputs.0.metadata.a", "valid string"),
        (
            {"inputs": [{"text": "a", "metadata": {"a": "x" * 2048}}]},
            422,
            "inputs.0.metadata",
            "2057 bytes of JSON; at",
        ),
        ({"inputs": [{"metadata": {}}]}, 422, "inputs.0", "exactly one of text and latent"),
        ({"inputs": [{"text": "a"}], "ttl_seconds": 0}, 422, "ttl_seconds", "greater than 0"),
        ({"inputs": [{"text": "a"}], "ttl_seconds": "never"}, 422, "ttl_seconds", "'never'"),
        ({"inputs": [{"text": "a"}], "bridge": "other"}, 404, "bridge", "'other'; there are tiny"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_bad_input_is_refused_and_named_and_nothing_is_kept(
    client: TestClient, refused: Refused, body: dict[str, Any], status: int, param: str, said: str
) -> None:
    before = client.get("/latents").json()
    error = refused("/latents", status, json=body)
    assert error["param"] == param
    assert said in error["message"]
    assert client.get("/latents").json() == before


@pytest.mark.parametrize("name", ["lat_" + "0" * 32, "x", "a/b", "%00"])
def test_what_is_not_kept_is_not_found(client: TestClient, name: str) -> None:
    for response in (client.get(f"/latents/{name}"), client.delete(f"/latents/{name}")):
        assert response.status_code == 404
        assert "no latent is stored under" in response.json()["error"]["message"]


def test_a_latent_of_another_bridge_is_not_kept(client: TestClient, refused: Refused) -> None:
    message = base64.b64encode(wire.encode(np.ones((2, 16), np.float32), "0" * 32)).decode()
    assert "of bridge 000" in refused("/latents", 409, json={"inputs": [{"latent": message}]})["message"]


def test_a_bridge_says_for_how_many_sources_in_one_prompt_each_receiver_was_trained(start: Start) -> None:
    def trained_for_four(app: FastAPI) -> BridgeConfig:
        config: BridgeConfig = app.state.runtime.bridges["tiny"].manifest.bridge
        config.provenance.recipe["sources_per_example"] = 4
        return config

    def then_with_a_new_head(app: FastAPI) -> None:
        config = trained_for_four(app)
        for name, head in config.heads.items():
            trained = replace(config.provenance, recipe={"sources_per_example": 2})
            config.heads[name] = replace(head, provenance=trained)

    for before, most in ((lambda app: None, 1), (trained_for_four, 4), (then_with_a_new_head, 2)):
        (said,) = start(before=before).get("/bridges/tiny").json()["sources_per_example"].values()
        assert said == most  # a recipe from before there were several says nothing: one


def test_a_bridge_says_the_steps_of_every_run_that_made_it(start: Start) -> None:
    def with_two_earlier_runs_and_a_new_head(app: FastAPI) -> None:
        manifest = app.state.runtime.bridges["tiny"].manifest
        runs = [replace(manifest.bridge.provenance, steps=steps) for steps in (20, 300, 4000)]
        heads = {
            name: replace(head, provenance=replace(runs[0], steps=50000))
            for name, head in manifest.bridge.heads.items()
        }
        made = replace(manifest.bridge, earlier=tuple(runs[:2]), provenance=runs[2], heads=heads)
        app.state.runtime.bridges["tiny"].manifest = replace(manifest, bridge=made)

    assert start(before=with_two_earlier_runs_and_a_new_head).get("/bridges/tiny").json()["steps"] == 54320


def test_the_client_keeps_lists_asks_and_deletes(checkpoint: Path) -> None:
    with listening(create_app(Settings(), {"tiny": str(checkpoint)})) as port:
        with Client(f"http://127.0.0.1:{port}") as client:
            assert client.keep({"text": "Ben", "metadata": {"by": "Zoë"}})[0].metadata == {"by": "Zoë"}
            client.delete_latent(next(client.latents()).id)
            kept = client.keep([*TEXTS, client.encode("Ben").latents[0]], ttl_seconds="forever", dtype="float32")
            assert all(isinstance(one, KeptLatent) for one in kept)
            assert {one.id for one in client.latents()} == {one.id for one in kept}
            assert [one.id for one in client.latents(containing=kept[0].id[8:20])] == [kept[0].id]
            assert (
                client.generate(kept, "Where?", max_tokens=4).texts
                == client.generate([*TEXTS, "Ben"], "Where?", max_tokens=4).texts
            )
            whole = client.latent(kept[0].id)
            assert whole.data is not None and wire.decode(whole.data).latent.shape == kept[0].shape
            assert client.delete_latent(kept[0].id) == kept[0]
            assert kept[0].id not in {one.id for one in client.latents()}


@pytest.fixture(scope="module")
def folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two corpora, and the beginning of one. Do not edit."""
    folder, bridge = tmp_path_factory.mktemp("corpora"), Bridge.load(checkpoint)
    sources = [Source(f"a/{i}", f"Mara has {i} cats.", {"title": f"Cats {i}"}) for i in range(4)]
    encode_corpus(bridge, sources, folder / "cats.lw", keep_text=True)
    encode_corpus(bridge, {"1": "Ben lives in Rome."}, folder / "towns.lw", dtype="int8")
    (folder / "later.lw.part").write_bytes(b"")
    return folder


@pytest.mark.parametrize("signed", [False, True])
def test_documents_of_a_folder_of_corpora_are_listed_given_and_asked(start: Start, folder: Path, signed: bool) -> None:
    key = SecretStr("a key of sixteen bytes or more") if signed else None
    client = start(Settings(corpus_dir=folder, signing_key=key))
    kept = sorted(one["id"] for one in keep(client, *TEXTS))
    expected = [*(f"cats/a/{i}" for i in range(4)), "towns/1", *kept]
    for limit in (1, 3, 5, 6, 100):
        seen, after = [], ""
        while after is not None:
            page = client.get("/latents", params={"limit": limit, "after": after}).json()
            assert len(page["latents"]) <= limit
            seen, after = [*seen, *page["latents"]], page["next"]
        assert [one["id"] for one in seen] == expected
    listed = seen[2]
    one = client.get("/latents/cats/a/2").json()
    data, text = base64.b64decode(one.pop("data")), one.pop("text")
    assert one == listed and (len(data), text) == (listed["bytes"], "Mara has 2 cats.")
    assert (one["metadata"], one["bridge"], one["created"]) == ({"title": "Cats 2"}, "tiny", None)
    assert (one["excerpt"], seen[4]["excerpt"]) == (text, None)
    assert ask(client, {"latent_id": "cats/a/2"}, {"latent": base64.b64encode(data).decode()}) == 2 * ask(
        client, {"text": text}
    )
    assert ask(client, {"latent_id": "towns/1"})
    assert "text" not in seen[2] and client.get("/latents/towns/1").json()["text"] is None


def test_a_list_of_what_contains_words_goes_through_all_there_is_by_parts(
    start: Start, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = start(Settings(corpus_dir=folder))
    mine = keep(client, {"text": "Zoë", "metadata": {"title": "No CATS"}}, "Ben")[0]["id"]

    def listed(words: str, **options: int) -> tuple[list[str], list[int]]:
        ids, counts, after = [], [], ""
        while after is not None:
            page = client.get("/latents", params={"containing": words, "after": after, **options}).json()
            ids, after = [*ids, *(one["id"] for one in page["latents"])], page["next"]
            counts.append(len(page["latents"]))
        return ids, counts

    cats = [f"cats/a/{i}" for i in range(4)]
    assert listed("2 cats.") == (["cats/a/2"], [1])  # in the text that the corpus keeps
    assert listed("towns/") == (["towns/1"], [1]) and listed("rome") == ([], [0])  # whose text it does not keep
    assert listed("cats") == ([*cats, mine], [5])
    assert listed("cats", limit=2) == ([*cats, mine], [2, 2, 1])
    monkeypatch.setattr("latentwire.service.api.routes.latents.MOST_LISTED", 3)
    assert listed("cats", limit=2)[0] == [*cats, mine]
    ids, counts = listed("NO cats")
    assert ids == [mine] and counts[0] == 0 and len(counts) > 1


def test_a_list_says_that_the_store_does_not_list_and_corpora_are_listed(start: Start, folder: Path) -> None:
    redis = "redis://127.0.0.1:1"
    client = start(Settings(corpus_dir=folder, redis_url=redis))
    page = client.get("/latents").json()
    assert [one["id"] for one in page["latents"]] == [*(f"cats/a/{i}" for i in range(4)), "towns/1"]
    assert "gives latents by id and does not list them" in page["unlisted"]
    assert client.get("/latents", params={"limit": 2}).json()["unlisted"] is None  # not known yet
    assert "does not list" in start(Settings(redis_url=redis)).get("/latents").json()["error"]["message"]


def test_a_corpus_is_read_only_and_what_it_does_not_hold_is_not_found(start: Start, folder: Path) -> None:
    client = start(Settings(corpus_dir=folder))
    response = client.delete("/latents/cats/a/1")
    assert response.status_code == 403 and "is of a corpus, which is read-only" in response.text
    for name in ("cats/9", "cats/", "dogs/a/1", "later/1"):
        assert client.get(f"/latents/{name}").status_code == 404
    response = client.get("/latents", params={"after": "cats/9"})
    assert response.status_code == 422 and response.json()["error"]["param"] == "after"


def test_corpora_that_could_not_be_asked_stop_the_start(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    def started(corpora: Path) -> None:
        create_app(Settings(corpus_dir=corpora), {"tiny": str(checkpoint)})

    with pytest.raises(InvalidRequest, match=r"LW_CORPUS_DIR .*nothing: No such file"):
        started(tmp_path / "nothing")
    (tmp_path / "half.lw").write_bytes((folder / "cats.lw").read_bytes()[:5000])
    with pytest.raises(CorruptCheckpoint, match=r"half\.lw: it is no whole corpus"):
        started(tmp_path)
    with CorpusWriter(tmp_path / "half.lw", {"bridge_id": "0" * 32, "dtype": "int8"}) as writer:
        writer.finish()
    with pytest.raises(IncompatibleBridge, match=f"half.lw: it is of bridge {'0' * 32}; served are"):
        started(tmp_path)
