"""``POST /encode`` and ``POST /generate``."""

import base64
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import APIRouter, Request, Response

from latentwire.bridge import wire
from latentwire.service.api.lifetime import Show, attend, deadline, event, stream
from latentwire.service.inference.generation import Answering, check_limits, ms_since, within
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
from latentwire.service.store.latents import CachedEncoding

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
    work = Answering(runtime, request.state.caller.name, bridge)

    async def answer() -> EncodeResponse | Response:
        try:
            return await _encode(work, body, raw=RAW in request.headers.get("accept", ""))
        finally:
            await charge(request, work.usage)

    with runtime.admission.admit(len(body.inputs)):
        return await attend(request, answer(), deadline(request, body.timeout_seconds))


@router.post("/generate", response_model=GenerateResponse, responses=STREAMED)
async def generate(body: GenerateRequest, request: Request) -> GenerateResponse | Response:
    """Let a receiver answer from latents, or from texts it will not see."""

    async def events(pieces: AsyncIterator[Piece], answer: Callable[[], GenerateResponse]) -> AsyncIterator[str]:
        async for piece in pieces:
            yield event("token", {"index": piece.index, "text": piece.text})
        try:
            yield event("done", answer().model_dump_json())
        except Exception as error:
            yield event("error", request.app.state.error_body(request, error))

    answer: GenerateResponse | Response = await answering(request, body, events if body.stream else None)
    return answer


async def answering(
    request: Request,
    body: GenerateRequest,
    events: Callable[[AsyncIterator[Piece], Callable[[], GenerateResponse]], AsyncIterator[str]] | None,
) -> Any:
    """The answer to a request, checked, admitted, attended and charged; a stream of ``events`` when they are given."""
    runtime: Runtime = request.app.state.runtime
    runtime.check_open()
    bridge = runtime.find(body.bridge)
    receiver = bridge.receiver(body.receiver)
    check_limits(runtime, body)
    work = Answering(runtime, request.state.caller.name, bridge)

    async def answer(show: Show | None = None) -> GenerateResponse:
        with runtime.admission.admit(len(body.inputs) * body.n):
            try:
                return await work.answer(receiver, body, show)
            finally:
                await charge(request, work.usage)

    seconds = deadline(request, body.timeout_seconds)
    if events is None:
        return await attend(request, answer(), seconds)
    return await stream(request, answer, events, seconds)


async def charge(request: Request, usage: Usage) -> None:
    """Count what a request has cost, whatever came of it; after the fact, because nobody knows it before."""
    runtime: Runtime = request.app.state.runtime
    tokens = usage.source_tokens + usage.prompt_tokens + usage.soft_tokens + usage.generated_tokens
    await runtime.limiter.charge(request.state.caller.name, tokens)


async def _encode(work: Answering, body: EncodeRequest, *, raw: bool) -> EncodeResponse | Response:
    started = time.perf_counter()
    rows = [Text(text, body.truncate, f"inputs.{at}") for at, text in enumerate(body.inputs)]
    sent = await work.send(rows, body.dtype)
    encode_ms = ms_since(started)
    work.runtime.metrics.tokens.labels("source").inc(work.usage.source_tokens)
    ids = await work.keep([one.message for one in sent]) if body.store else None
    if raw:
        headers = {"x-message-bytes": ",".join(str(len(one.message)) for one in sent)}
        if ids is not None:
            headers["x-latent-ids"] = ",".join(ids)
        return Response(b"".join(one.message for one in sent), media_type=RAW, headers=headers)
    latents = [
        _latent(text, one, body.dtype, None if ids is None else ids[at])
        for at, (text, one) in enumerate(zip(body.inputs, sent, strict=True))
    ]
    timing = Timing(encode_ms=encode_ms, total_ms=ms_since(started))
    return EncodeResponse(bridge=work.bridge.name, latents=latents, usage=work.usage, timing=timing)


def _latent(text: str, sent: CachedEncoding, dtype: str, latent_id: str | None) -> LatentOut:
    return LatentOut(
        id=latent_id,
        data=base64.b64encode(sent.message).decode(),
        shape=list(wire.shape_of(sent.message)),
        dtype=dtype,
        bytes=len(sent.message),
        source_tokens=sent.source_tokens,
        source_bytes=len(text.encode()),
        truncated=sent.truncated,
    )
