"""``latentwire serve``."""

import logging
import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentwire.bridge.errors import InvalidRequest
from latentwire.service.cli.logs import configure
from latentwire.service.cli.signals import ended_by_signals
from latentwire.service.health import written_down

if TYPE_CHECKING:
    from fastapi import FastAPI

    from latentwire.service.settings import Settings

log = logging.getLogger(__name__)


@ended_by_signals()
def serve(
    bridge: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help=r"A bridge to serve; repeat for several. \[default: builtin]"),
    ] = None,
    host: Annotated[str | None, typer.Option(help=r"Name or address to listen on. \[default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help=r"Port to listen on. \[default: 8000]")] = None,
    root_path: Annotated[
        str | None, typer.Option(help="Path that a proxy in front leaves before every address, e.g. /lw.")
    ] = None,
    insecure: Annotated[
        bool | None, typer.Option("--insecure", help="Listen beyond this machine without asking anyone for a key.")
    ] = None,
    corpus: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder of corpora (NAME.lw), whose latents are served.")
    ] = None,
    receiver: Annotated[
        str | None,
        typer.Option(
            metavar="vllm:URL",
            help="Let receivers answer on a vLLM server, vllm:http://HOST:PORT; or NAME=vllm:… for one of several.",
        ),
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help=r"Where models run: local, or ray (encoders and generators on Ray). \[local]")
    ] = None,
    memory_budget: Annotated[
        str | None, typer.Option(help="Most bytes of weights in memory, e.g. 24GB; models take turns within it.")
    ] = None,
) -> None:
    """Serve bridges over HTTP. Every other setting is an LW_* environment variable (see the guide: Serving)."""
    from pydantic import ValidationError

    from latentwire.bridge.devices import use_threads
    from latentwire.service import tracing
    from latentwire.service.app import create_app
    from latentwire.service.auth.guard import check_binding
    from latentwire.service.cli.server import listen, url
    from latentwire.service.cli.server import serve as run
    from latentwire.service.inference.runtime import Runtime
    from latentwire.service.processes.answering import answer
    from latentwire.service.processes.supervisor import OPENED, READY, Supervisor
    from latentwire.service.settings import Settings, service_links

    flags: dict[str, Any] = {
        "host": host, "port": port, "root_path": root_path, "insecure": insecure, "memory_budget": memory_budget,
        "receiver": receiver, "engine": engine,
        "corpus_dir": corpus,
    }  # fmt: skip
    try:
        settings = Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        got = "" if isinstance(first["input"], dict) or where == "redis_url" else f", got {first['input']!r}"
        raise InvalidRequest(f"{where + ': ' if where else ''}{first['msg']}{got}") from None
    # Requests bring few texts at a time: the tokenizer's own threads would only take turns with the model's.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    has_keys = settings.api_keys_file is not None or settings.api_keys is not None  # empty ones are refused below
    check_binding(settings.host, has_keys=has_keys, insecure=settings.insecure)
    bridges = _named(bridge or ["builtin=builtin"])
    listeners = listen(settings.host, settings.port)
    operators = [] if settings.admin_port is None else listen(settings.host, settings.admin_port)
    configure("info", console=sys.stderr, as_json=settings.log_format == "json")
    if links := service_links():
        log.warning("left aside, as links to a Service of Kubernetes (enableServiceLinks: false): %s", ", ".join(links))
    with ExitStack() as opened:
        for listener in (*listeners, *operators):
            opened.enter_context(listener)
        opened.enter_context(written_down(listeners[0]))
        supervisor = None
        if settings.engine == "local" and settings.frontends:
            supervisor = Supervisor(settings.frontends, settings.drain_delay + settings.drain_timeout, opened.close)
            if supervisor.run() == "models":
                opened.close()  # a port is free when nobody answers on it any more
                use_threads(settings.threads)  # here alone: threads of a process that forks do not come along
                runtime = Runtime(
                    settings.model_copy(update=dict.fromkeys(("corpus_dir", "api_keys_file", "api_keys"))), bridges
                )
                supervisor.note(OPENED)
                on_ready = partial(supervisor.note, READY)
                sys.exit(answer(runtime, supervisor.listener, supervisor.door.secret, on_ready))
            supervisor.wait_turn()
        elif settings.engine == "local":
            use_threads(settings.threads)
        opened.callback(tracing.start())
        others = (None, None) if supervisor is None else (supervisor.door, supervisor.peers)
        application = _on_ray(settings, bridges) if settings.engine == "ray" else create_app(settings, bridges, *others)
        if operators:
            application.state.runtime.admin_port = operators[0].getsockname()[1]
        shown = url(settings.host, listeners[0].getsockname()[1]) + settings.root_path
        if supervisor is None or supervisor.is_first:  # for all that answer here
            typer.echo(f"LatentWire listens on {shown} (page: {shown}/, reference: {shown}/docs)")
        on_started = None if supervisor is None else partial(supervisor.note, READY)
        sys.exit(run(application, [*listeners, *operators], on_started))


def _on_ray(settings: "Settings", bridges: Mapping[str, str]) -> "FastAPI":
    """The application over replicas on Ray, which are on their way."""
    try:
        from latentwire.service.ray.deployments import application
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise InvalidRequest("--engine ray: ray is not installed; pip install 'latentwire[ray]'") from None
    return application(settings, bridges)


def _named(bridges: list[str]) -> dict[str, str]:
    named: dict[str, str] = {}
    for item in bridges:
        name, _, path = item.partition("=")
        if not name or not path or name in named:
            raise InvalidRequest(f"--bridge {item!r}: expected NAME=PATH with a name of its own", param="bridge")
        named[name] = path
    return named
