"""The parts of ``benchmarks.gpu`` that decode: what a step takes, encoding beside it, and whether answers are equal."""

import statistics
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise, product
from queue import SimpleQueue
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.gpu_models import Bench, bridge_between
from latentwire.bridge import engine
from latentwire.bridge.checkpoint import BridgeModel
from latentwire.bridge.errors import LatentWireError, first_line
from latentwire.bridge.generation.base import Engine, Running, Soft
from latentwire.bridge.generation.continuous import PAGE_TOKENS, ContinuousEngine
from latentwire.bridge.generation.output import OutputTokens
from latentwire.bridge.generation.steps import MODES, Way, ways
from latentwire.bridge.memory import weights_bytes
from latentwire.bridge.models import FrozenLM
from latentwire.bridge.prompt import IGNORE, TEXT, Row
from latentwire.bridge.reader import SourceTokens
from latentwire.bridge.sampling import SamplingParams

FASTEST = MODES[-1]
Figures = dict[str, Any]
Answer = tuple[int, list[int]]
"""The number of a question, and the tokens of the answer."""

SAMPLED: dict[str, dict[str, Any]] = {
    "greedy": {},
    "top-p": {"temperature": 1.0, "top_p": 0.9},
    "logprobs": {"logprobs": 5},
}
FILLED_TOGETHER = 4  # prompts read at once: a step's attention costs the product of its tokens and all their contexts
ROUNDS = 3  # of different requests that decode beside encoding
ANSWERED, ALONE = 16, 4  # rows whose answers are compared; of them, asked alone too
PATIENCE = 120.0


def question(lm: FrozenLM, number: int, tokens: int, soft_tokens: int) -> tuple[Row, Soft]:
    """A random input, the same for the same number; a shorter one is a longer one's beginning."""
    drawn = torch.Generator().manual_seed(number)
    soft = torch.randn(soft_tokens, lm.width, generator=drawn) * lm.config.initializer_range  # as embeddings are
    words = torch.randint(lm.rows, (tokens - soft_tokens,), generator=drawn).tolist()
    row = Row([0] * soft_tokens + words, [*range(soft_tokens), *[TEXT] * len(words)], [IGNORE] * tokens)
    return row, Soft(number, lambda: soft.to(lm.model.device, lm.model.dtype))


@dataclass
class Steps:
    """When an engine made its steps, and for how many rows; it waits until all requests are there."""

    seen: list[tuple[float, int]] = field(default_factory=list)
    all_asked: threading.Event = field(default_factory=threading.Event)

    def __call__(self, rows: int, _tokens: int, _seconds: float) -> None:
        if self.all_asked.is_set():
            self.seen.append((time.perf_counter(), rows))
        else:
            self.all_asked.wait(PATIENCE)

    def milliseconds(self, rows: int) -> list[float]:
        """Between steps that gave a token to this many rows: what a caller waits for the next one."""
        pairs = pairwise(self.seen[1:])  # the first may be the last one of earlier requests
        return [1000 * (after[0] - before[0]) for before, after in pairs if before[1] == after[1] == rows]


def ask(
    made: Engine, asked: Iterable[tuple[Row, Soft]], params: Sequence[SamplingParams], steps: Steps | None = None
) -> list[OutputTokens]:
    """The outputs of requests that are all made at once."""
    if steps is not None:
        made.on_step = steps
    ended: SimpleQueue[Any] = SimpleQueue()
    running: list[Running] = [
        made.submit(row, one, soft, ended.put) for (row, soft), one in zip(asked, params, strict=True)
    ]
    if steps is not None:
        steps.all_asked.set()
    for _ in running:
        if isinstance(result := ended.get(timeout=PATIENCE), LatentWireError):
            raise result
    return [one.tokens for one in running]


def decode(bench: Bench) -> Figures:
    """Milliseconds of a decode step by how steps are made, what is asked, context and rows."""
    lm = bench.lm("receiver")
    embedding: Any = lm.model.get_input_embeddings()
    weights = weights_bytes(lm.model) - embedding.weight.nbytes  # of which a step looks a few rows up
    found: Figures = {"weight_bytes": weights, "kv_bytes_per_token": lm.kv_bytes(1), "steps": [], "not_run": []}
    for name, way in ways(FASTEST, lm).items():
        try:
            _stepped(bench, lm, name, way, found)
        except (LatentWireError, TypeError, RuntimeError) as error:  # of this switch: the others are measured
            found["not_run"].append({"switch": name, "error": first_line(error)})
    return found


