"""The service under load, against the same work done directly: ``python -m benchmarks.serve``.

The server is a process of its own and so is every direct measurement; the callers run here. Closed loops (so many
callers, each asks again when it has its answer) find what the service can do; open loops (Poisson arrivals at a rate
that does not wait for anybody) find how long callers wait. Work: the built-in pair, random prompts and latents, so that
greedy answers run to their limits of 8 to 128 tokens.
"""

import asyncio
import base64
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import httpx
import numpy as np
import psutil
import torch
import typer

from benchmarks.record import record
from bridge import engine
from bridge.checkpoint import load_bridge
from bridge.continuous import ContinuousEngine
from bridge.engine import encode, generate
from bridge.evaluation.conditions import RELAY_TOKENS
from bridge.evaluation.tasks import world_task
from bridge.models import load_model, load_reader, tokenize_source
from bridge.prompt import compose
from bridge.sampling import SamplingParams
from service.served import Question, Served

PORT = 8124
JSON = {"content-type": "application/json"}
ROWS = 32  # of a step, and of a static batch
CALLERS = 64
LENGTHS = (8, 16, 32, 64, 128)
SLOTS = 16
WORDS = "Mara Otto Ben Rome Oslo tea bread sings wants lives visits red blue seven nine gate river lamp".split()
app = typer.Typer(add_completion=False)


def served() -> Served:
    """The built-in bridge as the service holds it."""
    manifest, bridge = load_bridge("builtin")
    names = (manifest.bridge.sender.name, *manifest.bridge.heads)
    return Served("builtin", manifest, bridge, {name: load_reader(name) for name in names})


def questions(count: int, seed: int = 0) -> list[Question]:
    """Random latents and prompts, with limits drawn from ``LENGTHS``."""
    rng, width = random.Random(seed), load_bridge("builtin")[0].bridge.encoder.latent_dim
    drawn = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        latent = drawn.standard_normal((SLOTS, width)).astype(np.float32)
        latent /= np.sqrt((latent**2).mean(axis=1, keepdims=True))
        prompt = " ".join(rng.choices(WORDS, k=12))
        made.append(Question(latent, prompt, SamplingParams(max_tokens=rng.choice(LENGTHS))))
    return made


