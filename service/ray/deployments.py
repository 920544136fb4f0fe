"""Deployments of Ray Serve: ``Encoder`` and ``Generator``, which scale separately, and ``Front``, the HTTP service.

``latentwire serve --engine ray`` deploys the first two and answers HTTP itself; a Serve config (deploy/ray) has all
three. A configuration of a deployment there (replicas, GPUs, autoscaling) goes over what stands here.
"""

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.config import ProxyLocation
from ray.serve.handle import DeploymentHandle

from latentwire.bridge.bridge import Bridge
from latentwire.bridge.errors import InvalidRequest, first_line
from latentwire.service import tracing
from latentwire.service.app import create_app
from latentwire.service.auth.guard import check_binding
from latentwire.service.cli.logs import configure
from latentwire.service.ray.remote import RayModels
from latentwire.service.ray.replicas import Encoder, Generator, identity
from latentwire.service.settings import Settings

# What runs models needs; the rest is that of who answers HTTP, and nothing secret goes to replicas.
THEIRS = (
    "device", "sender_device", "receiver_device", "receiver", "dtype", "memory_budget", "host_memory", "keep_alive",
    "load_wait", "max_batch", "batch_tokens", "step_tokens", "threads", "step_mode", "kv_tokens", "require_engine",
    "max_queue", "stall_timeout", "latency_buckets",
)  # fmt: skip

EVERYWHERE = "0.0.0.0"  # where proxies listen, http_options say, which a replica does not see


class Front:
    """The HTTP service in a replica; Ray's proxies send it what they are asked."""

    def __init__(self, encoder: Any, generator: Any, bridges: Mapping[str, str], settings: Mapping[str, Any]) -> None:
        made = Settings(**settings)
        has_keys = made.api_keys_file is not None or made.api_keys is not None
        check_binding(EVERYWHERE, has_keys=has_keys, insecure=made.insecure)
        configure("info", console=sys.stderr, as_json=made.log_format == "json")
        tracing.start()
        self._made = (made, dict(bridges), encoder, generator)

    def __serve_build_asgi_app__(self) -> Any:
        """Called by Ray once this is made."""
        settings, bridges, encoder, generator = self._made
        models = RayModels()
        models.attach(encoder, generator)
        return create_app(settings, bridges, models)


def build(arguments: dict[str, Any]) -> Application:
    """The whole service, for a Serve config: ``args`` are ``bridges`` {name: checkpoint} and ``settings``.

    Settings are those of the environment variables, as ``{"max_batch": 64}``; secrets are better in variables.
    """
    bridges, given = arguments.get("bridges") or {"builtin": "builtin"}, arguments.get("settings") or {}
    settings = Settings(**given)
    if settings.admin_port is not None:
        raise InvalidRequest("LW_ADMIN_PORT: Ray's proxies have one port; leave it out, and give keys")
    encoder, generator = halves(settings, bridges)
    front = serve.deployment(serve.ingress()(Front), name="Front", **_options(settings))
    return front.bind(encoder, generator, bridges, given)


def halves(settings: Settings, bridges: Mapping[str, str], code: str | None = None) -> tuple[Application, Application]:
    """The deployments that hold models. Replicas of the same ``code`` stay where one is deployed again.

    Raises:
        InvalidRequest: There are tasks to evaluate.
    """
    if settings.tasks:
        raise InvalidRequest("LW_TASKS: evaluations do not run on Ray; measure a bridge with latentwire evaluate")
    usual = {name: field.get_default() for name, field in Settings.model_fields.items() if name not in THEIRS}
    theirs = settings.model_copy(update=usual).model_dump(mode="json")
    on: dict[str, Any] = {"num_cpus": settings.ray_cpus, "num_gpus": settings.ray_gpus}
    if not settings.ray_gpus:  # with none Ray hides none
        on["runtime_env"] = {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}
    made = []
    for kind, replicas in ((Encoder, settings.ray_encoders), (Generator, settings.ray_generators)):
        options = _options(settings) | {"num_replicas": replicas, "ray_actor_options": on}
        deployment = serve.deployment(kind, name=kind.__name__, **options)
        if code is not None:  # without one Ray takes each for another, save in a Serve config; its public name is gone
            said = json.dumps([code, theirs, dict(bridges)], sort_keys=True)
            deployment = deployment.options(version=hashlib.sha256(said.encode()).hexdigest(), _internal=True)
        made.append(deployment.bind(dict(bridges), theirs))
    return made[0], made[1]


def _options(settings: Settings) -> dict[str, Any]:
    """Of each deployment: admission alone limits, and what was admitted is answered before a replica ends."""
    return {
        "max_ongoing_requests": 4 * settings.max_queue + 100,
        "graceful_shutdown_timeout_s": settings.drain_delay + settings.drain_timeout,
    }


def application(settings: Settings, bridges: Mapping[str, str]) -> FastAPI:
    """The HTTP service of this process, over models on the cluster that RAY_ADDRESS names, or on one started here.

    They come up in the background. On a cluster that was there they stay when this process ends, for others.

    Raises:
        LatentWireError: A checkpoint cannot be read; nothing is deployed then.
        InvalidRequest: There is no such cluster, or none can be started.
    """
    models = RayModels()
    made = create_app(settings, bridges, models)
    models.attach(*_deployed(settings, bridges, made.state.runtime.bridges))
    return made


def _deployed(
    settings: Settings, checkpoints: Mapping[str, str], bridges: Mapping[str, Bridge]
) -> tuple[DeploymentHandle, DeploymentHandle]:
    code = [version("latentwire"), *(f"{name}={identity(bridge)}" for name, bridge in bridges.items())]
    made = halves(settings, checkpoints, "/".join(code))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # of a Ray started here: 15, Ray's own, starved beside other work
    address = os.environ.get("RAY_ADDRESS")
    try:
        ray.init(address or "local", include_dashboard=None if address else False, log_to_driver=False)
    except Exception as error:  # Ray has no error of its own for a node that cannot start, or be found
        raise InvalidRequest(f"--engine ray: {first_line(error)}") from None
    serve.start(proxy_location=ProxyLocation.Disabled)
    names = ("latentwire-encoder", "latentwire-generator")
    targets = [serve.RunTarget(half, name=name, route_prefix=None) for half, name in zip(made, names, strict=True)]
    encoder, generator = serve.run_many(targets, wait_for_applications_running=False)
    return encoder, generator
