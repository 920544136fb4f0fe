"""The service under load, against the same work done directly: ``python -m benchmarks.serve``.

The server is a process of its own, and so is every direct measurement (``benchmarks.direct``); the callers
(``benchmarks.callers``) run here. Work: the built-in pair, random prompts and latents, so that greedy answers run to
their limits of 8 to 128 tokens. Both sides have one core for the model, and take turns in each round.
"""

import asyncio
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import psutil
import torch
import typer

from benchmarks.callers import JSON, PORT, closed_loop, connect, open_loop
from benchmarks.direct import CALLERS, LENGTHS, ONE_CORE, ROWS, WORDS, bodies, directly, texts, warm_up
from benchmarks.record import record
from latentwire.service.cli.demo import running

REFUSED = ("429", "503")
SOON_SECONDS = 0.05  # within which whoever is refused should know


@contextmanager
def serving(**variables: str) -> Iterator[int]:
    """A server of the built-in bridge; its process id."""
    variables = {**ONE_CORE, "LW_MAX_BATCH": str(ROWS), **variables}
    with (
        tempfile.TemporaryDirectory() as folder,
        running("builtin", PORT, Path(folder) / "log", **variables) as server,
    ):
        yield server.pid


def saturation(seconds: float, rounds: int) -> dict[str, Any]:
    """Tokens per second over HTTP, of the engine called directly, and of static batches."""
    found: dict[str, list[float]] = {"engine": [], "http": [], "static": []}
    asked = bodies(256)
    with serving(), directly("continuous") as continuous, directly("static") as static:
        for _ in range(rounds):
            found["engine"].append(continuous(seconds)["tokens_per_second"])
            met = asyncio.run(closed_loop("/generate", asked, CALLERS, seconds, warm_up(seconds)))
            found["http"].append(met.tokens_per_second)
            found["static"].append(static(seconds)["tokens_per_second"])
    return {
        "generate_tokens_per_second": found,
        "generate_http_over_engine": ratio(found["http"], found["engine"]),
        "generate_http_over_static": ratio(found["http"], found["static"]),
        "engine_over_static": ratio(found["engine"], found["static"]),
    }


def front(seconds: float) -> dict[str, Any]:
    """What the process that answers HTTP takes of a core: for a request, for one that is encoded, for a token of a
    stream. One of it serves what a core holds of these."""
    asked, took = bodies(256), dict[str, dict[str, float]]()
    streams = [{**body, "stream": True} for body in asked]
    sources = [{"inputs": [text]} for text in texts(4096)]
    with serving(LW_ENCODE_CACHE="false") as pid:
        _, http = psutil.Process(pid).children()
        for name, path, sent in (
            ("generate", "/generate", asked),
            ("stream", "/generate", streams),
            ("encode", "/encode", sources),
        ):
            asyncio.run(closed_loop(path, sent, CALLERS, 1, 1))
            before = http.cpu_times()
            met = asyncio.run(closed_loop(path, sent, CALLERS, seconds, 0))
            after = http.cpu_times()
            busy = after.user + after.system - before.user - before.system
            count = len(met.seconds["200"])
            took[name] = {"ms_per_request": busy / count * 1000, "requests_per_core_second": count / busy}
    tokens = statistics.mean(body["max_tokens"] for body in asked)
    streamed = took["stream"]["ms_per_request"] - took["generate"]["ms_per_request"]
    return {"front": {**took, "mean_tokens": tokens, "stream_ms_per_token": streamed / tokens}}


def encoding(seconds: float, rounds: int) -> dict[str, Any]:
    """Texts per second over HTTP, and of the encoder called directly with the size of batch it likes best."""
    found: dict[str, list[float]] = {"direct": [], "http": []}
    sources = [{"inputs": texts(4096)[at : at + 32]} for at in range(0, 4096, 32)]
    with directly("encoding") as direct:
        sizes = direct(seconds / 2)
        with serving(LW_ENCODE_CACHE="false", LW_MAX_BATCH=str(sizes["best"])):
            for _ in range(rounds):
                found["direct"].append(direct(seconds)["texts_per_second"])
                met = asyncio.run(closed_loop("/encode", sources, 6, seconds, warm_up(seconds)))
                found["http"].append(met.rows / met.wall_seconds)
    return {
        "encode_by_rows": sizes["by_rows"],
        "encode_texts_per_second": found,
        "encode_http_over_direct": ratio(found["http"], found["direct"]),
    }