def bodies(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """The same questions as requests."""
    bridge = served()
    return [
        {
            "inputs": [{"latent": base64.b64encode(bridge.message(question.given, "float32")).decode()}],  # type: ignore[arg-type]
            "prompt": question.prompt,
            "max_tokens": question.params.max_tokens,
        }
        for question in questions(count, seed)
    ]


# Direct: each runs in a process of its own and prints one line of JSON.


class Direct:
    """The receiver's engine, called in process."""

    def __init__(self) -> None:
        self.bridge = served()
        self.name = self.bridge.receiver(None)
        self.lm = load_model(self.name)
        self.engine = ContinuousEngine(self.lm, max_rows=ROWS)

    def ask(self, question: Question, done: Callable[[int], None], first: Callable[[str], None] | None = None) -> None:
        """Submit a question; ``done`` gets its token count."""

        def end(result: Any) -> None:
            if isinstance(result, Exception):
                raise result
            done(result.token_count)

        row = self.bridge.compose(self.name, question)
        self.engine.submit(row, question.params, self.bridge.soft(self.name, self.lm, question), end, first)

    def wait(self, question: Question) -> tuple[float, float]:
        """Seconds to the first token and to the last."""
        ended, times = threading.Event(), list[float]()
        started = time.perf_counter()
        self.ask(question, lambda _: ended.set(), lambda _: times.append(time.perf_counter() - started))
        ended.wait()
        return (times or [time.perf_counter() - started])[0], time.perf_counter() - started


@app.command()
def direct_engine(seconds: float) -> None:
    """Tokens per second of the engine with CALLERS requests in it at all times."""
    direct, asked = Direct(), cycle(questions(256))
    tokens, stop, lock = 0, False, threading.Lock()
    idle = threading.Event()

    def done(count: int) -> None:
        nonlocal tokens
        with lock:
            tokens += count
            following = None if stop else next(asked)
        if following is not None:
            direct.ask(following, done)
        elif direct.engine.running == 0:
            idle.set()

    for _ in range(CALLERS):
        direct.ask(next(asked), done)
    time.sleep(min(2.0, seconds / 4))  # caches are warm, lengths are mixed
    before, started = tokens, time.perf_counter()
    time.sleep(seconds)
    rate = (tokens - before) / (time.perf_counter() - started)
    stop = True
    idle.wait()
    print(json.dumps({"tokens_per_second": rate}))
    direct.engine.close()


@app.command()
def direct_static(seconds: float) -> None:
    """Tokens per second of left-padded batches of ``generate``, in order of arrival."""
    bridge = served()
    name = bridge.receiver(None)
    lm, asked = load_model(name), cycle(questions(256))
    tokens, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        batch = [next(asked) for _ in range(ROWS)]
        rows = [bridge.compose(name, question) for question in batch]
        soft = engine.soften(bridge.bridge, name, lm, [question.given for question in batch])  # type: ignore[misc]
        said = generate(lm, rows, soft, [question.params for question in batch])[0]
        tokens += sum(answer.token_count for answer in said)
    print(json.dumps({"tokens_per_second": tokens / (time.perf_counter() - started)}))


def texts(count: int) -> list[str]:
    """Sources of the world, each unlike all others."""
    examples = world_task().test
    return [f"{examples[i % len(examples)].source} Ben has {i} lamps." for i in range(count)]


@app.command()
def direct_encode(seconds: float) -> None:
    """Texts per second of the encoder, sorted by length, with the best size of batch."""
    bridge = served()
    sender = load_model(bridge.sender)
    limit = bridge.manifest.bridge.max_source_tokens
    best: dict[int, float] = {}
    for rows in (4, 8, 16, 32, 64):
        done, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds / 5:
            sources = [tokenize_source(sender, text, max_tokens=limit, truncate=True) for text in texts(512)]
            sources.sort(key=lambda source: len(source.ids))
            for at in range(0, len(sources), rows):
                encode(bridge.bridge, sender, sources[at : at + rows])
                done += len(sources[at : at + rows])
                if time.perf_counter() - started > seconds / 5:
                    break
        best[rows] = done / (time.perf_counter() - started)
    print(json.dumps({"texts_per_second": max(best.values()), "by_rows": best}))


@app.command()
def direct_idle(rounds: int) -> None:
    """Seconds of one request at a time in the engine: composing included, HTTP not."""
    direct, (asked, *_) = Direct(), [q for q in questions(64) if q.params.max_tokens == 8]
    times = [direct.wait(asked)[1] for _ in range(rounds + 10)][10:]
    print(json.dumps({"p50_seconds": statistics.median(times)}))
    direct.engine.close()


@app.command()
def first_tokens(rounds: int) -> None:
    """Seconds until a receiver's first token: from a stored latent, reading the source, after a sender's summary."""
    direct, sender = Direct(), load_model(served().sender)
    writer = ContinuousEngine(sender, max_rows=ROWS)
    limit = direct.lm.max_tokens - 2 * RELAY_TOKENS  # the sender writes its summary behind the source
    source = " ".join(texts(40))
    source = sender.tokenizer.decode(tokenize_source(sender, source, max_tokens=limit, truncate=True).ids[1:])
    read = encode(direct.bridge.bridge, sender, [tokenize_source(sender, source, max_tokens=limit, truncate=True)])[0]
    params, prompt = SamplingParams(max_tokens=1), "\nQuestion: Where does Mara live?\nAnswer:"
    layout = direct.bridge.manifest.bridge.heads[direct.name].layout
    summary = SamplingParams(max_tokens=RELAY_TOKENS)
    row = compose(sender, layout, "{latent}\nSummary:", latent=source)
    found: dict[str, list[float]] = {"stored_latent": [], "reads_source": [], "relay": []}
    for number in range(rounds + 3):
        seconds = {
            "stored_latent": direct.wait(Question(read.latent, prompt, params))[0],
            "reads_source": direct.wait(Question(f"{source} {number}", prompt, params))[0],
        }
        started, ended, said = time.perf_counter(), threading.Event(), list[Any]()
        writer.submit(row, summary, None, lambda result, said=said, ended=ended: (said.append(result), ended.set()))
        ended.wait()
        direct.wait(Question(said[0].text or ".", prompt, params))
        seconds["relay"] = time.perf_counter() - started
        if number >= 3:
            for name, value in seconds.items():
                found[name].append(value)
    medians = {name: statistics.median(values) for name, values in found.items()}
    print(json.dumps({**medians, "source_tokens": read.source_tokens, "slots": len(read.latent),
                      "summary_tokens": said[0].token_count}))  # fmt: skip
    for made in (direct.engine, writer):
        made.close()


def directly(part: str, argument: float) -> dict[str, Any]:
    """Run a direct measurement in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.serve", part, str(argument)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


# Over HTTP.


@contextmanager
def serving(**variables: str) -> Iterator[int]:
    """A server of the built-in bridge; its process id."""
    import os

    command = [sys.executable, "-m", "service", "serve", "--port", str(PORT)]
    environment = {**os.environ, "LW_MAX_BATCH": str(ROWS), **variables}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            while httpx_get("/health/ready") != 200:
                assert process.poll() is None, "the server ended"
                time.sleep(0.1)
            yield process.pid
        finally:
            process.terminate()
            process.wait()


def httpx_get(path: str) -> int:
    try:
        return httpx.get(f"http://127.0.0.1:{PORT}{path}", trust_env=False).status_code
    except httpx.TransportError:
        return 0


@dataclass
class Met:
    """What callers met: seconds by status, tokens of answers, and when the first and the last came."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    tokens: int = 0
    rows: int = 0
    wall_seconds: float = 0.0

    def note(self, status: str, seconds: float, tokens: int = 0, rows: int = 0) -> None:
        self.seconds.setdefault(status, []).append(seconds)
        self.tokens += tokens
        self.rows += rows

    def add(self, other: "Met") -> None:
        for status, seconds in other.seconds.items():
            self.seconds.setdefault(status, []).extend(seconds)
        self.tokens += other.tokens
        self.rows += other.rows

    def counts(self) -> dict[str, int]:
        return {status: len(seconds) for status, seconds in sorted(self.seconds.items())}

    def quantile(self, share: float, status: str = "200") -> float:
        found = sorted(self.seconds.get(status, [0.0]))
        return found[min(int(share * len(found)), len(found) - 1)]


def connect() -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=512)
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{PORT}", timeout=120.0, limits=limits, trust_env=False)


