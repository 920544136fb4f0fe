"""Callers of the service, who note what they met.

Closed loops (so many callers, each asks again when it has its answer) find what the service can do; open loops
(Poisson arrivals at a rate that waits for nobody) find how long callers wait. They speak through aiohttp, which leaves
the most of two cores to the service.
"""

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import aiohttp

PORT = 8124
JSON = {"content-type": "application/json"}


@dataclass
class Met:
    """Seconds by status, and the answers and their latents that came within the time that counts.

    Of the tokens of each answer as large a share counts as of its seconds: by those that end in time alone, a few long
    answers would make all the difference.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    tokens: float = 0.0
    rows: int = 0
    answers: int = 0
    wall_seconds: float = 0.0

    def counts(self) -> dict[str, int]:
        """How many answers had which status."""
        return {status: len(seconds) for status, seconds in sorted(self.seconds.items())}

    def quantiles_ms(self, *statuses: str) -> dict[str, float]:
        """Median, 99th percentile and maximum over the answers of these statuses."""
        found = sorted(second for status in statuses for second in self.seconds.get(status, [])) or [0.0]
        at = {"p50": len(found) // 2, "p99": int(0.99 * len(found)), "max": len(found) - 1}
        return {name: found[place] * 1000 for name, place in at.items()}

    @property
    def tokens_per_second(self) -> float:
        """Tokens of answers, by the time that counts."""
        return self.tokens / self.wall_seconds


def connect() -> aiohttp.ClientSession:
    """As many connections as it takes, each kept for the next caller."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)
    return aiohttp.ClientSession(
        f"http://127.0.0.1:{PORT}", connector=connector, timeout=aiohttp.ClientTimeout(total=120)
    )


async def ask(session: aiohttp.ClientSession, path: str, content: bytes, met: Met, begins: float, ends: float) -> None:
    """One request; as throughput counts what is answered between ``begins`` and ``ends``."""
    started = time.perf_counter()
    try:
        async with session.post(path, data=content, headers=JSON) as response:
            body, status = await response.read(), str(response.status)
    except (aiohttp.ClientError, TimeoutError) as error:
        body, status = b"", type(error).__name__
    now = time.perf_counter()
    met.seconds.setdefault(status, []).append(now - started)
    if status == "200" and body.startswith(b"{"):  # a stream is only timed
        answer: dict[str, Any] = json.loads(body)
        usage, within = answer["usage"], max(0.0, min(now, ends) - max(started, begins))
        tokens = usage.get("generated_tokens", usage.get("completion_tokens", 0))  # ours, or as OpenAI says it
        met.tokens += tokens * within / (now - started)
        if begins <= now <= ends:
            met.answers += 1
            met.rows += len(answer.get("latents", ()))


async def closed_loop(path: str, asked: Sequence[dict[str, Any]], callers: int, seconds: float, warm: float) -> Met:
    """So many callers, each with its next request as soon as it has an answer; the first ``warm`` seconds pass by."""
    content, met = cycle([json.dumps(body).encode() for body in asked]), Met(wall_seconds=seconds)
    begins = time.perf_counter() + warm
    async with connect() as session:

        async def caller() -> None:
            while time.perf_counter() < begins + seconds:
                await ask(session, path, next(content), met, begins, begins + seconds)

        await asyncio.gather(*(caller() for _ in range(callers)))
    return met


async def open_loop(path: str, asked: Sequence[dict[str, Any]], per_second: float, seconds: float, warm: float) -> Met:
    """Requests arrive at random, so many per second on average, whoever still waits."""
    content, rng = cycle([json.dumps(body).encode() for body in asked]), random.Random(1)
    met = Met(wall_seconds=seconds - warm)
    async with connect() as session:
        started = due = time.perf_counter()
        async with asyncio.TaskGroup() as arrivals:
            while due < started + seconds:
                due += rng.expovariate(per_second)
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                arrivals.create_task(ask(session, path, next(content), met, started + warm, started + seconds))
    return met
