"""The service by itself: from start to ready, one example end to end, and what a client imports.

Asked: ready within 10 s on the built-in bridge; /encode and /generate of one example together under 100 ms once
warm; ``service.client.client`` and ``bridge.errors`` without torch.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import typer

from benchmarks.record import record
from latentwire.bridge.evaluation.tasks import world_task
from latentwire.service.cli.demo import running
from latentwire.service.client.client import Client

PORT = 8123
IMPORT = (
    "import sys, time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t, 'torch' in sys.modules)"
)


def main(rounds: int = 100) -> None:
    """Start a service of the built-in bridge, ask it ROUNDS examples one after the other, and record the times."""
    examples = world_task().test
    encode_ms, generate_ms, right = [], [], 0
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        with running("builtin", PORT, Path(folder) / "log"), Client(f"http://127.0.0.1:{PORT}") as client:
            ready_seconds = time.perf_counter() - started
            for number in range(rounds + 5):
                example = examples[number]
                began = time.perf_counter()
                latent = client.encode(example.source).latents[0]
                encoded = time.perf_counter()
                said = client.generate(latent, example.prompt, max_tokens=24).texts[0]
                done = time.perf_counter()
                if number >= 5:
                    encode_ms.append((encoded - began) * 1000)
                    generate_ms.append((done - encoded) * 1000)
                    right += said.strip() == example.answer.strip()
    imports = {}
    for module in ("latentwire.service.client.client", "latentwire.bridge.errors", "latentwire.bridge.wire"):
        run = subprocess.run(
            [sys.executable, "-c", IMPORT.format(module=module)], capture_output=True, text=True, check=True
        )
        seconds, torch = run.stdout.split()
        imports[module] = {"seconds": float(seconds), "imports_torch": torch == "True"}
    together = [a + b for a, b in zip(encode_ms, generate_ms, strict=True)]
    record(
        "service",
        f"python -m benchmarks.service --rounds {rounds}",
        {
            "start_to_ready_seconds": ready_seconds,
            "encode_ms_median": statistics.median(encode_ms),
            "generate_ms_median": statistics.median(generate_ms),
            "together_ms_median": statistics.median(together),
            "together_ms_p95": statistics.quantiles(together, n=20)[-1],
            "answers_right": right / rounds,
            "imports": imports,
        },
    )


if __name__ == "__main__":
    typer.run(main)