async def ask(client: httpx.AsyncClient, path: str, content: bytes, met: Met) -> None:
    started = time.perf_counter()
    try:
        response = await client.post(path, content=content, headers=JSON)
    except httpx.TransportError as error:
        met.note(type(error).__name__, time.perf_counter() - started)
        return
    took = time.perf_counter() - started
    if response.status_code != 200:
        met.note(str(response.status_code), took)
        return
    answer = response.json()
    met.note("200", took, answer["usage"]["generated_tokens"], len(answer.get("latents", ())))


async def closed_loop(path: str, asked: Sequence[dict[str, Any]], callers: int, seconds: float) -> Met:
    """So many callers, each with its next request as soon as it has an answer; the first seconds do not count."""
    content, met = cycle([json.dumps(body).encode() for body in asked]), Met()
    async with connect() as client:
        begins = time.perf_counter() + min(4.0, seconds / 2)

        async def caller() -> None:
            while time.perf_counter() < begins + seconds:
                one = Met()
                await ask(client, path, next(content), one)
                if begins < time.perf_counter() < begins + seconds:  # it ended within the time that counts
                    met.add(one)

        await asyncio.gather(*(caller() for _ in range(callers)))
    met.wall_seconds = seconds
    return met


async def open_loop(path: str, asked: Sequence[dict[str, Any]], per_second: float, seconds: float) -> Met:
    """Requests arrive at random, so many per second on average, whoever still waits."""
    content, met, rng = cycle([json.dumps(body).encode() for body in asked]), Met(), random.Random(1)
    late = Met()
    async with connect() as client:
        started = due = time.perf_counter()
        tasks = set[asyncio.Task[None]]()

        async def arrive() -> None:
            one = Met()
            await ask(client, path, next(content), one)
            (met if time.perf_counter() < started + seconds else late).add(one)

        while due < started + seconds:
            due += rng.expovariate(per_second)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            task = asyncio.create_task(arrive())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)
    for status, times in late.seconds.items():  # they count as answers, not as throughput
        met.seconds.setdefault(status, []).extend(times)
    met.wall_seconds = seconds
    return met


