"""``POST /encode``, ``POST /generate``, ``POST /score`` and ``POST /read``."""

import base64
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response

from latentwire.bridge import wire
from latentwire.bridge.bridge import Bridge
from latentwire.bridge.results import ms_since
from latentwire.service import tracing
from latentwire.service.api.lifetime import OnPiece, deadline, event, run_while_connected, stream_response
from latentwire.service.inference.generation import RequestHandler, check_limits, check_reading, within
from latentwire.service.inference.request import Piece, Text
from latentwire.service.inference.runtime import Runtime
from latentwire.service.schemas.inference import (
    EncodeRequest,
    EncodeResponse,
    GenerateRequest,
    GenerateResponse,
    LatentOut,
    Timing,
    Usage,
)
from latentwire.service.schemas.reading import ReadRequest, ReadResponse
from latentwire.service.schemas.scoring import ScoreRequest, ScoreResponse
from latentwire.service.store.latents import CachedEncoding

Body = TypeVar("Body", ScoreRequest, ReadRequest)
Answer = TypeVar("Answer")

router = APIRouter(tags=["inference"])
RAW = "application/octet-stream"
EVENT = {
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answers. With `stream`, server-sent events: `token` {index, text}, then `done` with the "
        "answers, or `error` with the error body.",
        "content": {"text/event-stream": {"schema": EVENT}},
    }
}
ENCODED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": f"The latents. With `Accept: {RAW}`, the messages alone, one after the other; the header "
        "`X-Message-Bytes` has their lengths, `X-Latent-Ids` their ids when stored.",
        "content": {RAW: {"schema": {"type": "string", "format": "binary"}}},
    }
}


@router.post("/encode", response_model=EncodeResponse, response_model_exclude_none=True, responses=ENCODED)
async def encode(body: EncodeRequest, request: Request) -> EncodeResponse | Response:
    """Let the bridge's sender read texts, and return their latents."""
    runtime: Runtime = request.app.state.runtime
    runtime.check_open()
    bridge = runtime.find(body.bridge)
    within(("inputs", len(body.inputs), runtime.settings.max_inputs))
    for at, text in enumerate(body.inputs):
        runtime.check_text(text, f"inputs.{at}")
    handler = handler_of(request, bridge)

    async def work() -> EncodeResponse | Response:
        try:
            return await _encode(handler, body, raw=RAW in request.headers.get("accept", ""))
        finally:
            await charge(request, handler.usage)

    with runtime.admission.admit(len(body.inputs)):
        return await run_while_connected(request, work(), deadline(request, body.timeout_seconds))


@router.post("/generate", response_model=GenerateResponse, responses=STREAMED)
async def generate(body: GenerateRequest, request: Request) -> GenerateResponse | Response:
    """Let a receiver answer from latents, or from texts it will not see."""

    async def events(pieces: AsyncIterator[Piece], result: Callable[[], GenerateResponse]) -> AsyncIterator[str]:
        async for piece in pieces:
            yield event("token", {"index": piece.index, "text": piece.text})
        try:
            yield event("done", result().model_dump_json())
        except Exception as error:
            yield event("error", request.app.state.error_body(request, error))

    response: GenerateResponse | Response = await run_generate(request, body, events if body.stream else None)
    return response


async def run_generate(
    request: Request,
    body: GenerateRequest,
    events: Callable[[AsyncIterator[Piece], Callable[[], GenerateResponse]], AsyncIterator[str]] | None,
) -> Any:
    """Check, admit and run a request, and charge its tenant; with ``events`` the response is a stream of them."""
    runtime: Runtime = request.app.state.runtime
    runtime.check_open()
    bridge = runtime.find(body.bridge)
    receiver = bridge.receiver(body.receiver)
    check_limits(runtime, body)
    handler = handler_of(request, bridge)

    async def work(on_piece: OnPiece | None = None) -> GenerateResponse:
        with runtime.admission.admit(len(body.inputs) * body.n):
            try:
                return await handler.generate(receiver, body, on_piece)
            finally:
                await charge(request, handler.usage)

    seconds = deadline(request, body.timeout_seconds)
    if events is None:
        return await run_while_connected(request, work(), seconds)
    return await stream_response(request, work, events, seconds)