def _stepped(bench: Bench, lm: FrozenLM, name: str, way: Way, found: Figures) -> None:
    scale = bench.scale
    most, longest = max(scale.rows), max(scale.contexts)
    # Beside its context the blocks of every answer to it: when a cache is full, all contexts that wait are dropped.
    room = longest + len(SAMPLED) * len(scale.contexts) * (scale.steps + 2 * PAGE_TOKENS)
    given = {"max_rows": most, "kv_tokens": most * room, "step_tokens": scale.step_tokens}
    with closing(ContinuousEngine(lm, way=way, **given)) as made:
        # What is read once stays in the cache, so that many rows begin to decode at the same time.
        for first in range(0, most, FILLED_TOGETHER):
            numbers = range(first, min(first + FILLED_TOGETHER, most))
            asked = [question(lm, n, longest, scale.soft_tokens) for n in numbers]
            ask(made, asked, [SamplingParams(1)] * len(numbers))
        bench.say(f"{name}: {most} contexts of {longest} tokens read")
        cases = product(scale.contexts, scale.rows, SAMPLED)
        for context, rows, mode in sorted(cases, key=lambda case: case[0] * case[1]):  # the longest steps last
            case = {"switch": name, "mode": mode, "context": context, "rows": rows}
            if bench.is_over:
                found["not_run"].append({**case, "error": "no time was left"})
                continue
            params, steps = [SamplingParams(scale.steps, seed=n, **SAMPLED[mode]) for n in range(rows)], Steps()
            ask(made, [question(lm, n, context, scale.soft_tokens) for n in range(rows)], params, steps)
            found["steps"].append({**case, **of_times(steps.milliseconds(rows))})
            bench.keep(found)
            bench.say(f"{name}, {mode}, {context} tokens, {rows} rows: {found['steps'][-1]['median_ms']:.2f} ms a step")


def of_times(milliseconds: Sequence[float]) -> Figures:
    """Median and 99th percentile of steps (RuntimeError where there was none)."""
    if not milliseconds:
        raise RuntimeError("no two steps in a row were of all rows")
    return {
        "median_ms": statistics.median(milliseconds),
        "p99_ms": float(np.quantile(milliseconds, 0.99)),
        "measured_steps": len(milliseconds),
    }


def beside(bench: Bench) -> Figures:
    """Decoding beside a loop that encodes, against decoding alone: answers, and the time from token to token."""
    lm = bench.lm("receiver")
    found = _beside(bench, lm)
    bench.keep(found)
    with patch.object(engine, "in_background", lambda device: nullcontext()):
        other = _beside(bench, lm)
    return found | {"encoding_on_the_stream_of_all": {name: other[name] for name in ("beside", "encode_ms")}}


def race(bench: Bench) -> Figures:
    """The same in float32, where an answer differs only if something went wrong."""
    return _beside(bench, bench.lm("exact", torch.float32))


def _beside(bench: Bench, lm: FrozenLM) -> Figures:
    sender = bench.lm("sender")
    encoding = Encoding(sender, bridge_between(sender, lm, bench.device), *bench.scale.sources)
    alone, wanted = _rounds(bench, lm, bench.scale.beside_seconds / 2)
    _, control = _rounds(bench, lm, 0.0)
    with encoding.on_and_on() as counted:
        busy, found = _rounds(bench, lm, bench.scale.beside_seconds)
    return {
        "rows": bench.scale.beside_rows,
        "encoded_tokens_each": encoding.tokens,
        "encodes": counted.count,
        "encode_ms": {"alone": encoding.alone_ms, "beside": counted.milliseconds / max(counted.count, 1)},
        "encodes_with_other_latents": counted.different,
        "largest_difference_of_latents": counted.largest_difference,  # their slots have an RMS of 1
        "answers": {"beside": len(found), "alone_again": len(control)},
        "mismatches": {name: _mismatches(wanted, said) for name, said in (("beside", found), ("alone_again", control))},
        "alone": of_times(alone),
        "beside": of_times(busy),
    }


def _rounds(bench: Bench, lm: FrozenLM, seconds: float) -> tuple[list[float], list[Answer]]:
    """Rounds of requests in an engine of their own, in which nothing is read from a cache of earlier ones: times from
    token to token, and the answers by number."""
    scale, started = bench.scale, time.monotonic()
    rows, tokens, context = scale.beside_rows, 2 * scale.steps, min(scale.contexts)
    kv_tokens, times, said = ROUNDS * rows * (context + tokens + 2 * PAGE_TOKENS), list[float](), list[Answer]()
    options: dict[str, Any] = {"max_rows": rows, "kv_tokens": kv_tokens, "step_tokens": scale.step_tokens}
    with closing(ContinuousEngine(lm, way=Way.of(FASTEST, lm), **options)) as made:
        while len(said) < ROUNDS * rows or (time.monotonic() - started < seconds and not bench.is_over):
            first = len(said) % (ROUNDS * rows)
            asked = [question(lm, first + n, context, scale.soft_tokens) for n in range(rows)]
            steps = Steps()
            outputs = ask(made, asked, [SamplingParams(tokens)] * rows, steps)
            times += steps.milliseconds(rows)
            said += [(first + n, output.ids) for n, output in enumerate(outputs)]
    bench.say(f"{len(said)} answers of {tokens} tokens, {statistics.median(times):.2f} ms from token to token")
    return times, said


def _mismatches(wanted: Sequence[Answer], found: Sequence[Answer]) -> int:
    """Answers that are not the first ones to the same requests."""
    first = dict(reversed(wanted))
    return sum(first[number] != ids for number, ids in found)