def saturation(seconds: float) -> dict[str, Any]:
    """Tokens and texts per second over HTTP, against the same work done directly."""
    found: dict[str, Any] = {"engine": [], "http": [], "static": []}
    asked = bodies(256)
    for _ in range(3):  # in turns, since machines have moods
        found["engine"].append(directly("direct-engine", seconds)["tokens_per_second"])
        with serving():
            met = asyncio.run(closed_loop("/generate", asked, CALLERS, seconds))
        found["http"].append(met.tokens / met.wall_seconds)
        found["static"].append(directly("direct-static", seconds)["tokens_per_second"])
    middle = {name: statistics.median(values) for name, values in found.items()}
    encoded: dict[str, list[float]] = {"direct": [], "http": []}
    sources = [{"inputs": texts(4096)[at : at + 32]} for at in range(0, 4096, 32)]
    for _ in range(3):
        directly_read = directly("direct-encode", seconds)
        encoded["direct"].append(directly_read["texts_per_second"])
        best = max(directly_read["by_rows"], key=directly_read["by_rows"].get)
        with serving(LW_ENCODE_CACHE="false", LW_MAX_BATCH=str(best)):
            met = asyncio.run(closed_loop("/encode", sources, 6, seconds))
        encoded["http"].append(met.rows / met.wall_seconds)
    read = {name: statistics.median(values) for name, values in encoded.items()}
    return {
        "generate_tokens_per_second": found,
        "generate_http_over_engine": middle["http"] / middle["engine"],
        "generate_http_over_static": middle["http"] / middle["static"],
        "engine_over_static": middle["engine"] / middle["static"],
        "encode_texts_per_second": encoded,
        "encode_http_over_direct": read["http"] / read["direct"],
    }


def idle(rounds: int) -> dict[str, Any]:
    """What the service adds to one request at a time."""
    body = next(body for body in bodies(64) if body["max_tokens"] == 8)
    found: dict[str, list[float]] = {"direct": [], "http": []}
    for _ in range(3):
        found["direct"].append(directly("direct-idle", rounds)["p50_seconds"] * 1000)
        with serving(), httpx.Client(base_url=f"http://127.0.0.1:{PORT}", trust_env=False) as client:
            content, times = json.dumps(body).encode(), []
            for _ in range(rounds + 10):
                started = time.perf_counter()
                client.post("/generate", content=content, headers=JSON).raise_for_status()
                times.append((time.perf_counter() - started) * 1000)
            found["http"].append(statistics.median(times[10:]))
    middle = {name: statistics.median(values) for name, values in found.items()}
    return {"idle_p50_ms": found, "service_adds_ms": middle["http"] - middle["direct"]}


def overload(seconds: float) -> dict[str, Any]:
    """Latency below what the service can do, and what becomes of four times as much."""
    asked = bodies(256)
    with serving():
        full = asyncio.run(closed_loop("/generate", asked, CALLERS, min(10.0, seconds)))
        capacity = len(full.seconds["200"]) / full.wall_seconds
        below = {
            str(share): asyncio.run(open_loop("/generate", asked, share * capacity, min(20.0, seconds)))
            for share in (0.5, 0.8)
        }
        above = asyncio.run(open_loop("/generate", asked, 4 * capacity, seconds))
    refused = above.seconds.get("429", []) + above.seconds.get("503", [])
    return {
        "capacity_per_second": capacity,
        "capacity_tokens_per_second": full.tokens / full.wall_seconds,
        "latency_ms": {
            share: {"p50": met.quantile(0.5) * 1000, "p99": met.quantile(0.99) * 1000} for share, met in below.items()
        },
        "overload": {
            "asked_times_capacity": 4,
            "seconds": seconds,
            "statuses": above.counts(),
            "throughput_kept": (above.tokens / above.wall_seconds) / (full.tokens / full.wall_seconds),
            "refused_within_50_ms": sum(took <= 0.05 for took in refused) / max(len(refused), 1),
            "refusal_ms": {"p50": quantile_ms(refused, 0.5), "p99": quantile_ms(refused, 0.99)},
            "other_errors": sum(n for status, n in above.counts().items() if status not in ("200", "429", "503")),
        },
    }


