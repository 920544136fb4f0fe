"""What the client makes of arguments and of bytes, before and after anything is sent."""

import asyncio
import base64
import inspect
import json
import pickle
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentwire.bridge import wire
from latentwire.bridge.errors import InvalidMessage
from latentwire.bridge.results import Encoded, Generated, Latent
from latentwire.service.client import protocol
from latentwire.service.client.client import AsyncClient, Client
from latentwire.service.client.types import BridgeInfo, Evaluation, ServiceError, Token

NUMBERS = np.random.default_rng(0).standard_normal((3, 4), dtype=np.float32)
MESSAGE = wire.encode(NUMBERS, "0" * 32, "float32")
LATENT = Latent(MESSAGE, (3, 4), 7, "float32")
GENERATED: dict[str, Any] = {
    "id": "gen_1",
    "bridge": "b",
    "outputs": [
        {
            "index": 0,
            "text": "Tea",
            "finish_reason": "stop",
            "token_count": 2,
            "logprobs": [{"token": "Te", "logprob": -1, "top": [["Te", -1], ["Co", -2.5]]}],
            "answered_from": "latent",
            "trust": 0.75,
        }
    ],
    "usage": {"source_tokens": 3, "soft_tokens": 1, "generated_tokens": 2},
    "timing": {"encode_ms": 1, "generate_ms": 2.5, "total_ms": 3.5},
}


def changed(path: str, value: Any) -> str:
    """The answer above with one thing changed, or taken away (...)."""
    body = json.loads(json.dumps(GENERATED))
    *way, last = (int(part) if part.isdigit() else part for part in path.split("."))
    at: Any = body
    for part in way:
        at = at[part]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return json.dumps(body)


def events(*chunks: bytes) -> list[tuple[str, str]]:
    async def arriving() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk

    async def read() -> list[tuple[str, str]]:
        return [(event.event, event.data) async for event in protocol.read_events(arriving())]

    return asyncio.run(read())


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(protocol.URL_VARIABLE, raising=False)
    monkeypatch.delenv(protocol.KEY_VARIABLE, raising=False)


def test_a_client_needs_neither_a_model_library_nor_a_server_library() -> None:
    heavy = {"torch", "transformers", "fastapi", "starlette", "pydantic", "redis"}
    code = f"import sys, latentwire.service.client.client; print(sorted({heavy} & set(sys.modules)))"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_both_clients_have_the_same_calls() -> None:
    calls = {name for name in dir(Client) if not name.startswith("_")} - {"close"}
    assert calls == {name for name in dir(AsyncClient) if not name.startswith("_")} - {"aclose"}
    assert {"encode", "generate", "stream", "evaluate", "bridges", "ready", "live"} < calls
    for name in calls:
        assert inspect.signature(getattr(Client, name)) == inspect.signature(getattr(AsyncClient, name))
        assert getattr(Client, name).__doc__


def test_a_latent_is_an_array_of_the_numbers_sent() -> None:
    assert LATENT.array.dtype == np.float32
    np.testing.assert_array_equal(LATENT.array, NUMBERS)
    with pytest.raises(InvalidMessage, match="checksum"):
        _ = replace(LATENT, data=MESSAGE[:-1] + bytes([MESSAGE[-1] ^ 1])).array


def test_an_answer_is_read_with_all_that_is_in_it() -> None:
    answer = protocol.read_json(Generated, json.dumps(GENERATED), request_id="r")
    assert answer.texts == ["Tea"]
    assert answer.request_id == "r"
    plain = json.loads(json.dumps(asdict(answer)))
    assert plain == GENERATED | {"diversity": None, "request_id": "r"}


@pytest.mark.parametrize("at", ["new", "usage.new", "outputs.0.new", "outputs.0.logprobs.0.new"])
def test_what_a_newer_service_adds_is_left_out(at: str) -> None:
    assert protocol.read_json(Generated, changed(at, {"a": [1]})) == protocol.read_json(
        Generated, changed("id", "gen_1")
    )


