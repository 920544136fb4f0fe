"""What the service does, done without it: the other side of the comparisons in ``benchmarks.serve``.

Each kind of work has a process of its own, as the service has. It reads a line with a number, measures, prints a line
of JSON, and waits for the next, so that both sides of a comparison take turns on a machine that has moods.
"""

import base64
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from itertools import cycle
from typing import Any

import numpy as np

from latentwire.bridge import engine
from latentwire.bridge.bridge import Bridge
from latentwire.bridge.checkpoint import read_manifest
from latentwire.bridge.detokenise import decode
from latentwire.bridge.engine import encode, generate
from latentwire.bridge.evaluation.context import RELAY_TOKENS
from latentwire.bridge.evaluation.tasks import world_task
from latentwire.bridge.generation.select import open_engine
from latentwire.bridge.models import load_model
from latentwire.bridge.prompt import compose, text_layout
from latentwire.bridge.reader import tokenize_source
from latentwire.bridge.sampling import SamplingParams
from latentwire.bridge.sources import latent_of
from latentwire.service.inference.request import GenerationRequest

ROWS = 32  # of a step, and of a static batch
CALLERS = 64
LENGTHS = (8, 16, 32, 64, 128)
SLOTS = 16
WORDS = "Mara Otto Ben Rome Oslo tea bread sings wants lives visits red blue seven nine gate river lamp".split()
# One core for the model, on either side: the other is for HTTP and for the callers, which run on the same machine.
ONE_CORE = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
Figures = dict[str, Any]
Work = Generator[Figures, float, None]


def questions(count: int, seed: int = 0) -> list[GenerationRequest]:
    """Random latents and prompts, with limits drawn from ``LENGTHS``: greedy answers run to their limits."""
    rng, width = random.Random(seed), read_manifest("builtin").bridge.encoder.latent_dim
    drawn = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        latent = drawn.standard_normal((SLOTS, width)).astype(np.float32)
        latent /= np.sqrt((latent**2).mean(axis=1, keepdims=True))
        prompt = " ".join(rng.choices(WORDS, k=12))
        made.append(GenerationRequest(latent, prompt, SamplingParams(max_tokens=rng.choice(LENGTHS))))
    return made


