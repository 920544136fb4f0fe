"""HTTP surface. Every decision about status codes and headers is in this file."""

import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from latentwire.bridge import errors
from latentwire.service.answers_openai import OpenAIErrorBody, error_type
from latentwire.service.bodies import Bodies
from latentwire.service.collector import LiveCollector
from latentwire.service.jobs import Jobs
from latentwire.service.pages import Pages
from latentwire.service.prefix import Prefix
from latentwire.service.routes import admin, evaluations, inference, openai, page, status
from latentwire.service.runtime import Runtime
from latentwire.service.schemas import ErrorBody
from latentwire.service.security import Guard
from latentwire.service.settings import Settings

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
}
RETRY_LATER = {429, 503}
RETRY_SECONDS = 1.0
CRASHED = "InternalError", "the service failed on this request"
CORS: dict[str, Any] = {
    "allow_methods": ["GET", "POST", "DELETE"],
    "allow_headers": ["*"],
    "allow_private_network": True,  # a page of the wide network may call, where its origin was listed
    "expose_headers": ["X-Request-Id", "Retry-After", "X-Message-Bytes", "X-Latent-Ids"],
}
OPENAI = "/v1/"  # below it, errors are as OpenAI's clients read them:
OPENAI_STATUS = {409: 400, 413: 400, 422: 400}  # they know a bad request by 400 alone, and try again after a 409


def create_app(settings: Settings, checkpoints: Mapping[str, str]) -> FastAPI:
    """Build the application over bridges {name: checkpoint}; no global state, so tests can build many.

    Raises:
        LatentWireError: A checkpoint cannot be read.
    """
    runtime = Runtime(settings, checkpoints)
    jobs = Jobs(runtime)
    runtime.metrics.registry.register(LiveCollector(runtime, jobs))
    stopped = False

    async def stop() -> None:
        """Does nothing the second time. Jobs first: they borrow models."""
        nonlocal stopped
        if stopped:
            return
        stopped = runtime.draining = True
        await jobs.stop()
        await runtime.stop()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        app.openapi()  # kept; the first request that asks should not wait for it
        await runtime.start()
        jobs.start()
        yield
        await stop()

    documented: dict[int | str, dict[str, Any]] = {
        code: {"model": ErrorBody} for code in sorted({400, 405, 415, *STATUS.values()})
    }
    # The pages at /docs come with their scripts: a GPU node often reaches no CDN.
    app = FastAPIOffline(
        title="LatentWire", summary="Latent bridges over HTTP", lifespan=lifespan, responses=documented,
        servers=[{"url": "."}],  # relative to /openapi.json, as a proxy shows it
        docs_url=None, redoc_url=None,  # in ``page``, with relative addresses
        redirect_slashes=False,  # redirects are absolute: behind a proxy they would lead elsewhere
    )  # fmt: skip
    app.state.runtime = runtime
    app.state.jobs = jobs
    app.state.stop = stop
    app.state.error_body = error_body
    app.include_router(inference.router)
    app.include_router(status.router)
    app.include_router(openai.router, responses={code: {"model": OpenAIErrorBody} for code in documented})
    app.include_router(evaluations.router)
    app.include_router(admin.router)
    app.include_router(page.router)
    app.mount("/page", page.files)
    app.add_exception_handler(errors.LatentWireError, _deliberate)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_middleware(
        Guard,
        pages=Pages(settings, has_keys=bool(runtime.keys)),
        keys=runtime.keys,
        limiter=runtime.limiter,
        check_room=runtime.load.check_room,
        answer=_deliberate,
    )
    app.add_middleware(Envelope, runtime=runtime)  # added later, so outside: a refusal has its id and is counted too
    if settings.cors_origins:  # outside even of that: pages may read refusals and crashes, and preflights bear no key
        app.add_middleware(CORSMiddleware, allow_origins=settings.cors_origins, **CORS)
    if settings.root_path:  # outermost: within, a path has one name
        app.add_middleware(Prefix, prefix=settings.root_path)
    return app