@pytest.mark.parametrize(
    "at, value, said",
    [
        ("id", ..., "the answer has no 'id'; it has bridge, outputs"),
        ("outputs.0.text", ..., "outputs.0 has no 'text'"),
        ("outputs.0.text", 5, "outputs.0.text is 5; expected a valid string"),
        ("outputs.0.token_count", True, "outputs.0.token_count is True; expected a valid integer"),
        ("outputs.0.token_count", None, "outputs.0.token_count is None; expected a valid integer"),
        ("outputs", {"a": 1}, "outputs is {'a': 1}; expected a valid array"),
        ("outputs.0", "x", "outputs.0 is 'x'; expected an object"),
        ("timing.total_ms", "soon", "timing.total_ms is 'soon'; expected a valid number"),
        ("outputs.0.logprobs.0.top.1", ["Co"], "outputs.0.logprobs.0.top.1 has no 1; it has Co"),
    ],
)
def test_what_is_missing_or_of_another_type_is_named(at: str, value: Any, said: str) -> None:
    with pytest.raises(ServiceError) as caught:
        protocol.read_json(Generated, changed(at, value))
    assert caught.value.type == "InvalidAnswer"
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "raw", [b"", b"<html>", b"[]", b"null", b"3", b"\xff\xfe{}", b'{"id": ', b"[" * 100_000, b"{}" * 2, b'"x"']
)
def test_what_is_no_answer_is_a_service_error_of_moderate_length(raw: bytes) -> None:
    with pytest.raises(ServiceError) as caught:
        protocol.read_json(Generated, raw)
    assert len(str(caught.value)) < 500


def test_an_answer_that_is_wrong_throughout_is_not_written_out() -> None:
    with pytest.raises(ServiceError, match="it has 100000 faults") as caught:
        protocol.read_json(Generated, changed("outputs", [1] * 100_000))
    assert len(str(caught.value)) < 500


def test_a_message_that_is_not_base64_is_named() -> None:
    latent = {"data": "§", "shape": [3, 4], "source_tokens": 7, "dtype": "float32"}
    body = {"bridge": "b", "latents": [latent], "usage": {}, "timing": {}}
    with pytest.raises(ServiceError, match=r"latents\.0\.data is '§'; expected valid base64"):
        protocol.read_json(Encoded, json.dumps(body))


@pytest.mark.parametrize("state, finished", [("queued", False), ("running", False), ("done", True), ("paused", True)])
def test_an_evaluation_is_finished_in_every_state_but_two(state: str, finished: bool) -> None:
    assert Evaluation("eval_1", "b", "world", state).finished is finished


def test_engines_of_models_that_are_not_loaded_are_none() -> None:
    body = {
        "name": "b",
        "bridge_id": "0",
        "sender": "s",
        "receivers": ["r", "q"],
        "engines": {"r": "padded", "q": None},
    }
    assert protocol.read_json(BridgeInfo, json.dumps(body)).engines == {"r": "padded", "q": None}


def test_a_refusal_in_the_service_s_words_keeps_all_of_them() -> None:
    body = {"error": {"type": "Overloaded", "message": "full", "param": "inputs", "request_id": "r1", "new": 1}}
    error = protocol.read_refusal(json.dumps(body).encode(), 429, httpx.Headers({"Retry-After": "2"}))
    assert (error.status, error.type, error.param, error.request_id) == (429, "Overloaded", "inputs", "r1")
    assert error.retry_after_seconds == 2
    assert str(error) == "429 Overloaded: full"


@pytest.mark.parametrize("raw", [b"<h1>Bad Gateway</h1>", b'{"error": "Bad Gateway"}', b'{"detail": "Bad Gateway"}'])
def test_a_refusal_in_other_words_is_shown_with_its_status(raw: bytes) -> None:
    error = protocol.read_refusal(raw, 502, httpx.Headers({"x-request-id": "r2"}))
    assert (error.status, error.type, error.request_id) == (502, "HTTPError", "r2")
    assert "Bad Gateway" in str(error)


