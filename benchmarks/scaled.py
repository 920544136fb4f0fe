"""Models on Ray: what a replica costs beside the plain service, and what a second one brings.

Asked: two replicas answer 1.8 times as many requests as one where cores allow, else a replica loses at most
a tenth. The same callers ask, in turns: the plain service (two processes), one generator on Ray, two generators on Ray;
and one caller alone, for the time that Ray adds to a request. All models compute with one thread, as Ray's by default.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import typer

from benchmarks.record import command_of, record
from benchmarks.stock import untrained
from latentwire.bridge.evaluation.tasks import world_task
from latentwire.service.cli.demo import running
from latentwire.service.cli.signals import ended_by_signals

PORT = 8140
ONE = {"LW_THREADS": "1"}
ON_RAY = {**ONE, "LW_ENGINE": "ray", "LW_RAY_CPUS": "0.1", "RAY_worker_niceness": "0"}
SERVICES: Mapping[str, Mapping[str, str]] = {
    "plain": ONE,
    "one_generator": {**ON_RAY, "LW_RAY_GENERATORS": "1"},
    "two_generators": {**ON_RAY, "LW_RAY_GENERATORS": "2"},
}


def in_turns(
    services: Mapping[str, Mapping[str, str]], callers: int, seconds: float, rounds: int, model: str
) -> dict[str, dict[str, list[float]]]:
    """Of services {name: variables}, by round: answers a second to CALLERS, and milliseconds that one alone waits."""
    found: dict[str, dict[str, list[float]]] = {name: {"per_second": [], "alone_ms": []} for name in services}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
        urls, bridge = {}, str(untrained(model, Path(folder) / "bridge")) if model else "builtin"
        for port, (name, variables) in enumerate(services.items(), PORT):
            opened.enter_context(running(bridge, port, Path(folder) / name, **variables))
            urls[name] = f"http://127.0.0.1:{port}"
            load(urls[name], callers, 2.0)
        for _ in range(rounds):
            for name, url in urls.items():
                found[name]["per_second"].append(len(load(url, callers, seconds)) / seconds)
                found[name]["alone_ms"].append(statistics.median(load(url, 1, seconds / 4)) * 1000)
    return found


@ended_by_signals()
def main(callers: int = 16, seconds: float = 8.0, rounds: int = 3, model: str = "") -> None:
    """Ask each service in turns, ROUNDS times for SECONDS, and record answers a second and one caller's latency; of the
    built-in bridge, or of an untrained one to the receiver MODEL."""
    found = in_turns(SERVICES, callers, seconds, rounds, model)
    median = {name: {what: statistics.median(all) for what, all in one.items()} for name, one in found.items()}
    per_second = {name: one["per_second"] for name, one in median.items()}
    short = Path(model).name
    record(
        f"scaled-{short}" if model else "scaled",
        command_of("scaled", callers=callers, seconds=seconds, rounds=rounds, model=short),
        {
            "cores": os.cpu_count(),
            "services": median,
            "all_rounds": found,
            "one_generator_to_plain": per_second["one_generator"] / per_second["plain"],
            "two_generators_to_one": per_second["two_generators"] / per_second["one_generator"],
            "ray_adds_ms": median["one_generator"]["alone_ms"] - median["plain"]["alone_ms"],
        },
    )


def load(url: str, callers: int, seconds: float) -> list[float]:
    """Ask for so long, each answer of a source that nobody asked before; the seconds that each request took."""
    took: list[float] = []
    until = time.monotonic() + seconds

    def call() -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            while time.monotonic() < until:
                example, number = EXAMPLES[next(NUMBERS) % len(EXAMPLES)], next(NUMBERS)
                body: dict[str, Any] = {
                    "inputs": [{"text": f"{example.source} {number}"}], "prompt": example.prompt, "max_tokens": 24,
                    "temperature": 1.0, "seed": number,
                }  # fmt: skip
                began = time.monotonic()
                client.post("/generate", json=body).raise_for_status()
                took.append(time.monotonic() - began)

    with ThreadPoolExecutor(callers) as pool:
        for asked in [pool.submit(call) for _ in range(callers)]:
            asked.result()  # a caller who was refused ends the run
    return took


EXAMPLES, NUMBERS = world_task().test, count()

if __name__ == "__main__":
    typer.run(main)
