"""How a client speaks with a LatentWire service: requests out of arguments, answers out of bytes, errors out of both.

Nothing here sends. Answers are read without trusting them: a field that is not known is left out, so that a newer
service can be asked; one that is missing or of another type is a ``ServiceError`` that names it.
"""

import base64
import math
import os
import random
import re
import uuid
from collections.abc import AsyncGenerator, AsyncIterable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, urlencode

import httpx
from httpx_sse import EventSource, ServerSentEvent

from latentwire.bridge.errors import shorten
from latentwire.bridge.results import Generated, Latent
from latentwire.service.client.types import (
    CONNECTION_FAILED,
    DEADLINE_EXCEEDED,
    HTTP_ERROR,
    INVALID_ANSWER,
    INVALID_REQUEST,
    CallOptions,
    EncodeOptions,
    Event,
    GenerateOptions,
    Input,
    Inputs,
    KeepOptions,
    KeptLatent,
    Prompt,
    ReadOptions,
    ScoreOptions,
    ServiceError,
    Token,
)

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

DEFAULT_URL = "http://127.0.0.1:8000"
URL_VARIABLE, KEY_VARIABLE = "LATENTWIRE_URL", "LATENTWIRE_API_KEY"
BUSY = (429, 503)
FIRST_PAUSE_SECONDS = 0.1
MAX_PAUSE_SECONDS = 30.0
GRACE_SECONDS = 1.0  # by which the service's own "too late" may come after the deadline it was given
# The first that fits. A timeout is not tried again: it means that the time for the whole call is over.
KINDS: tuple[tuple[type[httpx.RequestError], str], ...] = (
    (httpx.TimeoutException, DEADLINE_EXCEEDED),
    (httpx.NetworkError, CONNECTION_FAILED),
    (httpx.RemoteProtocolError, CONNECTION_FAILED),
    (httpx.ProxyError, CONNECTION_FAILED),
    (httpx.DecodingError, INVALID_ANSWER),
    (httpx.RequestError, INVALID_REQUEST),
)
MAX_FAULTS = 1000  # of which pydantic writes out every one, to say what the first is
T = TypeVar("T")


@dataclass(frozen=True)
class Call:
    """One request, before it is sent; all can be sent twice with no more effect than once."""

    method: str
    path: str
    body: dict[str, Any] | None = None
    request_id: str | None = None
    timeout_seconds: float | None = None
    idempotency_key: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        given = {"X-Request-Id": self.request_id, "Idempotency-Key": self.idempotency_key}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class ErrorDetail:
    """What went wrong, in the service's words."""

    type: str
    message: str
    param: str | None = None
    request_id: str | None = None


@dataclass(frozen=True)
class ErrorBody:
    """The service's one error body."""

    error: ErrorDetail