def quantile_ms(seconds: list[float], share: float) -> float:
    found = sorted(seconds) or [0.0]
    return found[min(int(share * len(found)), len(found) - 1)] * 1000


async def mixed(client: httpx.AsyncClient, number: int, latents: list[str], counts: Counter[str]) -> None:
    """One of many kinds of request."""
    rng = random.Random(number)
    kind = rng.choices(["generate", "stream", "cancel", "encode", "error", "move"], [30, 20, 10, 30, 9, 1])[0]
    body = {"inputs": [{"latent": rng.choice(latents)}], "prompt": f"{rng.choice(WORDS)} {number}", "max_tokens": 12}
    try:
        if kind == "encode":
            response = await client.post("/encode", json={"inputs": [f"Mara has {number} lamps."], "store": True})
        elif kind == "error":
            response = await client.post("/generate", json={**body, "max_tokens": rng.choice([0, "x", 10**6])})
        elif kind == "move":
            response = await client.post(f"/admin/bridges/builtin/{rng.choice(['load', 'unload', 'pin', 'unpin'])}")
        elif kind == "generate":
            response = await client.post("/generate", json={**body, "temperature": 1.0, "seed": number})
        else:
            async with client.stream("POST", "/generate", json={**body, "max_tokens": 64, "stream": True}) as response:
                async for _ in response.aiter_lines():
                    if kind == "cancel":
                        break
        counts[f"{kind} {response.status_code}"] += 1
    except httpx.TransportError as error:
        counts[f"{kind} {type(error).__name__}"] += 1


async def many(first: int, last: int, latents: list[str], counts: Counter[str]) -> None:
    """Mixed requests, sixteen at a time."""
    numbers = iter(range(first, last))
    async with connect() as client:

        async def caller() -> None:
            for number in numbers:
                await mixed(client, number, latents, counts)

        await asyncio.gather(*(caller() for _ in range(16)))


def memory(requests: int) -> dict[str, Any]:
    """Resident memory after many mixed requests, against after the first tenth."""
    latents = [body["inputs"][0]["latent"] for body in bodies(64)]
    counts: Counter[str] = Counter()
    with serving(LW_STORE_MEMORY="4MB", LW_ENCODE_CACHE_MEMORY="4MB") as pid:
        asyncio.run(many(0, requests // 10, latents, counts))
        early = resident(pid)
        asyncio.run(many(requests // 10, requests, latents, counts))
        late = resident(pid)
    return {"memory": {"requests": requests, "early_bytes": early, "late_bytes": late, "ratio": late / early,
                       "statuses": dict(sorted(counts.items()))}}  # fmt: skip


def resident(pid: int) -> int:
    """Anonymous resident memory once things are quiet: files mapped from disk come and go with the machine's mood."""
    time.sleep(2)
    info = psutil.Process(pid).memory_info()
    return int(info.rss - info.shared)


Part = Callable[[], dict[str, Any] | Awaitable[dict[str, Any]]]


@app.command()
def main(seconds: float = 8.0, rounds: int = 200, overload_seconds: float = 60.0, requests: int = 20_000) -> None:
    """Measure everything and record it."""
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    for measure in (
        lambda: saturation(seconds),
        lambda: idle(rounds),
        lambda: {"first_token": directly("first-tokens", 20)},
        lambda: overload(overload_seconds),
        lambda: memory(requests),
    ):
        figures |= measure()
        print(json.dumps(figures, indent=2))
    first = figures["first_token"]
    figures["first_token_relay_over_latent"] = first["relay"] / first["stored_latent"]
    figures["first_token_reading_over_latent"] = first["reads_source"] / first["stored_latent"]
    record("serve", f"python -m benchmarks.serve main --seconds {seconds:g} --requests {requests}", figures)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.argv.append("main")
    app()
