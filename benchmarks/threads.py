"""How many threads models should compute with beside HTTP: ``python -m benchmarks.threads``.

A service for one thread, for half as many as there are cores, and for as many, asked in turns by the same callers on
the same cores. What ``serve`` chooses by itself is ``bridge.devices.use_threads``.
"""

import os
import statistics
from pathlib import Path

import typer

from benchmarks.record import command_of, record
from benchmarks.scaled import in_turns
from latentwire.service.cli.signals import ended_by_signals


@ended_by_signals()
def main(callers: int = 8, seconds: float = 8.0, rounds: int = 3, model: str = "") -> None:
    """Ask each service ROUNDS times for SECONDS, and record answers a second and one caller's latency; of the built-in
    bridge, or of an untrained one to the receiver MODEL."""
    cores = os.cpu_count() or 1
    services = {f"{count}": {"LW_THREADS": f"{count}"} for count in sorted({1, max(1, cores // 2), cores})}
    found = in_turns(services, callers, seconds, rounds, model)
    by_measure = {what: {name: one[what] for name, one in found.items()} for what in ("per_second", "alone_ms")}
    short = Path(model).name
    record(
        f"threads-{short}" if model else "threads",
        command_of("threads", callers=callers, seconds=seconds, rounds=rounds, model=short),
        {
            **{what: {name: statistics.median(all) for name, all in of.items()} for what, of in by_measure.items()},
            "all_rounds": by_measure,
        },
    )


if __name__ == "__main__":
    typer.run(main)
