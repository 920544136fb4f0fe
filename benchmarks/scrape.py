"""What Prometheus costs a service under load: ``python -m benchmarks.scrape``.

A scrape is timed while callers keep the service full, and its work is counted: the CPU time that the processes of an
idle service take for many scrapes. Throughput with a scrape each second and without takes turns, window by window.
"""

import asyncio
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import psutil
import torch
import typer

from benchmarks.callers import PORT, closed_loop
from benchmarks.direct import CALLERS, bodies, warm_up
from benchmarks.record import command_of, record
from benchmarks.serve import ratio, serving

INTERVAL_SECONDS = 1.0
USUAL_SECONDS = 10.0  # between scrapes in deploy/prometheus/prometheus.yml


@contextmanager
def scraped(took: list[float], sizes: list[int]) -> Iterator[None]:
    """Scrape once a second inside; seconds and bytes of each are added."""
    over = threading.Event()

    def scrape() -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{PORT}", trust_env=False) as client:
            while not over.wait(INTERVAL_SECONDS):
                started = time.perf_counter()
                answer = client.get("/metrics").raise_for_status()
                took.append(time.perf_counter() - started)
                sizes.append(len(answer.content))

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def cpu_seconds(pid: int) -> float:
    """CPU time that a service's processes have taken so far."""
    parent = psutil.Process(pid)
    return sum(sum(process.cpu_times()[:2]) for process in (parent, *parent.children()))


def work(pid: int, scrapes: int) -> tuple[float, list[float]]:
    """CPU seconds of one scrape of an idle service, over many, and how long each took."""
    took: list[float] = []
    with httpx.Client(base_url=f"http://127.0.0.1:{PORT}", trust_env=False) as client:
        started, before = time.perf_counter(), cpu_seconds(pid)
        for _ in range(scrapes):
            at = time.perf_counter()
            client.get("/metrics").raise_for_status()
            took.append(time.perf_counter() - at)
        busy, seconds = cpu_seconds(pid) - before, time.perf_counter() - started
        time.sleep(seconds)  # what an idle service takes in the same time is not the scrapes' work
        idle = cpu_seconds(pid) - before - busy
    return (busy - idle) / scrapes, took


def milliseconds(took: list[float]) -> dict[str, float]:
    """Quantiles of seconds."""
    cuts = statistics.quantiles(took, n=20, method="inclusive")
    return {"p50": 1000 * statistics.median(took), "p95": 1000 * cuts[-1], "max": 1000 * max(took)}


def main(seconds: float = 10.0, rounds: int = 4, scrapes: int = 200) -> None:
    """Measure and record."""
    torch.set_num_threads(1)
    asked = bodies(256)
    took, sizes = list[float](), list[int]()
    found: dict[str, list[float]] = {"without": [], "with": []}

    def tokens_per_second() -> float:
        return asyncio.run(closed_loop("/generate", asked, CALLERS, seconds, warm_up(seconds))).tokens_per_second

    with serving() as pid:
        for _ in range(rounds):
            found["without"].append(tokens_per_second())
            with scraped(took, sizes):
                found["with"].append(tokens_per_second())
        each, idle = work(pid, scrapes)
    figures: dict[str, Any] = {
        "callers": CALLERS,
        "bytes": max(sizes),
        "under_load_ms": milliseconds(took),
        "idle_ms": milliseconds(idle),
        "cpu_ms_per_scrape": 1000 * each,
        "share_of_a_core_every_10_s": each / USUAL_SECONDS,
        "tokens_per_second": found,
        "throughput_with_a_scrape_each_second": ratio(found["with"], found["without"]),
    }
    record("scrape", command_of("scrape", seconds=seconds, rounds=rounds, scrapes=scrapes), figures)


if __name__ == "__main__":
    typer.run(main)
