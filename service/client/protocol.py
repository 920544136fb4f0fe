"""How a client speaks with a LatentWire service: requests out of arguments, answers out of bytes, errors out of both.

Nothing here sends or waits. Answers are read without trusting them: a field that is not known is left out, so that a
newer service can be asked; one that is missing or of another type is a ``ServiceError`` that names it.
"""

import base64
import binascii
import json
import math
import os
import random
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, is_dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin
from urllib.parse import quote

import httpx

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
    Prompt,
    ServiceError,
    Token,
)

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
LINE_END = re.compile(rb"\r?\n")
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


class EventReader:
    """Server-sent events out of bytes, however these are cut into chunks (WHATWG HTML §9.2.6).

    Not by ``httpx``'s lines: those also end at characters that a JSON text may hold, U+2028 for example.
    """

    def __init__(self) -> None:
        self._rest, self._name, self._data = b"", "message", list[str]()

    def feed(self, chunk: bytes) -> Iterator[tuple[str, str]]:
        """The (name, data) of every event that is complete with this chunk."""
        *lines, self._rest = LINE_END.split(self._rest + chunk)
        for line in lines:
            field, _, value = line.decode(errors="replace").partition(":")
            value = value.removeprefix(" ")
            if field == "event":
                self._name = value
            elif field == "data":
                self._data.append(value)
            elif not line:
                if self._data:
                    yield self._name, "\n".join(self._data)
                self._name, self._data = "message", []


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


def inference(path: str, body: dict[str, Any], options: EncodeOptions | GenerateOptions) -> Call:
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


def question(inputs: Input | Sequence[Input], prompt: Prompt) -> dict[str, Any]:
    """Inputs, and prompt or messages, as ``/generate`` takes them."""
    each = [inputs] if isinstance(inputs, str | bytes | Latent | Mapping) else inputs
    asked = prompt if isinstance(prompt, str) else list(prompt)
    name = "messages" if any(isinstance(one, Mapping) for one in asked) else "prompt"
    return {"inputs": [_input(item) for item in each], name: asked}


def _input(item: Input) -> dict[str, str]:
    if isinstance(item, str):
        return {"text": item}
    if isinstance(item, Mapping):
        return dict(item)
    message = item.data if isinstance(item, Latent) else item
    if not isinstance(message, bytes):
        raise TypeError(f"an input is a {type(item).__name__}; expected a text, a Latent, a message in bytes or a dict")
    return {"latent": base64.b64encode(message).decode()}


def events_of(reader: EventReader, chunk: bytes, response: httpx.Response) -> Iterator[Event]:
    """The events complete with a chunk; those of a newer service that are not known are passed over.

    Raises:
        ServiceError: The service ended the stream with an error, or an event is not what it should be.
    """
    with answered(response):
        for name, data in reader.feed(chunk):
            if name == "token":
                yield read_json(Token, data)
            elif name == "done":
                yield read_json(Generated, data, request_id=response.headers.get("x-request-id"))
            elif name == "error":
                error = read_json(ErrorBody, data).error
                raise ServiceError(error.message, type=error.type, param=error.param, request_id=error.request_id)


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


def read_json(kind: type[T], raw: bytes | str, **known: Any) -> T:
    """An answer as a ``kind``; ``known`` fields are added to it.

    Raises:
        ServiceError: It is not JSON, or a field of it is missing or of another type.
    """
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        raise ServiceError(f"the answer is {_said(raw)}; expected JSON") from None
    found: T = _read(kind, {**body, **known} if isinstance(body, dict) else body, "")
    return found


def read_refusal(raw: bytes, status: int, headers: Mapping[str, str]) -> ServiceError:
    """The error that an answer other than 2xx tells of, in whatever form."""
    try:
        error = read_json(ErrorBody, raw).error
    except ServiceError:
        error = ErrorDetail(HTTP_ERROR, _said(raw))
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


def _read(kind: Any, value: Any, at: str) -> Any:
    arguments = get_args(kind)
    if get_origin(kind) is UnionType:  # of one kind and None
        return None if value is None else _read(arguments[0], value, at)
    if is_dataclass(kind):
        return _read_fields(kind, _checked(dict, value, at), at)
    if get_origin(kind) is dict:
        return {name: _read(arguments[1], item, f"{at}.{name}") for name, item in _checked(dict, value, at).items()}
    if get_origin(kind) is tuple:
        return _read_items(arguments, _checked(list, value, at), at)
    if kind is bytes:
        return _read_base64(_checked(str, value, at), at)
    return value if kind is Any else _checked(kind, value, at)


def _read_fields(kind: Any, body: dict[str, Any], at: str) -> Any:
    for field in fields(kind):
        if field.name not in body and field.default is MISSING:
            raise ServiceError(
                f"{_place(at)} has no {field.name!r}; it has {shorten(', '.join(body), 80) or 'nothing'}"
            )
    given = [field for field in fields(kind) if field.name in body]
    return kind(**{field.name: _read(field.type, body[field.name], f"{at}.{field.name}") for field in given})


def _read_items(kinds: tuple[Any, ...], items: list[Any], at: str) -> tuple[Any, ...]:
    each = kinds[:1] * len(items) if kinds[-1] is Ellipsis else kinds
    if len(each) != len(items):
        raise ServiceError(f"{_place(at)} has {len(items)} items; expected {len(each)}")
    return tuple(_read(kind, item, f"{at}.{i}") for i, (kind, item) in enumerate(zip(each, items, strict=True)))


def _read_base64(text: str, at: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ServiceError(f"{_place(at)} is {_said(text)}; expected base64") from None


def _checked(kind: type[Any], value: Any, at: str) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ServiceError(f"{_place(at)} is {shorten(repr(value), 80)}; expected {kind.__name__}")
    return value


def _place(at: str) -> str:
    return at[1:] or "the answer"


def _said(raw: bytes | str) -> str:
    text = raw[:800].decode(errors="replace") if isinstance(raw, bytes) else raw
    return repr(shorten(text, 200)) if text else "empty"
