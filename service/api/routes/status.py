"""Which bridges are served, and whether the service is well: bridges, health, metrics."""

import asyncio

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from latentwire.bridge.bridge import Bridge
from latentwire.bridge.config import Provenance
from latentwire.bridge.errors import NotReady
from latentwire.service.inference.models import InMemory
from latentwire.service.inference.runtime import Runtime
from latentwire.service.measures import Texts
from latentwire.service.schemas.inference import BridgeList, BridgeOut, Health

router = APIRouter(tags=["status"])


@router.get("/bridges")
async def bridges(request: Request) -> BridgeList:
    """Every bridge that is served."""
    runtime: Runtime = request.app.state.runtime
    memory = await runtime.models.in_memory()
    return BridgeList(bridges=[_described(runtime, bridge, memory) for bridge in runtime.bridges.values()])


@router.get("/bridges/{name}")
async def bridge(name: str, request: Request) -> BridgeOut:
    """One bridge."""
    runtime: Runtime = request.app.state.runtime
    return await describe(runtime, runtime.find(name))


@router.get("/health/live")
async def live(request: Request) -> Health:
    """Whether the process makes progress: 503 when there is work and no step was made for long. Busy is fine."""
    runtime: Runtime = request.app.state.runtime
    if runtime.models.dead is not None:
        raise NotReady(runtime.models.dead)
    if runtime.models.stalled:
        raise NotReady(f"no step was made for {runtime.settings.stall_timeout:g} s although there is work")
    seconds = runtime.settings.stall_timeout
    if hanging := request.app.state.peers.hanging(seconds):
        raise NotReady(f"process {hanging[0]} of those that answer HTTP has not moved for {seconds:g} s")
    return Health()


@router.get("/health/ready")
async def ready(request: Request) -> Health:
    """Whether every bridge has been loaded and has answered once, and the service is not about to stop."""
    runtime: Runtime = request.app.state.runtime
    if runtime.leaving:
        raise NotReady("the service is stopping")
    if runtime.models.failure is not None:
        raise NotReady(runtime.models.failure)
    if not runtime.models.ready:
        raise NotReady("the bridges are still loading")
    return Health()


@router.get(
    "/metrics", response_class=Response, responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
)
async def metrics(request: Request) -> Response:
    """Prometheus text format; where several processes answer HTTP, what each counts, by its label ``front``."""
    runtime: Runtime = request.app.state.runtime
    theirs = asyncio.create_task(runtime.models.metrics())
    await asyncio.sleep(0)  # where another process holds the models it is asked first, and writes meanwhile
    await asyncio.sleep(0)
    own, peers = generate_latest(runtime.metrics.registry), request.app.state.peers
    if peers.count > 1:
        texts = {str(peers.number): own.decode(), **await peers.texts()}
        own = await asyncio.to_thread(generate_latest, Texts("front", texts))  # to read them takes long: some ms each
    return Response(own + await theirs, media_type=CONTENT_TYPE_LATEST)


async def describe(runtime: Runtime, bridge: Bridge) -> BridgeOut:
    """A bridge as callers see it."""
    return _described(runtime, bridge, await runtime.models.in_memory())


def _described(runtime: Runtime, bridge: Bridge, memory: InMemory) -> BridgeOut:
    config = bridge.manifest.bridge
    heads = config.heads.items()
    runs = [*config.earlier, config.provenance, *(head.provenance for _, head in heads if head.provenance)]
    return BridgeOut(
        name=bridge.name,
        bridge_id=bridge.manifest.bridge_id,
        sender=config.sender.name,
        layers=list(config.layers),
        receivers=list(config.heads),
        encoder=config.encoder.kind,
        ratio=config.encoder.ratio,
        num_latents=config.encoder.num_latents,
        latent_dim=config.encoder.latent_dim,
        max_source_tokens=config.max_source_tokens,
        template=config.heads[bridge.receiver(None)].layout.template,
        chat=config.heads[bridge.receiver(None)].layout.chat is not None,
        task=config.provenance.task,
        steps=sum(run.steps for run in runs),
        loaded={name: memory.bytes[name] for name in bridge.model_names if name in memory.bytes},
        engines={name: memory.engines.get(name) for name in config.heads},
        sources_per_example={name: _most_sources(head.provenance or config.provenance) for name, head in heads},
        pinned=set(bridge.model_names) <= set(memory.pinned),
        keep_alive_seconds=runtime.settings.keep_alive_of(bridge.name),
    )


def _most_sources(trained: Provenance) -> int:
    most = trained.recipe.get("sources_per_example")
    return most if isinstance(most, int) else 1  # a recipe from before there were several
