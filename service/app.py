"""The application: what it is made of, and what stands before its routes."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi_offline import FastAPIOffline
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException

from latentwire.bridge.errors import LatentWireError
from latentwire.service import tracing
from latentwire.service.api.bodies import Bodies
from latentwire.service.api.collector import RequestCollector, register
from latentwire.service.api.envelope import Envelope
from latentwire.service.api.errors import STATUS, deliberate_error, error_body, http_error, invalid_body
from latentwire.service.api.openai import routes as openai
from latentwire.service.api.openai.responses import OpenAIErrorBody
from latentwire.service.api.prefix import Prefix
from latentwire.service.api.routes import admin, evaluations, inference, latents, page, status
from latentwire.service.auth.guard import Guard
from latentwire.service.auth.pages import Pages
from latentwire.service.evaluations.jobs import Jobs, JobsElsewhere
from latentwire.service.inference.models import Models
from latentwire.service.inference.runtime import Runtime
from latentwire.service.processes.door import Door
from latentwire.service.processes.peers import Peers
from latentwire.service.processes.remote import RemoteJobs, RemoteModels
from latentwire.service.schemas.inference import ErrorBody
from latentwire.service.settings import Settings

CORS: dict[str, Any] = {
    "allow_methods": ["GET", "POST", "DELETE"],
    "allow_headers": ["*"],
    "allow_private_network": True,  # a page of the wide network may call, where its origin was listed
    "expose_headers": ["X-Request-Id", "Retry-After", "X-Message-Bytes", "X-Latent-Ids"],
}


def create_app(
    settings: Settings,
    checkpoints: Mapping[str, str],
    models_at: Door | Models | None = None,
    peers: Peers | None = None,
) -> FastAPI:
    """Build the application over bridges {name: checkpoint}; no global state, so tests can build many.

    ``models_at`` is the Unix socket of a process that holds the models, or what asks those that do; without it this
    process does. ``peers`` are the processes that answer HTTP, where this is one of several.

    Raises:
        LatentWireError: A checkpoint cannot be read.
    """
    models = RemoteModels(models_at, settings.stall_timeout) if isinstance(models_at, Door) else models_at
    runtime = Runtime(settings, checkpoints, models)
    jobs: Jobs | RemoteJobs
    if isinstance(models, RemoteModels):
        models.expect(runtime.bridge_ids, lambda: runtime.on_death())
        jobs = RemoteJobs(models)
    elif models is None:
        jobs = Jobs(runtime)
        register(runtime, jobs)
    else:
        jobs = JobsElsewhere(runtime)
    peers = peers or Peers()
    runtime.metrics.registry.register(RequestCollector(runtime, peers))
    runtime.admission.rows = peers.rows
    stopped = False

    async def stop() -> None:
        """Does nothing the second time. Jobs first: they borrow models."""
        nonlocal stopped
        if stopped:
            return
        stopped = runtime.leaving = runtime.draining = True
        await jobs.stop()
        await runtime.stop()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        app.openapi()  # kept; the first request that asks should not wait for it
        await peers.start(lambda: generate_latest(runtime.metrics.registry))
        await runtime.start()
        jobs.start()
        yield
        await stop()
        peers.stop()

    documented: dict[int | str, dict[str, Any]] = {
        code: {"model": ErrorBody} for code in sorted({400, 405, 415, *STATUS.values()})
    }
    # The pages at /docs come with their scripts: a GPU node often reaches no CDN.
    app = FastAPIOffline(
        title="LatentWire", summary="Latent bridges over HTTP", lifespan=lifespan, responses=documented,
        servers=[{"url": "."}],  # relative to /openapi.json, as a proxy shows it
        docs_url=None, redoc_url=None,  # in ``page``, with relative addresses
        telemetry=tracing.OF_REQUESTS,
        redirect_slashes=False,  # redirects are absolute: behind a proxy they would lead elsewhere
    )  # fmt: skip
    app.state.runtime = runtime
    app.state.peers = peers
    app.state.jobs = jobs
    app.state.stop = stop
    app.state.error_body = error_body
    app.include_router(inference.router)
    app.include_router(latents.router)
    app.include_router(status.router)
    app.include_router(openai.router, responses={code: {"model": OpenAIErrorBody} for code in documented})
    app.include_router(evaluations.router)
    app.include_router(admin.router)
    app.include_router(page.router)
    app.mount("/page", page.files)
    app.add_exception_handler(LatentWireError, deliberate_error)
    app.add_exception_handler(RequestValidationError, invalid_body)
    app.add_exception_handler(HTTPException, http_error)
    app.add_middleware(
        Guard,
        pages=Pages(settings, has_keys=bool(runtime.keys)),
        keys=runtime.keys,
        limiter=runtime.limiter,
        check_room=runtime.admission.check_room,
        error_response=deliberate_error,
    )
    bodies = Bodies(settings, peers.body_bytes)
    # Added later, so outside: a refusal has its id and is counted too.
    app.add_middleware(Envelope, runtime=runtime, bodies=bodies)
    if settings.cors_origins:  # outside even of that: pages may read refusals and crashes, and preflights bear no key
        app.add_middleware(CORSMiddleware, allow_origins=settings.cors_origins, **CORS)
    if settings.root_path:  # outermost: within, a path has one name
        app.add_middleware(Prefix, prefix=settings.root_path)
    return app
