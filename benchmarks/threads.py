"""How many threads models should compute with beside HTTP: ``python -m benchmarks.threads``.

A service for one thread, for half as many as there are cores, and for as many, asked in turns by the same callers on
the same cores. What ``serve`` chooses by itself is ``bridge.devices.use_threads``.
"""

import os
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path

import typer

from benchmarks.record import command_of, record
from benchmarks.scaled import load
from benchmarks.stock import untrained
from latentwire.service.cli.demo import running
from latentwire.service.cli.signals import ended_by_signals

PORT = 8150


@ended_by_signals()
def main(callers: int = 8, seconds: float = 8.0, rounds: int = 3, model: str = "") -> None:
    """Ask each service ROUNDS times for SECONDS, and record answers a second and one caller's latency; of the built-in
    bridge, or of an untrained one to the receiver MODEL."""
    cores = os.cpu_count() or 1
    counts = sorted({1, max(1, cores // 2), cores})
    per_second: dict[int, list[float]] = {count: [] for count in counts}
    alone_ms: dict[int, list[float]] = {count: [] for count in counts}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
        bridge = str(untrained(model, Path(folder) / "bridge")) if model else "builtin"
        for count in counts:
            place = Path(folder) / f"{count}"
            opened.enter_context(running(bridge, PORT + count, place, LW_THREADS=str(count)))
            load(f"http://127.0.0.1:{PORT + count}", callers, 2.0)
        for _ in range(rounds):
            for count in counts:
                url = f"http://127.0.0.1:{PORT + count}"
                per_second[count].append(len(load(url, callers, seconds)) / seconds)
                alone_ms[count].append(statistics.median(load(url, 1, seconds / 2)) * 1000)
    short = Path(model).name
    record(
        f"threads-{short}" if model else "threads",
        command_of("threads", callers=callers, seconds=seconds, rounds=rounds, model=short),
        {
            "per_second": {count: statistics.median(every) for count, every in per_second.items()},
            "alone_ms": {count: statistics.median(every) for count, every in alone_ms.items()},
            "all_rounds": {"per_second": per_second, "alone_ms": alone_ms},
        },
    )


if __name__ == "__main__":
    typer.run(main)
