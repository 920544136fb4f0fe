"""``/latents``: encode once, keep, ask many times."""

import base64
import time
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from latentwire.bridge.errors import Forbidden, InvalidRequest, at_fault, shorten
from latentwire.bridge.results import ms_since
from latentwire.service.api.lifetime import deadline, run_while_connected
from latentwire.service.api.routes.inference import RAW, charge, handler_of
from latentwire.service.inference.generation import RequestHandler, within
from latentwire.service.inference.request import Text
from latentwire.service.inference.runtime import Runtime
from latentwire.service.schemas.inference import Timing, message_of
from latentwire.service.schemas.latents import KeepRequest, KeepResponse, KeptLatentData, KeptLatentOut, LatentPage
from latentwire.service.store.latents import CachedEncoding, KeptLatent, delete_latent, page_of_latents

router = APIRouter(tags=["latents"], prefix="/latents")
MOST_LISTED = 1000
LONGEST_WORDS = 200
ONE: dict[int | str, dict[str, Any]] = {
    200: {
        "description": f"The latent. With `Accept: {RAW}`, its message alone.",
        "content": {RAW: {"schema": {"type": "string", "format": "binary"}}},
    }
}


@router.post("")
async def keep(body: KeepRequest, request: Request) -> KeepResponse:
    """Let the bridge's sender read texts, or take messages that were made before, and keep the latents."""
    runtime: Runtime = request.app.state.runtime
    runtime.check_open()
    bridge = runtime.find(body.bridge)
    within(("inputs", len(body.inputs), runtime.settings.max_inputs))
    for at, item in enumerate(body.inputs):
        runtime.check_text(item.text or "", f"inputs.{at}.text")
    handler = handler_of(request, bridge)

    async def work() -> KeepResponse:
        try:
            return await _keep(handler, body)
        finally:
            await charge(request, handler.usage)

    with runtime.admission.admit(len(body.inputs)):
        return await run_while_connected(request, work(), deadline(request, body.timeout_seconds))


@router.get("")
async def some(
    request: Request,
    after: str = "",
    limit: Annotated[int, Query(ge=1, le=MOST_LISTED)] = 100,
    containing: Annotated[str, Query(max_length=LONGEST_WORDS)] = "",
) -> LatentPage:
    """The documents of corpora, corpus by corpus, then what the caller keeps; page by page.

    With `containing`, those whose id, metadata or text (where a corpus keeps it) has these words. One call looks
    through 1,000: its page may be short, or empty, and `next` leads on.
    """
    runtime: Runtime = request.app.state.runtime
    seen = MOST_LISTED if containing else limit
    kept, unlisted = await _listed(runtime, request.state.caller.name, after, seen + 1)
    found = [one for one in kept[:seen] if one.contains(containing)]
    page, last = found[:limit], None
    if len(found) > limit or len(kept) > seen:
        last = found[limit - 1] if len(found) > limit else kept[seen - 1]
    latents = [KeptLatentOut(**KeptLatentOut.facts_of(one, _bridges(runtime))) for one in page]
    return LatentPage(latents=latents, next=None if last is None else last.id, unlisted=unlisted)


@router.get("/{id:path}", response_model=KeptLatentData, responses=ONE)
async def one(id: str, request: Request) -> KeptLatentData | Response:
    """A kept latent, and what is known of it."""
    runtime: Runtime = request.app.state.runtime
    (kept,) = (await runtime.latents({"id": id}, request.state.caller.name)).values()
    if RAW in request.headers.get("accept", ""):
        return Response(kept.message, media_type=RAW)
    facts = KeptLatentOut.facts_of(kept, _bridges(runtime))
    return KeptLatentData(**facts, data=base64.b64encode(kept.message).decode(), text=kept.text)


@router.delete("/{id:path}")
async def delete(id: str, request: Request) -> KeptLatentOut:
    """Keep a latent no longer."""
    runtime: Runtime = request.app.state.runtime
    if runtime.corpora.holds(id):
        raise Forbidden(f"{shorten(repr(id), 80)} is of a corpus, which is read-only", param="id")
    kept = await delete_latent(runtime.store, id, tenant=request.state.caller.name)
    return KeptLatentOut(**KeptLatentOut.facts_of(kept, _bridges(runtime)))


async def _listed(runtime: Runtime, tenant: str, after: str, limit: int) -> tuple[list[KeptLatent], str | None]:
    """The next of all latents, and why those that a store keeps are not among them."""
    of_corpora = not after or runtime.corpora.holds(after)
    kept = await runtime.corpora.page(after, limit) if of_corpora else []
    if len(kept) == limit:
        return kept, None
    try:
        after = "" if of_corpora else after
        return kept + await page_of_latents(runtime.store, tenant=tenant, after=after, limit=limit - len(kept)), None
    except InvalidRequest as refusal:  # the store does not list; corpora do
        if not len(runtime.corpora):
            raise
        return kept, str(refusal)


async def _keep(handler: RequestHandler, body: KeepRequest) -> KeepResponse:
    started, runtime = time.perf_counter(), handler.runtime
    given: dict[int, CachedEncoding] = {}
    for at, item in enumerate(body.inputs):
        if item.latent is not None:
            with at_fault(f"inputs.{at}.latent"):
                message = message_of(item.latent)
                handler.bridge.decode(message)
                given[at] = CachedEncoding(message, 0, False)
    texts = [
        Text(item.text, body.truncate, f"inputs.{at}.text")
        for at, item in enumerate(body.inputs)
        if item.text is not None
    ]
    read = iter(await handler.encode(texts, body.dtype) if texts else [])
    encode_ms = ms_since(started)
    pairs = [(item.text, given[at] if at in given else next(read)) for at, item in enumerate(body.inputs)]
    metadata = [item.metadata for item in body.inputs]
    kept = await handler.keep(pairs, body.ttl_or(handler.ttl_seconds), metadata)
    return KeepResponse(
        bridge=handler.bridge.name,
        latents=[KeptLatentOut(**KeptLatentOut.facts_of(latent, _bridges(runtime))) for latent in kept],
        usage=handler.usage,
        timing=Timing(encode_ms=encode_ms, total_ms=ms_since(started)),
    )


def _bridges(runtime: Runtime) -> dict[str, str]:
    return {bridge.manifest.bridge_id: name for name, bridge in runtime.bridges.items()}
