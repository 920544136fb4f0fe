"""Every decision about status codes, headers and the one error body."""

import asyncio
import logging
import math
from collections.abc import Mapping
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import compile_path
from starlette.types import Scope

from latentwire.bridge import errors
from latentwire.service.api.openai.responses import error_type

log = logging.getLogger(__name__)


STATUS: dict[type[errors.LatentWireError], int] = {
    errors.InvalidRequest: 422,
    errors.InvalidMessage: 422,
    errors.TooLarge: 413,
    errors.Unauthenticated: 401,
    errors.Forbidden: 403,
    errors.UnknownBridge: 404,
    errors.IncompatibleBridge: 409,
    errors.CorruptCheckpoint: 500,
    errors.ModelUnavailable: 500,
    errors.ModelInUse: 409,
    errors.Conflict: 409,
    errors.Overloaded: 429,
    errors.RateLimited: 429,
    errors.NotReady: 503,
    errors.StoreUnavailable: 503,
    errors.InsufficientMemory: 503,
    errors.DeadlineExceeded: 504,
    errors.CallerLeft: 499,
    errors.InferenceFailed: 500,
    errors.TrainingFailed: 500,
    errors.LeakFound: 422,
}
RETRY_LATER = {429, 503}
NO_PLACES = ("body", "str", "constrained-float")  # but names of types, as "list[…]" is one


RETRY_SECONDS = 1.0
CRASHED = "InternalError", "the service failed on this request"


OPENAI = "/v1/"  # below it, errors are as OpenAI's clients read them:
OPENAI_STATUS = {409: 400, 413: 400, 422: 400}  # they know a bad request by 400 alone, and try again after a 409


def error_body_of(scope: Scope, code: int, kind: str, message: str, param: str | None) -> dict[str, Any]:
    param = None if param is None else errors.shorten(param)
    error = {
        "type": kind,
        "message": errors.shorten(message),
        "param": param,
        "request_id": scope["state"]["request_id"],
    }
    return {"error": error | ({"type": error_type(code), "code": kind} if scope["path"].startswith(OPENAI) else {})}


def error_response(
    request: Request,
    code: int,
    kind: str,
    message: str,
    param: str | None,
    headers: Mapping[str, str] | None = None,
    retry_after_seconds: float | None = None,
) -> JSONResponse:
    if request.scope["path"].startswith(OPENAI):
        code = OPENAI_STATUS.get(code, code)
    if code in RETRY_LATER:
        headers = {"Retry-After": str(math.ceil(retry_after_seconds or RETRY_SECONDS))}
    if code == 401:
        headers = {"WWW-Authenticate": "Bearer"}
    return JSONResponse(error_body_of(request.scope, code, kind, message, param), status_code=code, headers=headers)


def error_body(request: Request, error: Exception) -> dict[str, Any]:
    """The one error body, for answers that have begun and cannot carry a status any more."""
    if not isinstance(error, errors.LatentWireError):
        log.error("request %s failed", request.state.request_id, exc_info=error)
        return error_body_of(request.scope, 500, *CRASHED, None)
    return error_body_of(request.scope, STATUS[type(error)], type(error).__name__, str(error), error.param)


def status_of(error: BaseException) -> int:
    """The status that an error deserves, also of one that is raised after the answer has begun."""
    if isinstance(error, asyncio.CancelledError):
        return STATUS[errors.CallerLeft]
    return STATUS[type(error)] if isinstance(error, errors.LatentWireError) else 500


async def deliberate_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, errors.LatentWireError)
    code, kind = STATUS[type(error)], type(error).__name__
    if request.method == "POST":  # a probe that asks whether the service is ready is not refused work
        request.app.state.runtime.metrics.observe_refusal(kind)
    return error_response(request, code, kind, str(error), error.param, retry_after_seconds=error.retry_after_seconds)


async def invalid_body(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if isinstance(error.body, bytes):  # FastAPI leaves a body alone that does not call itself JSON
        sent = request.headers.get("content-type", "none")
        message = f"the content-type is {sent}; expected application/json"
        return error_response(request, 415, "UnsupportedMediaType", message, None)
    if first["type"] == "json_invalid":
        where = f"the body is not JSON at character {first['loc'][-1]}: {first['ctx']['error']}"
        return error_response(request, 422, "InvalidRequest", where, None)
    path = [str(part) for part in first["loc"] if part not in NO_PLACES]
    param = ".".join(part for part in path if not part.startswith("list[")) or None
    value = (
        "" if isinstance(first.get("input"), dict | list) else f", got {errors.shorten(repr(first.get('input')), 80)}"
    )
    reason = first["msg"].removeprefix("Value error, ")  # pydantic's prefix of our validators' messages
    return error_response(request, 422, "InvalidRequest", f"{param or 'body'}: {reason}{value}", param)


async def http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, errors.LatentWireError):  # FastAPI wraps what receiving the body raises
        return await deliberate_error(request, error.__cause__)
    kinds = {404: "NotFound", 405: "MethodNotAllowed"}
    why = f" ({errors.first_line(error.__cause__)})" if isinstance(error.__cause__, Exception) else ""
    message = f"{request.method} {errors.shorten(request.url.path, 80)}: {error.detail}{why}"
    kind = kinds.get(error.status_code, "InvalidRequest")
    headers = {"Allow": _allowed(request, error)} if error.status_code == 405 else error.headers
    return error_response(request, error.status_code, kind, message, None, headers)


def _allowed(request: Request, error: HTTPException) -> str:
    """Every method a path is served for, where the router knows only those of the first route that has it."""
    known = set((error.headers or {}).get("Allow", "").split(", ")) - {""}
    for path, operations in request.app.openapi()["paths"].items():
        if compile_path(path)[0].match(request.url.path):
            known |= {method.upper() for method in operations}
    return ", ".join(sorted(known))
