"""The service against a stock one: ``transformers serve`` with continuous batching, the same receiver and texts.

Both are asked through ``/v1/completions``, greedily, with limits of 8 to 128 tokens, by 1, 8 and 32 callers at once on
the same cores; sides take turns. No latent is involved: what is compared is the way from a request to its tokens. The
other's cache and steps get the sizes of ours: left to itself it fills a machine's memory with a cache.
"""

import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import typer

from benchmarks import callers
from benchmarks.callers import Met, closed_loop
from benchmarks.direct import ONE_CORE, ROWS, questions
from benchmarks.record import record
from latentwire.bridge.models import folder_of
from latentwire.service.cli.demo import running

CALLERS = (1, 8, 32)
START_SECONDS = 120.0
PORTS = {"latentwire": 8126, "transformers": 8127}


@contextmanager
def stock(model: Path, port: int, log: Path) -> Iterator[None]:
    """``transformers serve`` of a model, as fast as its flags make it on a CPU."""
    command = [
        str(Path(sys.executable).with_name("transformers")), "serve", str(model), "--continuous-batching", "--device",
        "cpu", "--dtype", "float32", "--port", str(port), "--attn-implementation", "sdpa", "--log-level", "error",
        "--cb-block-size", "32", "--cb-num-blocks", "256", "--cb-max-batch-tokens", "512",  # as ours by default
    ]  # fmt: skip
    with log.open("wb") as out:
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **ONE_CORE})
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            if server.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"transformers serve did not start: {log.read_text()[-2000:]}")
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.2)
        yield
    finally:
        server.terminate()
        server.wait()


def bodies(model: str, **more: Any) -> list[dict[str, Any]]:
    """The questions of ``benchmarks.direct`` without their latents."""
    return [
        {"model": model, "prompt": one.prompt, "max_tokens": one.params.max_tokens, "temperature": 0, **more}
        for one in questions(256)
    ]


def ask(side: str, asked: list[dict[str, Any]], count: int, seconds: float) -> Met:
    callers.PORT = PORTS[side]
    return asyncio.run(closed_loop("/v1/completions", asked, count, seconds, warm=seconds / 3))


def main(seconds: float = 8.0, rounds: int = 5) -> None:
    """Measure ROUNDS of both sides at each number of callers, and record them."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        model = folder / "llama"
        shutil.copytree(folder_of("builtin:llama"), model)
        asked = {
            "latentwire": bodies("demo", condition="none"),
            "transformers": bodies(str(model)),
        }
        with (
            running("builtin", PORTS["latentwire"], folder / "ours", **ONE_CORE, LW_MAX_BATCH=str(ROWS)),
            stock(model, PORTS["transformers"], folder / "theirs"),
        ):
            for count in CALLERS:
                met: dict[str, list[Met]] = {side: [] for side in PORTS}
                for _ in range(rounds):
                    for side in PORTS:
                        met[side].append(ask(side, asked[side], count, seconds))
                rates = {side: [one.tokens_per_second for one in each] for side, each in met.items()}
                found[str(count)] = {
                    "tokens_per_second": rates,
                    "ms": {side: [one.quantiles_ms("200") for one in each] for side, each in met.items()},
                    "statuses": {side: [one.counts() for one in each] for side, each in met.items()},
                    "tokens_ratio": statistics.median(
                        ours / theirs for ours, theirs in zip(*rates.values(), strict=True)
                    ),
                    "p99_ratio": statistics.median(
                        ours.quantiles_ms("200")["p99"] / theirs.quantiles_ms("200")["p99"]
                        for ours, theirs in zip(*met.values(), strict=True)
                    ),
                }
                print(json.dumps({count: found[str(count)]}), flush=True)
    record("stock", f"python -m benchmarks.stock --seconds {seconds:g} --rounds {rounds}", {"callers": found})


if __name__ == "__main__":
    typer.run(main)
