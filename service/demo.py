"""The last act of ``latentwire demo``: a real server, a real request to each endpoint, printed."""

import base64
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import ParamSpec, TypeVar

from rich.console import Console

from bridge.errors import InferenceFailed
from bridge.evaluation.tasks import Example
from bridge.prompt import LATENT
from service.client import Client
from service.listening import listen

START_SECONDS = 120.0
P = ParamSpec("P")
Answer = TypeVar("Answer")


def check_free(port: int) -> None:
    """Refuse before the work what could not be served after it.

    Raises:
        InvalidRequest: Something listens on the port already.
    """
    for listener in listen("127.0.0.1", port):
        listener.close()


@contextmanager
def running(checkpoint: Path | str, port: int, log: Path, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """``latentwire serve`` as a process of its own, its output in ``log``; ended on the way out.

    ``variables`` are added to its environment.

    Raises:
        InferenceFailed: It ended, or was not ready in time; the last line it printed is named.
    """
    command = [sys.executable, "-m", "service", "serve", "--bridge", f"demo={checkpoint}", "--port", str(port)]
    with log.open("wb") as out:
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **variables})
    try:
        with Client(f"http://127.0.0.1:{port}", trust_env=False) as client:
            deadline = time.monotonic() + START_SECONDS
            while server.poll() is not None or not client.ready():
                if server.poll() is not None or time.monotonic() > deadline:
                    last = (log.read_text().strip().splitlines() or ["nothing"])[-1]
                    raise InferenceFailed(f"the service did not start; it said: {last}")
                time.sleep(0.1)
        yield server
    finally:
        server.terminate()
        server.wait(timeout=30)


def ask(console: Console, port: int, example: Example) -> None:
    """Send one ``/encode`` and one ``/generate``, and print both with their latencies."""
    prompt = example.prompt.replace(LATENT, "").lstrip("\n")
    with Client(f"http://127.0.0.1:{port}", trust_env=False) as client:
        client.generate(example.source, prompt)  # the first request of a connection warms it up
        sent, encode_ms = _timed(client.encode, example.source)
        latent = sent.latents[0]
        said, generate_ms = _timed(client.generate, latent, prompt)
    shown = {**asdict(latent), "data": base64.b64encode(latent.data[:18]).decode() + "…"}
    output = said.outputs[0]
    console.print(
        "\n[bold]POST /encode[/bold] — the sender reads",
        f"[cyan]{example.source}[/cyan]",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"  {json.dumps(shown, ensure_ascii=False)}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"  {encode_ms:.1f} ms")
    console.print(
        "[bold]POST /generate[/bold] — the receiver gets that latent and", repr(prompt), highlight=False, soft_wrap=True
    )
    console.print(f"  {json.dumps(asdict(output), ensure_ascii=False)}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"  {generate_ms:.1f} ms; together {encode_ms + generate_ms:.1f} ms")
    right = output.text.strip() == example.answer.strip()
    console.print(f"  expected {example.answer.strip()!r}: {'right' if right else 'wrong'}")


def _timed(call: Callable[P, Answer], *given: P.args, **options: P.kwargs) -> tuple[Answer, float]:
    started = time.perf_counter()
    answer = call(*given, **options)
    return answer, (time.perf_counter() - started) * 1000
