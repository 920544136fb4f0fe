"""Around every request; see ``Envelope``."""

import logging
import time
import uuid

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from latentwire.bridge import errors
from latentwire.service import tracing
from latentwire.service.api.bodies import Bodies
from latentwire.service.api.errors import CRASHED, error_body_of, error_response
from latentwire.service.inference.runtime import Runtime

log = logging.getLogger(__name__)

UNLOGGED = ("/health/live", "/health/ready", "/metrics")  # asked all the time


class Envelope:
    """Around every request: its id, the limits of its body, its metrics, and the one error body for a crash.

    Plain ASGI, because ``BaseHTTPMiddleware`` hides disconnects from the routes.
    """

    def __init__(self, app: ASGIApp, runtime: Runtime, bodies: Bodies) -> None:
        self.app, self.runtime, self.bodies = app, runtime, bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        usable = 0 < len(given) <= 128 and given.isascii() and given.isprintable()
        request_id = scope.setdefault("state", {})["request_id"] = given if usable else uuid.uuid4().hex
        state, status, replied, parent = scope["state"], 500, False, tracing.traceparent()
        started = state["arrived"] = time.monotonic()
        about = {"request_id": request_id, "trace_id": parent and parent.split("-")[1]}

        async def send_with_id(message: Message) -> None:
            nonlocal status, replied
            if message["type"] == "http.response.start":
                status, replied = message["status"], True
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
                if parent is not None:
                    message["headers"].append((b"traceparent", parent.encode()))
                # The next request should go to another replica. And a caller who waits to be asked for the body, and is
                # refused instead, may send the body or not: what comes next could be either.
                if self.runtime.leaving or body.unasked:
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
            log.exception("request %s failed", request_id, extra=about)
            if not replied:
                content = error_body_of(scope, 500, *CRASHED, None)
                await JSONResponse(content, status_code=500)(scope, receive, send_with_id)
        finally:
            known = scope["path"] if scope["path"] in scope["app"].openapi()["paths"] else "unknown"
            route = str(getattr(scope.get("route"), "path", known))  # none was looked for where the guard refused
            seconds, ended = time.monotonic() - started, int(state.get("ended", status))
            self.runtime.metrics.observe_end(route, status, seconds, str(state.get("bridge", "")), ended)
            if self.runtime.settings.log_requests and route not in UNLOGGED:
                log.info("%s %s: %d after %.3f s", scope["method"], route, ended, seconds, extra=about)

    def _is_elsewhere(self, scope: Scope) -> bool:
        """Whether a path is on the other of two ports: what operators ask is apart from what users ask."""
        port, path = self.runtime.admin_port, scope["path"]
        if port is None or path.startswith("/health/"):
            return False
        return bool((path == "/metrics" or path.startswith("/admin/")) != (scope["server"][1] == port))


async def _elsewhere(scope: Scope, receive: Receive, send: Send) -> None:
    request = Request(scope)
    where = f"{request.method} {errors.shorten(request.url.path, 80)} is not on this port"
    await error_response(request, 404, "NotFound", where, None)(scope, receive, send)
