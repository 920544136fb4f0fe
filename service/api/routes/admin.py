"""``/admin``: which bridges are in memory, and which stay there."""

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
    await runtime.models.load(bridge)
    return await describe(runtime, bridge)


@router.post("/unload")
async def unload(name: str, request: Request) -> Unloaded:
    """Drop the bridge's models now, pinned or not; 409 while one is in use. The next request loads them again."""
    runtime: Runtime = request.app.state.runtime
    bridge = runtime.find(name)
    freed = await runtime.models.unload(bridge)
    return Unloaded(**(await describe(runtime, bridge)).model_dump(), freed_bytes=freed)


@router.post("/pin")
async def pin(name: str, request: Request) -> BridgeOut:
    """Keep the bridge's models in memory, whoever needs their room."""
    runtime: Runtime = request.app.state.runtime
    bridge = runtime.find(name)
    await runtime.models.pin(bridge, True)
    return await describe(runtime, bridge)


@router.post("/unpin")
async def unpin(name: str, request: Request) -> BridgeOut:
    """Let the bridge's models leave again when others need their room."""
    runtime: Runtime = request.app.state.runtime
    bridge = runtime.find(name)
    await runtime.models.pin(bridge, False)
    return await describe(runtime, bridge)