def ratio(ours: list[float], theirs: list[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def idle(requests: int) -> dict[str, Any]:
    """What the service adds to a request when there is no other: one here, one there, and so on."""
    body = next(body for body in bodies(64) if body["max_tokens"] == min(LENGTHS))
    content, direct_ms, http_ms = json.dumps(body).encode(), list[float](), list[float]()
    with (
        serving(),
        directly("one_at_a_time") as one_at_a_time,
        closing(HTTPConnection("127.0.0.1", PORT)) as connection,
    ):
        for number in range(requests + 10):
            directly_ms = one_at_a_time(1)["seconds"] * 1000
            started = time.perf_counter()
            connection.request("POST", "/generate", content, JSON)
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 200
            if number >= 10:
                http_ms.append((time.perf_counter() - started) * 1000)
                direct_ms.append(directly_ms)
    return {
        "idle_p50_ms": {"direct": statistics.median(direct_ms), "http": statistics.median(http_ms)},
        "service_adds_ms": statistics.median(a - b for a, b in zip(http_ms, direct_ms, strict=True)),
    }


def first_token(requests: int) -> dict[str, Any]:
    """How much sooner a first token comes from a stored latent."""
    with directly("first_tokens") as first_tokens:
        took = first_tokens(requests)
    return {
        "first_token_seconds": took,
        "first_token_relay_over_latent": took["relay"] / took["stored_latent"],
        "first_token_reading_over_latent": took["reads_source"] / took["stored_latent"],
    }


def overload(seconds: float) -> dict[str, Any]:
    """Latency below what the service can do, and what becomes of four times as much."""
    asked, warm = bodies(256), seconds / 6
    with serving():

        def full() -> tuple[float, float]:
            met = asyncio.run(closed_loop("/generate", asked, CALLERS, warm, warm_up(warm)))
            return met.answers / met.wall_seconds, met.tokens_per_second

        capacity, before = full()
        below = {
            share: asyncio.run(open_loop("/generate", asked, share * capacity, 2 * warm, 0.0)) for share in (0.5, 0.8)
        }
        above = asyncio.run(open_loop("/generate", asked, 4 * capacity, seconds + warm, warm))
        after = full()[1]
    refused = [took for status in REFUSED for took in above.seconds.get(status, [])]
    counts = above.counts()
    return {
        "capacity_per_second": capacity,
        "capacity_tokens_per_second": {"before": before, "after": after},
        "latency_ms": {str(share): met.quantiles_ms("200") for share, met in below.items()},
        "overload": {
            "asked_times_capacity": 4,
            "seconds": seconds,
            "statuses": counts,
            "tokens_per_second": above.tokens_per_second,
            "throughput_kept": above.tokens_per_second / statistics.mean((before, after)),
            "refused_within_50_ms": sum(took <= SOON_SECONDS for took in refused) / max(len(refused), 1),
            "refusal_ms": above.quantiles_ms(*REFUSED),
            "other_errors": sum(n for status, n in counts.items() if status not in ("200", *REFUSED)),
        },
    }


def evaluating(seconds: float, rounds: int) -> dict[str, Any]:
    """What callers wait while an evaluation runs, against without one: turn by turn, at a fifth of what the service
    can do."""
    asked = [body for body in bodies(256) if body["max_tokens"] <= 32]
    evaluation = {"bridge": "demo", "task": "world", "conditions": ["bridge", "none", "direct"]}
    found: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
    with serving(), httpx.Client(base_url=f"http://127.0.0.1:{PORT}", trust_env=False) as client:
        full = asyncio.run(closed_loop("/generate", asked, CALLERS, seconds / 2, warm_up(seconds)))
        rate = full.answers / full.wall_seconds / 5

        def wait() -> dict[str, float]:
            return asyncio.run(open_loop("/generate", asked, rate, seconds, 0.0)).quantiles_ms("200")

        for _ in range(rounds):
            found["without"].append(wait())
            job = client.post("/evaluations", json=evaluation).raise_for_status().json()["id"]
            found["with"].append(wait())
            state = client.get(f"/evaluations/{job}").json()["state"]
            assert state == "running", f"the evaluation is {state}: nothing was compared"
            client.delete(f"/evaluations/{job}").raise_for_status()
    p99 = {name: [quantiles["p99"] for quantiles in values] for name, values in found.items()}
    return {
        "evaluation": {"requests_per_second": rate, "ms": found, "p99_ratio": ratio(p99["with"], p99["without"])},
    }


async def mixed(session: aiohttp.ClientSession, number: int, latents: list[str], counts: Counter[str]) -> None:
    """One of many kinds of request."""
    rng = random.Random(number)
    kind = rng.choices(["generate", "stream", "cancel", "encode", "error", "move"], [30, 20, 10, 30, 9, 1])[0]
    body = {"inputs": [{"latent": rng.choice(latents)}], "prompt": f"{rng.choice(WORDS)} {number}", "max_tokens": 12}
    path, sent = {
        "generate": ("/generate", {**body, "temperature": 1.0, "seed": number}),
        "encode": ("/encode", {"inputs": [f"Mara has {number} lamps."], "store": True}),
        "error": ("/generate", {**body, "max_tokens": rng.choice([0, "x", 10**6])}),
        "move": (f"/admin/bridges/demo/{rng.choice(['load', 'unload', 'pin', 'unpin'])}", None),
    }.get(kind, ("/generate", {**body, "max_tokens": 64, "stream": True}))
    try:
        async with session.post(path, json=sent) as response:
            async for _ in response.content:
                if kind == "cancel":
                    response.close()
                    break
            counts[f"{kind} {response.status}"] += 1
    except aiohttp.ClientError as error:
        counts[f"{kind} {type(error).__name__}"] += 1


async def many(first: int, last: int, latents: list[str], counts: Counter[str]) -> None:
    """Mixed requests, sixteen at a time."""
    numbers = iter(range(first, last))
    async with connect() as session:

        async def caller() -> None:
            for number in numbers:
                await mixed(session, number, latents, counts)

        await asyncio.gather(*(caller() for _ in range(16)))


def memory(requests: int) -> dict[str, Any]:
    """Resident memory after a tenth of many mixed requests, after all, and after nine tenths more.

    With the two stores that fill up meanwhile, and with stores that hold next to nothing.
    """
    latents = [body["inputs"][0]["latent"] for body in bodies(64)]
    ends = (requests // 10, requests, 2 * requests - requests // 10)
    return {"memory": {f"stores_of_{size}": growth(latents, ends, size) for size in ("4MB", "64KB")}}


def growth(latents: list[str], ends: tuple[int, ...], store_bytes: str) -> dict[str, Any]:
    """Resident memory after so many requests, and that over the one before."""
    counts: Counter[str] = Counter()
    with serving(LW_STORE_MEMORY=store_bytes, LW_ENCODE_CACHE_MEMORY=store_bytes) as pid:
        held: dict[int, int] = {}
        for first, last in pairwise((0, *ends)):
            asyncio.run(many(first, last, latents, counts))
            held[last] = resident(pid)
    ratios = {f"{b} over {a}": held[b] / held[a] for a, b in pairwise(ends)}
    return {"resident_bytes": held, "ratio": ratios, "statuses": dict(sorted(counts.items()))}


def resident(pid: int) -> int:
    """Memory of its processes that nobody shares, once things are quiet: files mapped from disk come and go."""
    time.sleep(2)
    parent = psutil.Process(pid)
    return sum(int(process.memory_full_info().uss) for process in (parent, *parent.children()))


def main(
    seconds: float = 6.0, rounds: int = 7, requests: int = 20_000, overload_seconds: float = 60.0, only: str = ""
) -> None:
    """Measure everything and record it, or ``only`` one part under its own name."""
    torch.set_num_threads(1)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "saturation": lambda: saturation(seconds, rounds),
        "encoding": lambda: encoding(seconds, rounds),
        "idle": lambda: idle(200),
        "front": lambda: front(2 * seconds),
        "first_token": lambda: first_token(20),
        "overload": lambda: overload(overload_seconds),
        "evaluation": lambda: evaluating(overload_seconds / 3, 3),
        "memory": lambda: memory(requests),
    }
    figures: dict[str, Any] = {"engine_threads": 1}
    for name, measure in parts.items():
        if only in ("", name):
            figures |= measure()
            print(json.dumps(figures, indent=2), flush=True)
    given = f"--seconds {seconds:g} --rounds {rounds} --requests {requests} --overload-seconds {overload_seconds:g}"
    if only:
        given = f"{given} --only {only}"
    record(f"serve-{only}" if only else "serve", f"python -m benchmarks.serve {given}", figures)


if __name__ == "__main__":
    typer.run(main)
