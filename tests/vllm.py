"""A real vLLM on the CPU, and what it once answered: a server that records, and afterwards answers the same.

``make test-vllm`` runs the tests against the real one; ``RECORD=1 make test-vllm`` also writes down its answers, with
which the ordinary suite goes on.
"""

import base64
import io
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import torch

from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / ".venv/vllm/bin/python"  # Makefile
START_SECONDS = 300.0
NEAR = 2e-3  # of the largest number, between embeddings of two machines
EMBEDS, SALT = "prompt_embeds", "cache_salt"


@contextmanager
def real_server(model: Path, log: Path, *flags: str) -> Iterator[tuple[str, int]]:
    """A vLLM of a model folder until the block ends: its URL, and the group of its processes."""
    port = free_port()
    command = [
        str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "llama",
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager",
        "--generation-config", "vllm", *flags,
    ]  # fmt: skip
    quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {**quiet, "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as out:
        server = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True, cwd=log.parent
        )
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
    try:
        while True:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        yield url, server.pid
    finally:
        with suppress(ProcessLookupError):  # killed in a test
            os.killpg(server.pid, signal.SIGTERM)  # its engine is a process of its own
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def written(body: dict[str, Any]) -> dict[str, Any]:
    """A request as it is recorded: embeddings by the first number of each, the digest of all as that there was one."""
    if EMBEDS not in body:
        return body
    embeds = torch.load(io.BytesIO(base64.b64decode(body[EMBEDS])), weights_only=True)
    column = [float(f"{number:.4g}") for number in embeds[:, 0].tolist()]
    return {**body, EMBEDS: {"width": embeds.shape[1], "column": column}, SALT: bool(body[SALT])}


def alike(asked: dict[str, Any] | None, recorded: dict[str, Any] | None) -> bool:
    """Whether two requests are the same, but for rounding."""
    if not asked or not recorded or EMBEDS not in asked or EMBEDS not in recorded:
        return asked == recorded
    ours, theirs = asked[EMBEDS], recorded[EMBEDS]
    if asked | {EMBEDS: 0} != recorded | {EMBEDS: 0} or ours["width"] != theirs["width"]:
        return False
    most = NEAR * max(map(abs, theirs["column"]))
    return len(ours["column"]) == len(theirs["column"]) and all(
        abs(a - b) <= most for a, b in zip(ours["column"], theirs["column"], strict=True)
    )


class Tape(ThreadingHTTPServer):
    """Stands before a vLLM, and records it; or in its place, and answers what it answered.

    Attributes:
        exchanges: What was asked and answered.
        asked: Bodies of the completions asked so far, as they are recorded.
        cut_after: Of these next completions, the connection ends after so many events.
        refuse: So many next requests get 503, as from a proxy whose server is away.
        held: While clear, nothing is answered.
        pause: Seconds between the events of a stream.
    """

    daemon_threads = True

    def __init__(self, exchanges: list[dict[str, Any]], upstream: str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Passing)
        self.exchanges, self.upstream = exchanges, upstream
        self.asked: list[dict[str, Any]] = []
        self.cut_after: list[int] = []
        self.refuse = 0
        self.held = threading.Event()
        self.held.set()
        self.pause = 0.0
        self.url = f"http://127.0.0.1:{self.server_port}"
        self._serving = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        self._serving.start()

    def rewind(self) -> None:
        """As it was at first, but for what was recorded."""
        self.asked.clear()
        self.cut_after.clear()
        self.refuse, self.pause = 0, 0.0
        self.held.set()

    def stop(self) -> None:
        """Answer nobody any more."""
        self.held.set()
        self.shutdown()
        self.server_close()
        self._serving.join()

    def answer(self, method: str, path: str, raw: bytes) -> dict[str, Any]:
        """The recorded answer; recorded now where there is a server."""
        body = json.loads(raw) if raw else None
        asked = None if body is None else written(body)
        if asked is not None:
            self.asked.append(asked)
        known = [e for e in self.exchanges if e["path"] == path and alike(asked, e["asked"])]
        if known:
            return known[0]
        if self.upstream is None:
            return {"status": 404, "type": "text/plain", "answer": f"not recorded: {asked}"}
        told = httpx.request(
            method, self.upstream + path, content=raw or None, timeout=60, trust_env=False,
            headers={"content-type": "application/json"},
        )  # fmt: skip
        made = {
            "path": path, "asked": asked, "status": told.status_code, "type": told.headers["content-type"],
            "answer": told.text,
        }  # fmt: skip
        self.exchanges.append(made)
        return made


class _Passing(BaseHTTPRequestHandler):
    server: Tape

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the terminal."""

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        raw = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.server.refuse:
            self.server.refuse -= 1
            self.send_error(503)
            return
        told = self.server.answer(self.command, self.path, raw)
        self.server.held.wait(60)
        self.send_response(told["status"])
        self.send_header("content-type", told["type"])
        self.end_headers()
        events = [event + "\n\n" for event in told["answer"].split("\n\n") if event]
        if "event-stream" not in told["type"]:
            events = [told["answer"]]
        elif self.server.cut_after:
            events = events[: self.server.cut_after.pop(0)]
        for event in events:
            self.wfile.write(event.encode())
            self.wfile.flush()
            time.sleep(self.server.pause)