@router.post("/score", response_model=ScoreResponse, response_model_exclude_none=True)
async def score(body: ScoreRequest, request: Request) -> ScoreResponse:
    """How likely a receiver finds each of some continuations of a prompt about latents, or about texts it will not see.

    What the choices share is read once. Log-probabilities are in nats, natural logarithms.
    """
    return await _answered(request, body, check_limits, RequestHandler.score)


@router.post("/read", response_model=ReadResponse, response_model_exclude_none=True)
async def read(body: ReadRequest, request: Request) -> ReadResponse:
    """What a receiver takes latents to say: it repeats their sources, with how likely it found each word.

    With originals also how likely it finds these. Log-probabilities are in nats, natural logarithms.
    """
    return await _answered(request, body, check_reading, RequestHandler.read)


async def _answered(
    request: Request,
    body: Body,
    check: Callable[[Runtime, Body], None],
    answer: Callable[[RequestHandler, str, Body], Awaitable[Answer]],
) -> Answer:
    """Check, admit and run a request whose answer comes whole, and charge its tenant."""
    runtime: Runtime = request.app.state.runtime
    runtime.check_open()
    bridge = runtime.find(body.bridge)
    receiver = bridge.receiver(body.receiver)
    check(runtime, body)
    handler = handler_of(request, bridge)

    async def work() -> Answer:
        with runtime.admission.admit(len(body.inputs)):
            try:
                return await answer(handler, receiver, body)
            finally:
                await charge(request, handler.usage)

    return await run_while_connected(request, work(), deadline(request, body.timeout_seconds))


def handler_of(request: Request, bridge: Bridge) -> RequestHandler:
    """What does the work of a request, which is counted as this bridge's from here on."""
    request.state.bridge = bridge.name
    tracing.told("admit", request.state.arrived, time.monotonic())
    return RequestHandler(request.app.state.runtime, request.state.caller.name, bridge, request.state.arrived)


async def charge(request: Request, usage: Usage) -> None:
    """Count the tokens of a request, also for its tenant's limit; afterwards, since they are not known before."""
    runtime: Runtime = request.app.state.runtime
    runtime.metrics.observe_usage(usage)
    tracing.told_of_usage(request.state.bridge, usage)
    tokens = usage.source_tokens + usage.prompt_tokens + usage.soft_tokens + usage.generated_tokens
    await runtime.limiter.charge(request.state.caller.name, tokens)


async def _encode(handler: RequestHandler, body: EncodeRequest, *, raw: bool) -> EncodeResponse | Response:
    started = time.perf_counter()
    rows = [Text(text, body.truncate, f"inputs.{at}") for at, text in enumerate(body.inputs)]
    encodings = await handler.encode(rows, body.dtype)
    encode_ms = ms_since(started)
    kept = (
        await handler.keep(list(zip(body.inputs, encodings, strict=True)), handler.ttl_seconds) if body.store else None
    )
    ids = None if kept is None else [latent.id for latent in kept]
    if raw:
        headers = {"x-message-bytes": ",".join(str(len(one.message)) for one in encodings)}
        if ids is not None:
            headers["x-latent-ids"] = ",".join(ids)
        return Response(b"".join(one.message for one in encodings), media_type=RAW, headers=headers)
    latents = [
        _latent(text, one, body.dtype, None if ids is None else ids[at])
        for at, (text, one) in enumerate(zip(body.inputs, encodings, strict=True))
    ]
    timing = Timing(encode_ms=encode_ms, total_ms=ms_since(started))
    return EncodeResponse(bridge=handler.bridge.name, latents=latents, usage=handler.usage, timing=timing)


def _latent(text: str, encoding: CachedEncoding, dtype: str, latent_id: str | None) -> LatentOut:
    return LatentOut(
        id=latent_id,
        data=base64.b64encode(encoding.message).decode(),
        shape=list(wire.shape_of(encoding.message)),
        dtype=dtype,
        bytes=len(encoding.message),
        source_tokens=encoding.source_tokens,
        source_bytes=len(text.encode()),
        truncated=encoding.truncated,
    )