@dataclass
class Encoded:
    """How often the same was encoded while something else ran, how long that took, and how far it was from alone."""

    count: int = 0
    milliseconds: float = 0.0
    different: int = 0
    largest_difference: float = 0.0


class Encoding:
    """Encodes the same texts, and knows their latents."""

    def __init__(self, sender: FrozenLM, bridge: BridgeModel, rows: int, tokens: int) -> None:
        self.sender, self.bridge, self.tokens = sender, bridge, rows * tokens
        drawn = torch.randint(sender.rows, (rows, tokens), generator=torch.Generator().manual_seed(0)).tolist()
        self.sources = [SourceTokens(ids, len(ids)) for ids in drawn]
        self.encode()
        started = time.perf_counter()
        self.wanted = self.encode()
        self.alone_ms = 1000 * (time.perf_counter() - started)

    def encode(self) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
        """The latents, on the host: the device is done with them."""
        return [one.latent for one in engine.encode(self.bridge, self.sender, self.sources)]

    @contextmanager
    def on_and_on(self) -> Iterator[Encoded]:
        """Encode in a loop on a thread, as a service does, until the block ends."""
        counted, over, failed = Encoded(), threading.Event(), list[Exception]()

        def loop() -> None:
            try:
                while not over.is_set():
                    started = time.perf_counter()
                    found = self.encode()
                    counted.milliseconds += 1000 * (time.perf_counter() - started)
                    counted.count += 1
                    apart = max(float(abs(a - b).max()) for a, b in zip(found, self.wanted, strict=True))
                    counted.different += apart > 0
                    counted.largest_difference = max(counted.largest_difference, apart)
            except Exception as error:
                failed.append(error)

        thread = threading.Thread(target=loop, daemon=True, name="encoding")
        thread.start()
        try:
            yield counted
        finally:
            over.set()
            thread.join()
        if failed:
            raise failed[0]


def answers(bench: Bench) -> Figures:
    """The engine's answers against those of left-padded ``generate``, and sampled ones alone against in company."""
    scale = bench.scale
    found: Figures = {}
    for role, dtype in (("exact", torch.float32), ("receiver", scale.dtype)):
        lm = bench.lm(role, dtype)
        asked = [question(lm, n, scale.contexts[n % len(scale.contexts)], scale.soft_tokens) for n in range(ANSWERED)]
        greedy = [SamplingParams(scale.steps, logprobs=0)] * ANSWERED
        drawn = [SamplingParams(scale.steps, 0.8, 0.95, seed=n) for n in range(ANSWERED)]
        wanted = [OutputTokens(lm, params) for params in greedy]
        soft = torch.stack([soft.make() for _, soft in asked])
        engine.run(lm, [row for row, _ in asked], soft, wanted)
        kv_tokens = ANSWERED * (max(scale.contexts) + scale.steps + 2 * PAGE_TOKENS)
        options: dict[str, Any] = {"max_rows": ANSWERED, "kv_tokens": kv_tokens, "step_tokens": scale.step_tokens}
        for name, way in ways(FASTEST, lm).items():
            with closing(ContinuousEngine(lm, way=way, **options)) as made:
                said, together = ask(made, asked, greedy), ask(made, asked, drawn)
            with closing(ContinuousEngine(lm, way=way, **options)) as made:
                alone = [ask(made, [asked[n]], [drawn[n]])[0] for n in range(ALONE)]
            equal = sum(a.ids == b.ids for a, b in zip(said, wanted, strict=True))
            equal_alone = sum(a.ids == b.ids for a, b in zip(alone, together, strict=False))
            found[role if way == Way.of(FASTEST, lm) else f"{role}, {name}"] = {
                "steps": name,
                "dtype": str(dtype).removeprefix("torch."),
                "greedy_equal": f"{equal} of {ANSWERED}",
                "greedy_tokens_equal_until": _agreement(said, wanted),
                "logprob_difference_nats": max(map(_apart, said, wanted)),
                "sampled_alone_equal": f"{equal_alone} of {ALONE}",
            }
            bench.say(f"{role}, {name}: {found}")
            bench.keep(found)
        del lm, made
    return found


def _agreement(found: Sequence[OutputTokens], wanted: Sequence[OutputTokens]) -> float:
    """Share of the tokens before two answers part."""
    equal = sum(len(list(_same(a, b))) for a, b in zip(found, wanted, strict=True))
    return equal / sum(len(one.ids) for one in wanted)


def _apart(found: OutputTokens, wanted: OutputTokens) -> float:
    """The most that log-probabilities of the same tokens after the same text differ."""
    return max((abs(found.logprobs[i].logprob - wanted.logprobs[i].logprob) for i in _same(found, wanted)), default=0.0)


def _same(found: OutputTokens, wanted: OutputTokens) -> Iterator[int]:
    """Places up to which two answers agree."""
    for i, (a, b) in enumerate(zip(found.ids, wanted.ids, strict=False)):
        if a != b:
            return
        yield i
