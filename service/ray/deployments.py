"""Deployments of Ray Serve: ``Encoder`` and ``Generator``, which scale separately, and ``Front``, the HTTP service.

``latentwire serve --engine ray`` deploys the first two and answers HTTP itself; a Serve config (deploy/ray) has all
three. A configuration of a deployment there (replicas, GPUs, autoscaling) goes over what stands here.
"""

import os
from collections.abc import Mapping
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import ProxyLocation

from latentwire.bridge.errors import InvalidRequest, first_line
from latentwire.service.app import create_app
from latentwire.service.auth.guard import check_binding
from latentwire.service.ray.remote import RayModels
from latentwire.service.ray.replicas import Encoder, Generator
from latentwire.service.settings import Settings

# What answers HTTP has, and what runs models does not need: nothing secret goes to replicas.
NOT_THEIRS = (
    "api_keys_file", "api_keys", "signing_key", "redis_url", "store_dir", "jobs_dir", "corpus_dir", "tasks",
)  # fmt: skip

EVERYWHERE = "0.0.0.0"  # where proxies listen, http_options say, which a replica does not see


class Front:
    """The HTTP service in a replica; Ray's proxies send it what they are asked."""

    def __init__(self, encoder: Any, generator: Any, bridges: Mapping[str, str], settings: Mapping[str, Any]) -> None:
        made = Settings(**settings)
        has_keys = made.api_keys_file is not None or made.api_keys is not None
        check_binding(EVERYWHERE, has_keys=has_keys, insecure=made.insecure)
        self._made = (made, dict(bridges), encoder, generator)

    def __serve_build_asgi_app__(self) -> Any:
        """Called by Ray once this is made."""
        settings, bridges, encoder, generator = self._made
        return create_app(settings, bridges, RayModels(encoder, generator, settings.stall_timeout))


def build(arguments: dict[str, Any]) -> Application:
    """The whole service, for a Serve config: ``args`` are ``bridges`` {name: checkpoint} and ``settings``.

    Settings are those of the environment variables, as ``{"max_batch": 64}``; secrets are better in variables.
    """
    bridges, given = arguments.get("bridges") or {"builtin": "builtin"}, arguments.get("settings") or {}
    settings = Settings(**given)
    encoder, generator = halves(settings, bridges)
    front = serve.deployment(serve.ingress()(Front), name="Front", max_ongoing_requests=settings.max_queue)
    return front.bind(encoder, generator, bridges, given)


def halves(settings: Settings, bridges: Mapping[str, str]) -> tuple[Application, Application]:
    """The deployments that hold models."""
    theirs = settings.model_copy(update=dict.fromkeys(NOT_THEIRS) | {"tasks": {}}).model_dump(mode="json")
    made = []
    for kind, replicas in ((Encoder, settings.ray_encoders), (Generator, settings.ray_generators)):
        deployment = serve.deployment(
            kind,
            name=kind.__name__,
            num_replicas=replicas,
            max_ongoing_requests=settings.max_queue,  # batches are made of those that wait in a replica
            graceful_shutdown_timeout_s=settings.drain_timeout,
            ray_actor_options={"num_cpus": settings.ray_cpus, "num_gpus": settings.ray_gpus},
        )
        made.append(deployment.bind(dict(bridges), theirs))
    return made[0], made[1]


def deployed(settings: Settings, bridges: Mapping[str, str]) -> RayModels:
    """Deploy what holds models, on the cluster that RAY_ADDRESS names or on one that is started here.

    It comes up in the background. On a cluster that was there it stays when this process ends, for others.

    Raises:
        InvalidRequest: There is no such cluster, or none can be started.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get("RAY_ADDRESS")
    try:
        ray.init(address or "local", include_dashboard=None if address else False, log_to_driver=False)
    except Exception as error:  # Ray has no error of its own for a node that cannot start, or be found
        raise InvalidRequest(f"--engine ray: {first_line(error)}") from None
    serve.start(proxy_location=ProxyLocation.Disabled)
    names = ("latentwire-encoder", "latentwire-generator")
    targets = [
        serve.RunTarget(half, name=name, route_prefix=None)
        for half, name in zip(halves(settings, bridges), names, strict=True)
    ]
    encoder, generator = serve.run_many(targets, wait_for_applications_running=False)
    return RayModels(encoder, generator, settings.stall_timeout)