def test_an_error_survives_being_sent_to_another_process() -> None:
    error = ServiceError("full", status=429, type="Overloaded", param="n", request_id="r", retry_after_seconds=2.0)
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), vars(copy)) == (str(error), vars(error))


@pytest.mark.parametrize(
    "value, seconds", [("3", 3), ("0.5", 0.5), ("-1", 0), (None, None), ("soon", None), ("nan", None), ("inf", None)]
)  # fmt: skip
def test_retry_after_is_seconds_or_nothing(value: str | None, seconds: float | None) -> None:
    assert protocol.retry_after_seconds(value) == seconds


def test_retry_after_may_be_a_date() -> None:
    later = protocol.retry_after_seconds(format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True))
    assert later is not None and 50 < later <= 100
    assert protocol.retry_after_seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert protocol.retry_after_seconds("Wed, 21 Oct 2015 07:28:00 -0000") is None  # says that it knows no time zone


def test_pauses_grow_are_never_shorter_than_asked_and_differ_between_callers() -> None:
    def pause(attempt: int, asked: float | None = None) -> float:
        seconds = protocol.pause_seconds(ServiceError("", status=503, retry_after_seconds=asked), attempt)
        assert seconds is not None
        return seconds

    assert len({pause(0) for _ in range(20)}) > 1
    assert 0.1 <= pause(0) < 0.2 <= pause(1) < pause(4) and pause(10**6) <= 45
    assert all(2 <= pause(0, 2.0) <= 3 for _ in range(50))
    assert pause(0, 0.0) >= 0.1


@pytest.mark.parametrize(
    "error",
    [
        ServiceError("", status=422, type="InvalidRequest", retry_after_seconds=1.0),
        ServiceError("", status=500, type="InferenceFailed"),
        ServiceError("", status=504, type="DeadlineExceeded"),
        ServiceError("", type="DeadlineExceeded"),
        ServiceError("", status=200),
        ServiceError("", status=429, retry_after_seconds=31.0),
    ],
    ids=str,
)
def test_what_would_fail_again_is_not_tried_again(error: ServiceError) -> None:
    assert protocol.pause_seconds(error, 0) is None


@pytest.mark.parametrize(
    "given, sent",
    [
        ("a text", [{"text": "a text"}]),
        (LATENT, [{"latent": base64.b64encode(MESSAGE).decode()}]),
        (b"ab", [{"latent": "YWI="}]),
        ({"latent_id": "lat_1"}, [{"latent_id": "lat_1"}]),
        (["a", b"ab", {"text": "c"}], [{"text": "a"}, {"latent": "YWI="}, {"text": "c"}]),
    ],
    ids=["text", "latent", "message", "dict", "several"],
)
def test_an_input_is_a_text_a_latent_a_message_or_a_dict(given: Any, sent: list[dict[str, str]]) -> None:
    assert protocol.question(given, "Why?") == {"inputs": sent, "prompt": "Why?"}


def test_an_input_of_another_kind_is_refused_before_anything_is_sent() -> None:
    with pytest.raises(TypeError, match="an input is a ndarray; expected a text, a Latent"):
        protocol.question([NUMBERS], "Why?")  # type: ignore[list-item]


def test_what_is_not_given_is_left_to_the_service() -> None:
    call = protocol.inference(
        "/generate", {"prompt": "p"}, {"n": 2, "seed": None, "request_id": "r", "temperature": 0.0}
    )
    assert call.body == {"prompt": "p", "n": 2, "temperature": 0.0}
    assert (call.request_id, call.timeout_seconds) == ("r", None)


def test_a_deadline_goes_along_and_its_refusal_is_waited_for() -> None:
    call = protocol.inference("/encode", {}, {"timeout_seconds": 2.0})
    assert call.body == {"timeout_seconds": 2.0}
    assert call.timeout_seconds is not None and call.timeout_seconds > 2