class Envelope:
    """Around every request: its id, the limits of its body, its metrics, and the one error body for a crash.

    Plain ASGI, because ``BaseHTTPMiddleware`` hides disconnects from the routes.
    """

    def __init__(self, app: ASGIApp, runtime: Runtime) -> None:
        self.app, self.runtime = app, runtime
        self.bodies = Bodies(runtime.settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        usable = 0 < len(given) <= 128 and given.isascii() and given.isprintable()
        request_id = scope.setdefault("state", {})["request_id"] = given if usable else uuid.uuid4().hex
        started, status, replied = time.perf_counter(), 500, False

        async def send_with_id(message: Message) -> None:
            nonlocal status, replied
            if message["type"] == "http.response.start":
                status, replied = message["status"], True
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
                # The next request should go to another replica. And a caller who waits to be asked for the body, and is
                # refused instead, may send the body or not: what comes next could be either.
                if self.runtime.draining or body.unasked:
                    message["headers"].append((b"connection", b"close"))
            elif not (message.get("more_body") or body.whole):
                await send({**message, "more_body": True})
                await body.drop()
                message = {"type": "http.response.body"}
            await send(message)

        app = _elsewhere if self._is_elsewhere(scope) else self.app
        try:
            with self.bodies.receiving(scope, receive) as body:
                await app(scope, body.receive, send_with_id)
        except Exception:
            log.exception("request %s failed", request_id)
            if not replied:
                said = _body(scope, 500, *CRASHED, None)
                await JSONResponse(said, status_code=500)(scope, receive, send_with_id)
        finally:
            known = scope["path"] if scope["path"] in scope["app"].openapi()["paths"] else "unknown"
            route = getattr(scope.get("route"), "path", known)  # none was looked for where the guard refused
            self.runtime.metrics.requests.labels(route, str(status)).inc()
            self.runtime.metrics.latency.labels(route).observe(time.perf_counter() - started)

    def _is_elsewhere(self, scope: Scope) -> bool:
        """Whether a path is on the other of two ports: what operators ask is apart from what users ask."""
        port, path = self.runtime.admin_port, scope["path"]
        if port is None or path.startswith("/health/"):
            return False
        return bool((path == "/metrics" or path.startswith("/admin/")) != (scope["server"][1] == port))


async def _elsewhere(scope: Scope, receive: Receive, send: Send) -> None:
    request = Request(scope)
    where = f"{request.method} {errors.shorten(request.url.path, 80)} is not on this port"
    await _answer(request, 404, "NotFound", where, None)(scope, receive, send)


def _body(scope: Scope, code: int, kind: str, message: str, param: str | None) -> dict[str, Any]:
    param = None if param is None else errors.shorten(param)
    said = {
        "type": kind,
        "message": errors.shorten(message),
        "param": param,
        "request_id": scope["state"]["request_id"],
    }
    return {"error": said | ({"type": error_type(code), "code": kind} if scope["path"].startswith(OPENAI) else {})}


def _answer(
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
    return JSONResponse(_body(request.scope, code, kind, message, param), status_code=code, headers=headers)


def error_body(request: Request, error: Exception) -> dict[str, Any]:
    """The one error body, for answers that have begun and cannot carry a status any more."""
    if not isinstance(error, errors.LatentWireError):
        log.error("request %s failed", request.state.request_id, exc_info=error)
        return _body(request.scope, 500, *CRASHED, None)
    return _body(request.scope, STATUS[type(error)], type(error).__name__, str(error), error.param)


async def _deliberate(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, errors.LatentWireError)
    code, kind = STATUS[type(error)], type(error).__name__
    return _answer(request, code, kind, str(error), error.param, retry_after_seconds=error.retry_after_seconds)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if isinstance(error.body, bytes):  # FastAPI leaves a body alone that does not call itself JSON
        sent = request.headers.get("content-type", "none")
        message = f"the content-type is {sent}; expected application/json"
        return _answer(request, 415, "UnsupportedMediaType", message, None)
    if first["type"] == "json_invalid":
        where = f"the body is not JSON at character {first['loc'][-1]}: {first['ctx']['error']}"
        return _answer(request, 422, "InvalidRequest", where, None)
    path = [str(part) for part in first["loc"] if part not in ("body", "str")]  # "str" and "list[…]" name a
    param = ".".join(part for part in path if not part.startswith("list[")) or None  # type, not a place
    value = (
        "" if isinstance(first.get("input"), dict | list) else f", got {errors.shorten(repr(first.get('input')), 80)}"
    )
    said = first["msg"].removeprefix("Value error, ")  # pydantic's word for what a validator of ours says
    return _answer(request, 422, "InvalidRequest", f"{param or 'body'}: {said}{value}", param)


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, errors.LatentWireError):  # FastAPI wraps what receiving the body raises
        return await _deliberate(request, error.__cause__)
    kinds = {404: "NotFound", 405: "MethodNotAllowed"}
    why = f" ({errors.first_line(error.__cause__)})" if isinstance(error.__cause__, Exception) else ""
    message = f"{request.method} {errors.shorten(request.url.path, 80)}: {error.detail}{why}"
    kind = kinds.get(error.status_code, "InvalidRequest")
    headers = {"Allow": _allowed(request, error)} if error.status_code == 405 else error.headers
    return _answer(request, error.status_code, kind, message, None, headers)


def _allowed(request: Request, error: HTTPException) -> str:
    """Every method a path is served for, where the router knows only those of the first route that has it."""
    known = set((error.headers or {}).get("Allow", "").split(", ")) - {""}
    for path, operations in request.app.openapi()["paths"].items():
        if compile_path(path)[0].match(request.url.path):
            known |= {method.upper() for method in operations}
    return ", ".join(sorted(known))