def bodies(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """The same questions as requests."""
    bridge = Bridge.load()
    return [
        {
            "inputs": [{"latent": base64.b64encode(bridge.message(np.asarray(question.source), "float32")).decode()}],
            "prompt": question.prompt,
            "max_tokens": question.params.max_tokens,
        }
        for question in questions(count, seed)
    ]


def texts(count: int) -> list[str]:
    """Sources of the world, each unlike all others."""
    examples = world_task().test
    return [f"{examples[i % len(examples)].source} Ben has {i} lamps." for i in range(count)]


class Asking:
    """A receiver's engine, called in process."""

    def __init__(self) -> None:
        self.bridge = Bridge.load()
        self.name = self.bridge.receiver(None)
        self.lm = load_model(self.name)
        self.engine = open_engine(self.lm, max_rows=ROWS, mode="paged", required="continuous")  # as it is served

    def ask(
        self, question: GenerationRequest, done: Callable[[int], None], first: Callable[..., None] | None = None
    ) -> None:
        """Submit a question; ``done`` gets its token count."""

        def end(result: Any) -> None:
            if isinstance(result, Exception):
                raise result
            done(result.token_count)

        row = self.bridge.compose(self.name, question.source, question.prompt, question.params)
        self.engine.submit(
            row,
            question.params,
            self.bridge.soft(self.name, self.lm, latent_of(question.source)),
            end,
            first,
        )

    def wait(self, question: GenerationRequest) -> tuple[float, float]:
        """Seconds to the first token and to the last."""
        ended, times = threading.Event(), list[float]()
        started = time.perf_counter()
        self.ask(question, lambda _: ended.set(), lambda *_: times.append(time.perf_counter() - started))
        ended.wait()
        return (times or [time.perf_counter() - started])[0], time.perf_counter() - started


def continuous() -> Work:
    """Tokens per second of the engine with CALLERS requests in it at all times."""
    asking, asked = Asking(), cycle(questions(256))
    lock, idle = threading.Lock(), threading.Event()
    tokens, stop = 0, False

    def done(count: int) -> None:
        nonlocal tokens
        with lock:
            tokens += count
            following = None if stop else next(asked)
        if following is not None:
            asking.ask(following, done)
        elif asking.engine.running == 0:
            idle.set()

    seconds = yield {}
    while True:
        stop = False
        idle.clear()
        for _ in range(CALLERS):
            asking.ask(next(asked), done)
        time.sleep(warm_up(seconds))
        before, started = tokens, time.perf_counter()
        time.sleep(seconds)
        rate = (tokens - before) / (time.perf_counter() - started)
        stop = True
        idle.wait()
        seconds = yield {"tokens_per_second": rate}


def static() -> Work:
    """Tokens per second of left-padded batches of ``generate``, in order of arrival."""
    bridge = Bridge.load()
    name = bridge.receiver(None)
    lm, asked = load_model(name), cycle(questions(256))
    seconds = yield {}
    while True:
        tokens, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            batch = [next(asked) for _ in range(ROWS)]
            rows = [bridge.compose(name, question.source, question.prompt, question.params) for question in batch]
            soft = engine.soften(bridge.model, name, lm, [question.source for question in batch])  # type: ignore[misc]
            said = generate(lm, rows, soft, [question.params for question in batch])[0]
            tokens += sum(answer.token_count for answer in said)
        seconds = yield {"tokens_per_second": tokens / (time.perf_counter() - started)}


def encoding() -> Work:
    """Texts per second of the encoder for batches of several sizes, each made of texts of like length."""
    bridge, asked = Bridge.load(), cycle(texts(4096))
    sender, limit = load_model(bridge.sender), bridge.manifest.bridge.max_source_tokens
    kept = bridge.manifest.bridge.source
    best, sizes = 0, (4, 8, 16, 32, 64)
    seconds = yield {}
    while True:
        rates: dict[int, float] = {}
        for rows in (best,) if best else sizes:
            done, started = 0, time.perf_counter()
            while time.perf_counter() - started < seconds:
                window = [next(asked) for _ in range(6 * 32)]  # what waits in the service
                sources = [tokenize_source(sender, text, kept, max_tokens=limit, truncate=True) for text in window]
                sources.sort(key=lambda source: len(source.ids))
                for at in range(0, len(sources), rows):
                    encode(bridge.model, sender, sources[at : at + rows])
                done += len(sources)
            rates[rows] = done / (time.perf_counter() - started)
        best = best or max(rates, key=rates.__getitem__)
        seconds = yield {"texts_per_second": rates[best], "by_rows": rates, "best": best}


def one_at_a_time() -> Work:
    """Seconds of one request in the idle engine: composing included, HTTP not."""
    asking, asked = Asking(), next(q for q in questions(64) if q.params.max_tokens == min(LENGTHS))
    yield {}
    while True:
        yield {"seconds": asking.wait(asked)[1]}


def first_tokens() -> Work:
    """Seconds until a receiver's first token: from a stored latent, reading the source, after a sender's summary."""
    asking, sender = Asking(), load_model(Bridge.load().sender)
    writer = open_engine(sender, max_rows=ROWS, mode="paged", required="continuous")
    limit = asking.lm.max_tokens - 2 * RELAY_TOKENS  # the sender writes its summary behind the source
    source = " ".join(texts(40))
    kept = asking.bridge.manifest.bridge.source
    ids = tokenize_source(sender, source, kept, max_tokens=limit, truncate=True).ids
    source = decode(sender, ids)
    cut = tokenize_source(sender, source, kept, max_tokens=limit, truncate=True)
    read = encode(asking.bridge.model, sender, [cut])[0]
    params, prompt = SamplingParams(max_tokens=1), "\nQuestion: Where does Mara live?\nAnswer:"
    row = compose(sender, text_layout(sender), "{latent}\nSummary:", latent=source)

    def relay() -> tuple[float, int]:
        started, ended, said = time.perf_counter(), threading.Event(), list[Any]()
        summary = SamplingParams(max_tokens=RELAY_TOKENS)

        def end(result: Any) -> None:
            said.append(result)
            ended.set()

        writer.submit(row, summary, None, end)
        ended.wait()
        asking.wait(GenerationRequest(said[0].text or ".", prompt, params))
        return time.perf_counter() - started, said[0].token_count

    rounds = yield {}
    while True:
        found: dict[str, list[float]] = {"stored_latent": [], "reads_source": [], "relay": []}
        for number in range(int(rounds) + 3):
            took = {
                "stored_latent": asking.wait(GenerationRequest(read.latent, prompt, params))[0],
                "reads_source": asking.wait(GenerationRequest(f"{source} {number}", prompt, params))[0],
            }
            took["relay"], summary_tokens = relay()
            if number >= 3:
                for name, value in took.items():
                    found[name].append(value)
        medians = {name: statistics.median(values) for name, values in found.items()}
        counts = {"source_tokens": read.source_tokens, "slots": len(read.latent), "summary_tokens": summary_tokens}
        rounds = yield {**medians, **counts}


WORK = {made.__name__: made for made in (continuous, static, encoding, one_at_a_time, first_tokens)}


def warm_up(seconds: float) -> float:
    """How long a measurement of so many seconds runs before it counts."""
    return min(3.0, seconds / 2)


@contextmanager
def directly(work: str) -> Iterator[Callable[[float], Figures]]:
    """A process that does the work; calling it with a number measures once."""
    command = [sys.executable, "-m", "benchmarks.direct", work]
    environment = {**os.environ, **ONE_CORE}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        ask, tell = process.stdin, process.stdout

        def measure(number: float) -> Figures:
            print(number, file=ask, flush=True)
            figures: Figures = json.loads(tell.readline() or "null")
            if figures is None:
                raise RuntimeError(f"{work} ended with code {process.wait()}")
            return figures

        assert json.loads(tell.readline() or "null") == {}, f"{work} did not start"
        try:
            yield measure
        finally:
            process.kill()


def main(work: str) -> None:
    """Do the work whenever a line says so."""
    doing = WORK[work]()
    print(json.dumps(next(doing)), flush=True)
    for line in sys.stdin:
        print(json.dumps(doing.send(float(line))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
