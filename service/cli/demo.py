"""The last act of ``latentwire demo``: a real server, a real request to each endpoint, printed."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from rich.console import Console

from latentwire.bridge.errors import InferenceFailed
from latentwire.service.cli.server import listen
from latentwire.service.client.client import Client

if TYPE_CHECKING:
    from latentwire.bridge.evaluation.tasks import Example

START_SECONDS = 120.0
END_SECONDS = 30.0
ANSWER_SECONDS = 60.0
SHOWN_CHARACTERS = 24  # of a message
PLAIN: dict[str, Any] = {"highlight": False, "soft_wrap": True}


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

    ``variables`` are added to its environment. Its own log says when it is ready: another may answer on the port.

    Raises:
        InferenceFailed: It ended, or was not ready in time; the last line it printed is named.
    """
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "latentwire", "serve", "--bridge", f"demo={checkpoint}", "--port", str(port)]
    with log.open("wb") as out:
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **variables})
    try:
        with Client(url, trust_env=False) as client:
            deadline = time.monotonic() + START_SECONDS
            while server.poll() is not None or url not in log.read_text() or not client.ready():
                if server.poll() is not None or time.monotonic() > deadline:
                    last = (log.read_text().strip().splitlines() or ["nothing"])[-1]
                    raise InferenceFailed(f"the service did not start; it said: {last}")
                time.sleep(0.1)
        yield server
    finally:
        server.terminate()
        try:
            server.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def ask(console: Console, port: int, example: "Example") -> None:
    """Send one ``/encode`` and one ``/generate``, and print the answers as they came, with their latencies.

    Raises:
        InferenceFailed: The service refused or failed; its answer is in the message.
    """
    from latentwire.bridge.prompt import LATENT

    prompt = example.prompt.replace(LATENT, "").lstrip("\n")
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=ANSWER_SECONDS) as http:
        _post(http, "/generate", inputs=[{"text": example.source}], prompt=prompt)  # the first of a connection warms it
        encoded, encode_ms = _post(http, "/encode", inputs=[example.source])
        (latent,) = encoded["latents"]
        response, generate_ms = _post(http, "/generate", inputs=[{"latent": latent["data"]}], prompt=prompt)
    (output,) = response["outputs"]
    console.print("\n[bold]POST /encode[/bold] — the sender reads", f"[cyan]{example.source}[/cyan]", **PLAIN)
    _show(console, {**latent, "data": latent["data"][:SHOWN_CHARACTERS] + "…"})
    console.print(f"  {encode_ms:.1f} ms")
    console.print("[bold]POST /generate[/bold] — the receiver gets that latent and", repr(prompt), **PLAIN)
    _show(console, output)
    console.print(f"  {generate_ms:.1f} ms; together {encode_ms + generate_ms:.1f} ms")
    right = output["text"].strip() == example.answer.strip()
    console.print(f"  expected {example.answer.strip()!r}: {'right' if right else 'wrong'}")


def _post(http: httpx.Client, path: str, **body: Any) -> tuple[dict[str, Any], float]:
    """An answer, and the milliseconds it took."""
    started = time.perf_counter()
    answer = http.post(path, json=body)
    if answer.is_error:
        raise InferenceFailed(f"{path} answered {answer.status_code}: {answer.text}")
    return answer.json(), (time.perf_counter() - started) * 1000


def _show(console: Console, answer: dict[str, Any]) -> None:
    console.print(f"  {json.dumps(answer, ensure_ascii=False)}", markup=False, **PLAIN)
