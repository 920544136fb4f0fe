"""``/admin``: which bridges are in memory, and which stay there."""

import asyncio

from fastapi import APIRouter, Request

from latentwire.service.api.routes.status import describe
from latentwire.service.inference.runtime import Runtime
from latentwire.service.schemas.inference import BridgeOut, Unloaded

router = APIRouter(tags=["admin"], prefix="/admin/bridges/{name}")


@router.post("/load")
async def load(name: str, request: Request) -> BridgeOut:
    """Bring the bridge's models into memory, one after the other, where they fit together."""
    runtime: Runtime = request.app.state.runtime
    bridge = runtime.find(name)
    for model in bridge.model_names:
        await runtime.engines.acquire(model, bridge.home(model))
        bridge.home(model).release(model)
    return describe(runtime, bridge)


@router.post("/unload")
async def unload(name: str, request: Request) -> Unloaded:
    """Drop the bridge's models now, pinned or not; 409 while one is in use. The next request loads them again."""
    runtime: Runtime = request.app.state.runtime
    bridge = runtime.find(name)
    freed = 0
    for model in bridge.model_names:
        freed += await asyncio.to_thread(bridge.home(model).unload, model)
    return Unloaded(**describe(runtime, bridge).model_dump(), freed_bytes=freed)


@router.post("/pin")
async def pin(name: str, request: Request) -> BridgeOut:
    """Keep the bridge's models in memory, whoever needs their room."""
    runtime: Runtime = request.app.state.runtime
    bridge = runtime.find(name)
    for model in bridge.model_names:
        bridge.home(model).pin(model)
    return describe(runtime, bridge)


@router.post("/unpin")
async def unpin(name: str, request: Request) -> BridgeOut:
    """Let the bridge's models leave again when others need their room."""
    runtime: Runtime = request.app.state.runtime
    bridge = runtime.find(name)
    for model in bridge.model_names:
        bridge.home(model).unpin(model)
    return describe(runtime, bridge)