def test_every_submission_has_a_key_of_its_own_unless_one_is_given() -> None:
    first, second, named = (protocol.submission("b", "world", {}, key, {}) for key in (None, None, "k"))
    assert first.idempotency_key and first.idempotency_key != second.idempotency_key
    assert named.headers == {"Idempotency-Key": "k"}


def test_names_cannot_leave_their_place_in_the_path() -> None:
    assert protocol.admin("a/../b?c", "load", {}).path == "/admin/bridges/a%2F..%2Fb%3Fc/load"
    assert protocol.evaluation_of("GET", "../bridges", {}).path == "/evaluations/..%2Fbridges"


def test_address_and_key_come_from_the_arguments_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(url: str | None = None, key: str | None = None) -> tuple[str, dict[str, str]]:
        options = protocol.connection(url, key, 1.0, True)
        return str(options["base_url"]), options["headers"]

    assert made() == (protocol.DEFAULT_URL, {})
    monkeypatch.setenv(protocol.URL_VARIABLE, "http://there:1")
    monkeypatch.setenv(protocol.KEY_VARIABLE, "lw_env\n")
    assert made() == ("http://there:1", {"Authorization": "Bearer lw_env"})
    assert made("http://here:2", "lw_arg") == ("http://here:2", {"Authorization": "Bearer lw_arg"})


@pytest.mark.parametrize("url", ["here:8000", "ftp://here", "http://", "http://here:port", "nonsense"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=url):
        Client(url)


@pytest.mark.parametrize("key", ["lw_ké", "lw_\x00x", "lw_a\nb"])
def test_a_key_that_cannot_be_sent_is_refused_without_being_shown(key: str) -> None:
    with pytest.raises(ValueError, match="API key") as caught:
        Client(api_key=key)
    assert "lw_" not in str(caught.value)


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_a_timeout_that_is_none_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match=f"timeout_seconds is {seconds}"):
        Client(timeout_seconds=seconds)


STREAM = (
    b": keep-alive\n\nevent: token\ndata: {\"index\": 0,\ndata:  \"text\": \"a\xe2\x80\xa8b\"}\n\n"
    b"event: empty\n\ndata:x\n\nretry: 5\r\nid: 1\r\nevent: done\r\ndata: {}\r\n\r\nevent: half\ndata: 1\n"
)  # fmt: skip
WHOLE = [("token", '{"index": 0,\n "text": "a\u2028b"}'), ("message", "x"), ("done", "{}")]


def test_events_are_read_as_the_standard_says_and_half_of_one_is_none() -> None:
    assert events(STREAM) == WHOLE
    assert protocol.read_json(Token, WHOLE[0][1]) == Token(0, "a\u2028b")


@given(st.lists(st.integers(0, len(STREAM)), max_size=12).map(sorted))
def test_events_are_the_same_however_the_bytes_arrive(cuts: list[int]) -> None:
    def pieces() -> Iterator[bytes]:
        for start, end in zip([0, *cuts], [*cuts, len(STREAM)], strict=True):
            yield STREAM[start:end]

    assert events(*pieces()) == WHOLE


LINE_ENDS_ELSEWHERE = "\x85\u2028\u2029"  # where str.splitlines and httpx end a line too, and JSON need not escape them


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_line_ends_nowhere_but_at_its_end(end: str) -> None:
    data = json.dumps({"index": 0, "text": LINE_ENDS_ELSEWHERE}, ensure_ascii=False)
    raw = f": keep-alive{end}{end}event: token{end}data: {data}{end}{end}data: 2{end}{end}".encode()
    assert events(raw) == events(*(raw[i : i + 1] for i in range(len(raw)))) == [("token", data), ("message", "2")]


def test_a_line_may_be_long() -> None:
    data = "x" * 3_000_000
    raw = f"data: {data}\n\n".encode()
    assert events(*(raw[i : i + 1000] for i in range(0, len(raw), 1000))) == [("message", data)]