def connection(url: str | None, api_key: str | None, timeout_seconds: float, trust_env: bool) -> dict[str, Any]:
    """What both clients hand to httpx (ValueError when URL, key or timeout cannot be one)."""
    if not timeout_seconds > 0:
        raise ValueError(f"timeout_seconds is {timeout_seconds}; expected more than 0")
    where = url or os.environ.get(URL_VARIABLE) or DEFAULT_URL
    key = (api_key or os.environ.get(KEY_VARIABLE) or "").strip()  # a key read from a file ends in a newline
    if not (key.isascii() and key.isprintable()):
        raise ValueError("the API key holds characters that a header cannot carry; expected printable ASCII")
    try:
        parsed = httpx.URL(where)
    except httpx.InvalidURL as error:
        raise ValueError(f"the URL {where!r} cannot be read: {error}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"the URL is {where!r}; expected one like {DEFAULT_URL}")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return {"base_url": parsed, "headers": headers, "timeout": timeout_seconds, "trust_env": trust_env}


def without_none(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def inference(
    path: str, body: dict[str, Any], options: EncodeOptions | GenerateOptions | KeepOptions | ReadOptions | ScoreOptions
) -> Call:
    """A request for work; its deadline goes along, and leaves the service's own refusal time to arrive."""
    given = without_none(options)
    request_id, seconds = given.pop("request_id", None), given.get("timeout_seconds")
    return Call("POST", path, body | given, request_id, None if seconds is None else seconds + GRACE_SECONDS)


def submission(
    bridge: str, task: str, details: Mapping[str, Any], idempotency_key: str | None, options: CallOptions
) -> Call:
    """A request for an evaluation, under a key of its own: sent twice, it is still one."""
    body = {"bridge": bridge, "task": task, **without_none(details)}
    return Call("POST", "/evaluations", body, idempotency_key=idempotency_key or uuid.uuid4().hex, **options)


def evaluation_of(method: str, id: str, options: CallOptions) -> Call:
    """A request about one evaluation."""
    return Call(method, f"/evaluations/{quote(id, '')}", **options)


def admin(bridge: str, action: str, options: CallOptions) -> Call:
    """A request to do something with a bridge's models."""
    return Call("POST", f"/admin/bridges/{quote(bridge, '')}/{action}", **options)


def page_of_latents(after: str, containing: str, options: CallOptions) -> Call:
    """A request for the latents whose ids follow one, and that have these words."""
    return Call("GET", f"/latents?{urlencode({'after': after, 'containing': containing})}", **options)


def latent_of(method: str, id: str, options: CallOptions) -> Call:
    """A request about one kept latent."""
    return Call(method, f"/latents/{quote(id)}", **options)


def question(inputs: Inputs, prompt: Prompt) -> dict[str, Any]:
    """Inputs, and prompt or messages, as ``/generate`` takes them."""
    asked = prompt if isinstance(prompt, str) else list(prompt)
    name = "messages" if any(isinstance(one, Mapping) for one in asked) else "prompt"
    return {**inputs_of(inputs), name: asked}


def inputs_of(inputs: Inputs) -> dict[str, Any]:
    """Inputs as the service takes them."""
    each = [inputs] if isinstance(inputs, str | bytes | Latent | KeptLatent | Mapping) else inputs
    return {"inputs": [_input(item) for item in each]}


def _input(item: Input | Sequence[Input]) -> dict[str, Any]:
    if isinstance(item, list | tuple):
        return {"sources": [_input(one) for one in item]}
    if isinstance(item, str):
        return {"text": item}
    if isinstance(item, Mapping):
        return dict(item)
    if isinstance(item, KeptLatent):
        return {"latent_id": item.id}
    message = item.data if isinstance(item, Latent) else item
    if not isinstance(message, bytes):
        raise TypeError(f"an input is a {type(item).__name__}; expected a text, a Latent, a message in bytes or a dict")
    return {"latent": base64.b64encode(message).decode()}


async def read_events(chunks: AsyncIterable[bytes]) -> AsyncGenerator[ServerSentEvent, None]:
    """Server-sent events out of bytes, however these are cut into chunks.

    httpx-sse reads them from a response. One is made around the chunks, so that both clients read the same way, and
    the text is UTF-8 whatever the header says. Its lines end at CR and LF alone, not, as ``httpx.Response.iter_lines``
    has it, at characters that a JSON text may hold, U+2028 for example. The standard knows no event without data.
    """
    response = httpx.Response(200, headers={"content-type": "text/event-stream"}, content=chunks)
    async with aclosing(EventSource(response).aiter_sse()) as events:
        async for event in events:
            if event.data:
                yield event


def event_of(event: ServerSentEvent, response: httpx.Response) -> Event | None:
    """What an event of a stream holds; None when a newer service sent what is not known.

    Raises:
        ServiceError: The service ended the stream with an error, or the event is not what it should be.
    """
    with answered(response):
        if event.event == "token":
            return read_json(Token, event.data)
        if event.event == "done":
            return read_json(Generated, event.data, response.headers.get("x-request-id"))
        if event.event == "error":
            error = read_json(ErrorBody, event.data).error
            raise ServiceError(error.message, type=error.type, param=error.param, request_id=error.request_id)
    return None


def pause_seconds(error: ServiceError, attempt: int) -> float | None:
    """How long to wait before trying again; None when that is no use.

    Some longer than asked, lest all who were refused together return together. Who is asked to stay away for long is
    told so at once: a try before that would be refused again.
    """
    asked = error.retry_after_seconds or 0.0
    if (error.status not in BUSY and error.type != CONNECTION_FAILED) or asked > MAX_PAUSE_SECONDS:
        return None
    own: float = min(FIRST_PAUSE_SECONDS * 2 ** min(attempt, 16), MAX_PAUSE_SECONDS)
    return max(asked, own) * random.uniform(1.0, 1.5)


@contextmanager
def translated(request: httpx.Request) -> Iterator[None]:
    """Errors of httpx become those of this client."""
    try:
        yield
    except httpx.RequestError as error:
        kind = next(name for known, name in KINDS if isinstance(error, known))
        raise ServiceError(f"{name_of(request)}: {error or type(error).__name__}", type=kind) from error


@contextmanager
def answered(response: httpx.Response) -> Iterator[None]:
    """Answers that are not what they should be say which they are."""
    try:
        yield
    except ServiceError as error:
        if error.type != INVALID_ANSWER:
            raise
        raise unlike(response, error.args[0]) from None


def unlike(response: httpx.Response, why: str) -> ServiceError:
    """The error for an answer that no such service gives."""
    return ServiceError(
        f"{name_of(response.request)}: {why}",
        status=response.status_code,
        request_id=response.headers.get("x-request-id"),
    )


def late(request: httpx.Request, seconds: float) -> ServiceError:
    """The error for an answer that began in time and did not end."""
    return ServiceError(f"{name_of(request)}: no end within {seconds:.3g} s", type=DEADLINE_EXCEEDED)


def name_of(request: httpx.Request) -> str:
    """A request in an error's message, without what only the service should read."""
    return f"{request.method} {request.url.copy_with(userinfo=b'')}"


def read_json(kind: type[T], raw: bytes | str, request_id: str | None = None) -> T:
    """An answer as a ``kind``, with its request id where a ``kind`` has one.

    Raises:
        ServiceError: It is not JSON, or a field of it is missing or of another type.
    """
    from pydantic import ValidationError  # with the first answer: importing it takes longer than all the rest

    try:
        found: Any = _reader(kind).validate_json(raw, strict=True)  # type: ignore[arg-type]
    except ValidationError as error:
        raise ServiceError(_first_fault(error, raw)) from None
    answer: T = replace(found, request_id=request_id) if hasattr(found, "request_id") else found
    return answer


def read_refusal(raw: bytes, status: int, headers: Mapping[str, str]) -> ServiceError:
    """The error that an answer other than 2xx tells of, in whatever form."""
    try:
        error = read_json(ErrorBody, raw).error
    except ServiceError:
        error = ErrorDetail(HTTP_ERROR, _shown(raw))
    return ServiceError(
        error.message,
        type=error.type,
        status=status,
        param=error.param,
        request_id=error.request_id or headers.get("x-request-id"),
        retry_after_seconds=retry_after_seconds(headers.get("retry-after")),
    )


def retry_after_seconds(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, as a number or as a date; None when it is neither."""
    try:
        seconds = float(value or "")
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value or "") - datetime.now(UTC)).total_seconds()
        except (TypeError, ValueError):
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None


@cache
def _reader(kind: type[Any]) -> "TypeAdapter[Any]":
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _first_fault(error: "ValidationError", raw: bytes | str) -> str:
    if error.error_count() > MAX_FAULTS:
        return f"the answer is {_shown(raw)}; it has {error.error_count()} faults"
    first = error.errors(include_url=False)[0]
    at, value = first["loc"], first["input"]
    if first["type"] == "json_invalid":
        return f"the answer is {_shown(raw)}; expected JSON"
    if first["type"] == "missing":
        return f"{_place(at[:-1])} has no {at[-1]!r}; it has {shorten(', '.join(map(str, value)), 80) or 'nothing'}"
    return f"{_place(at)} is {shorten(repr(value), 80)}; {re.sub('^(Input|Data) should be', 'expected', first['msg'])}"


def _place(at: tuple[int | str, ...]) -> str:
    return ".".join(map(str, at)) or "the answer"


def _shown(raw: bytes | str) -> str:
    text = raw[:800].decode(errors="replace") if isinstance(raw, bytes) else raw
    return repr(shorten(text, 200)) if text else "empty"
