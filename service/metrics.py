"""What Prometheus sees. One registry per application, so that tests can build many.

Labels are bounded: routes, bridges and models that are served, and the words listed here. Where they are known at the
start their series are too, so that a first event is an increase.
"""

import math
import time
from collections import Counter as Counted
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics

from latentwire.bridge.diversity import entropy_nats, repetition, similarity
from latentwire.bridge.drift import LatentStatistics
from latentwire.bridge.gate import Judged
from latentwire.bridge.generation.base import Times
from latentwire.bridge.generation.output import Generation
from latentwire.service.schemas.inference import Usage
from latentwire.service.schemas.lenient import OTHER

disable_created_metrics()  # type: ignore[no-untyped-call]  # a series more for each counter, which nothing here asks for

WINDOW = 256  # latest outputs, and latents, of a bridge over which diversity is measured
FEWEST = 64  # latents that a drift is told of
LATENCY_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TRUST = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 1)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TOKENS = tuple(4**n for n in range(1, 9))
BYTES = tuple(4**n for n in range(3, 13))  # 64 bytes to 16 MiB
HALVES = ("encode", "generate", "score")
KINDS = ("source", "prompt", "soft", "generated")
ROUTES = ("/encode", "/generate", "/score", "/read", "/latents", "/v1/completions", "/v1/chat/completions")
OUTCOMES = ("ok", "invalid", "refused", "aborted", "late", "failed")
REASONS = ("Overloaded", "RateLimited", "NotReady", "TooLarge", "InsufficientMemory")
LOOKUPS = ("hit", "miss", "error")


class Tally(Counted[Hashable]):
    """Counts, of which those that fall to zero are let go."""

    def forget(self, gone: Iterable[Hashable]) -> None:
        """Take back what was counted before."""
        for key in gone:
            self[key] -= 1
            if not self[key]:
                del self[key]


def outcome_of(status: int) -> str:
    """One of ``OUTCOMES``: in whose hands it was that a request ended as it did."""
    named = {429: "refused", 503: "refused", 499: "aborted", 504: "late"}
    return named.get(status, "ok" if status < 400 else "invalid" if status < 500 else "failed")


class ModelMetrics:
    """Counters of what runs on models; of the process that holds them."""

    def __init__(self, buckets: Sequence[float] = LATENCY_SECONDS) -> None:
        self.registry = r = CollectorRegistry()
        self.batch_rows = Histogram("latentwire_batch_rows", "Rows per batch.", ["half"], buckets=ROWS, registry=r)
        self.batch_tokens = Histogram(
            "latentwire_batch_tokens", "Tokens per batch, or per step of a receiver, padding left out.", ["half"],
            buckets=TOKENS, registry=r,
        )  # fmt: skip
        self.device_seconds = Histogram(
            "latentwire_device_seconds", "One batch on the device.", ["half"], buckets=buckets, registry=r
        )
        self.queue_seconds = Histogram(
            "latentwire_queue_seconds", "From being queued to the first batch, or step, that holds the row.", ["half"],
            buckets=buckets, registry=r,
        )  # fmt: skip
        for half in HALVES:
            for metric in (self.batch_rows, self.batch_tokens, self.device_seconds, self.queue_seconds):
                metric.labels(half)

    def observe_batch(self, half: str, rows: int, tokens: int, seconds: float) -> None:
        """Count a batch: of ``encode``, ``generate`` or ``score``."""
        self.batch_rows.labels(half).observe(rows)
        self.batch_tokens.labels(half).observe(tokens)
        self.device_seconds.labels(half).observe(seconds)

    @contextmanager
    def batch(self, half: str, rows: int, tokens: int) -> Iterator[None]:
        """Count a batch, which is what the block runs; also one that fails."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.observe_batch(half, rows, tokens, time.perf_counter() - started)


@dataclass(frozen=True)
class Said:
    """An output as it is counted: its words and their pairs, its ``repetition``, whether its limit cut it, and the mean
    entropy of its tokens, where the receiver is here."""

    text: str
    words: Sequence[str]
    pairs: Sequence[tuple[str, str]]
    repetition: float
    cut: bool
    entropy: float | None

    @classmethod
    def of(cls, text: str, cut: bool, entropy: float | None) -> "Said":
        words = text.split()
        return cls(text, words, list(pairwise(words)), repetition([text]), cut, entropy)


@dataclass
class Window:
    """The latest outputs of a bridge, and what its sender read last.

    What ``bridge.diversity`` measures of them is kept up to date output by output: to count all words anew took 5 ms of
    every scrape. ``latents`` holds the mean slot (C,) of each text that was not in the cache: one that is asked about
    again and again should not look like a collapse. ``usual`` is what they are compared with, where that is known.
    """

    usual: LatentStatistics | None = None
    latents: deque[NDArray[np.float32]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _outputs: deque[Said] = field(default_factory=deque)
    _texts: Tally = field(default_factory=Tally)
    _words: Tally = field(default_factory=Tally)
    _pairs: Tally = field(default_factory=Tally)

    def add(self, text: str, cut: bool, entropy: float | None = None) -> None:
        """Remember an output, and forget the oldest of more than ``WINDOW``."""
        self._outputs.append(said := Said.of(text, cut, entropy))
        for tally, what in ((self._texts, [text]), (self._words, said.words), (self._pairs, said.pairs)):
            tally.update(what)
        if len(self._outputs) > WINDOW:
            old = self._outputs.popleft()
            for tally, gone in ((self._texts, [old.text]), (self._words, old.words), (self._pairs, old.pairs)):
                tally.forget(gone)

    def measured(self) -> dict[str, float]:
        """Every number about the window by the name of its gauge; a drift, and how unsure the receiver was, only where
        they can be told."""
        outputs, latents = list(self._outputs), list(self.latents)
        count, words = max(len(outputs), 1), max(self._words.total(), 1)
        usual = self.usual if len(latents) >= FEWEST else None
        drift = {} if usual is None else {"latent_drift": usual.drift(latents)}
        unsure = [said.entropy for said in outputs if said.entropy is not None and math.isfinite(said.entropy)]
        entropy = {"token_entropy_nats": sum(unsure) / len(unsure)} if unsure else {}
        return {
            "outputs": len(outputs),
            "distinct_ratio": len(self._texts) / count,
            "top_ratio": max(self._texts.values(), default=0) / count,
            "top_word_ratio": max(self._words.values(), default=0) / words,
            "entropy_nats": entropy_nats(self._words.values()),
            "distinct_1": len(self._words) / words,
            "distinct_2": len(self._pairs) / max(self._pairs.total(), 1),
            "repetition_ratio": sum(said.repetition for said in outputs) / count,
            "empty_ratio": sum(not said.words for said in outputs) / count,
            "truncated_ratio": sum(said.cut for said in outputs) / count,
            "latents": len(latents),
            "latent_similarity": similarity(latents),
            **entropy,
            **drift,
        }


class Metrics:
    """Counters of requests, and the latest outputs of each bridge; ``bridges`` says what its latents usually are."""

    def __init__(
        self,
        bridges: Mapping[str, LatentStatistics | None] = MappingProxyType({}),
        buckets: Sequence[float] = LATENCY_SECONDS,
    ) -> None:
        self.registry = r = CollectorRegistry()
        self.requests = Counter("latentwire_requests", "Requests answered.", ["route", "status"], registry=r)
        self.outcomes = Counter(
            "latentwire_outcomes",
            "Requests for work by how they ended: ok, invalid, refused, aborted by the caller, late, failed; a stream "
            "by its end.",
            ["route", "bridge", "outcome"], registry=r,
        )  # fmt: skip
        self.refusals = Counter(
            "latentwire_refusals", "Requests for work that were not taken on, by the type in the error body.",
            ["reason"], registry=r,
        )  # fmt: skip
        self.latency = Histogram(
            "latentwire_request_seconds", "Request to answer, or to the end of a stream.", ["route"], buckets=buckets,
            registry=r,
        )  # fmt: skip
        self.encode_seconds = Histogram(
            "latentwire_encode_seconds", "Until all latents of a request were there, from the cache or the sender.",
            ["bridge"], buckets=buckets, registry=r,
        )  # fmt: skip
        self.first_token = Histogram(
            "latentwire_first_token_seconds", "From the arrival of a request to the first token of each output.",
            ["bridge"], buckets=buckets, registry=r,
        )  # fmt: skip
        self.inter_token = Histogram(
            "latentwire_inter_token_seconds", "Between the tokens of an output, mean over the output.", ["bridge"],
            buckets=buckets, registry=r,
        )  # fmt: skip
        self.tokens = Counter(
            "latentwire_tokens", "Tokens by kind: source, prompt, soft, generated.", ["kind"], registry=r
        )
        self.latent_bytes = Histogram(
            "latentwire_latent_bytes", "Messages made of texts, as they cross the wire.", ["bridge"], buckets=BYTES,
            registry=r,
        )  # fmt: skip
        self.cached = Counter(
            "latentwire_encode_cache", "Texts looked up, by result: hit, miss.", ["result"], registry=r
        )
        self.lookups = Counter(
            "latentwire_latent_lookups",
            "Requests that name latents by id, by result: all of them were there (hit), miss, error.",
            ["result"],
            registry=r,
        )
        self.ignored = Counter(
            "latentwire_ignored_fields", "Fields of /v1 that were taken and not used.", ["field"], registry=r
        )
        self.gated = Counter(
            "latentwire_gated_answers", "Answers with a fallback, by where they come from: latent, text.",
            ["bridge", "answered_from"], registry=r,
        )  # fmt: skip
        self.trust = Histogram(
            "latentwire_trust", "Trust in the latent's answer, where a fallback was asked for.", ["bridge"],
            buckets=TRUST, registry=r,
        )  # fmt: skip
        self.windows = {name: Window(usual) for name, usual in bridges.items()}
        self._begin_at_zero()

    def _begin_at_zero(self) -> None:
        self.ignored.labels(OTHER)
        for counter, values in (
            (self.refusals, REASONS), (self.tokens, KINDS), (self.cached, LOOKUPS[:2]), (self.lookups, LOOKUPS),
        ):  # fmt: skip
            for value in values:
                counter.labels(value)
        for route in ROUTES:
            self.latency.labels(route)
            self.requests.labels(route, "200")
        for bridge in self.windows:
            for metric in (self.encode_seconds, self.first_token, self.inter_token, self.latent_bytes, self.trust):
                metric.labels(bridge)
            for answered_from in ("latent", "text"):
                self.gated.labels(bridge, answered_from)
            for route in ROUTES:
                for outcome in OUTCOMES:
                    self.outcomes.labels(route, bridge, outcome)

    def observe_end(self, route: str, status: int, seconds: float, bridge: str, ended: int) -> None:
        """Count a request that is over; ``ended`` is the status that its end deserves, which a stream learns late."""
        self.requests.labels(route, str(status)).inc()
        self.latency.labels(route).observe(seconds)
        if route in ROUTES:
            self.outcomes.labels(route, bridge, outcome_of(ended)).inc()

    def observe_refusal(self, kind: str) -> None:
        """Count a request that was not taken on, if its error is one of ``REASONS``."""
        if kind in REASONS:
            self.refusals.labels(kind).inc()

    def observe_gate(self, bridge: str, judged: Judged) -> None:
        """Count where the answers of a request with a fallback come from."""
        for answered_from, trust in judged:
            self.gated.labels(bridge, answered_from).inc()
            self.trust.labels(bridge).observe(trust)

    def observe_usage(self, usage: Usage) -> None:
        """Count the tokens of a request, however it ended."""
        self.tokens.labels("source").inc(usage.source_tokens)
        self.tokens.labels("prompt").inc(usage.prompt_tokens)
        self.tokens.labels("soft").inc(usage.soft_tokens)
        self.tokens.labels("generated").inc(usage.generated_tokens)

    def observe_latents(self, bridge: str, seconds: float, messages: Iterable[bytes]) -> None:
        """Count the latents of a request."""
        self.encode_seconds.labels(bridge).observe(seconds)
        for message in messages:
            self.latent_bytes.labels(bridge).observe(len(message))

    def observe_times(
        self, bridge: str, arrived: float, times: Iterable[Times | None], answers: Sequence[Generation]
    ) -> None:
        """When the first and the last token of each answer came, by the clock of ``arrived``: ``time.monotonic()``,
        which processes of one machine share."""
        for at, answer in zip(times, answers, strict=True):
            if at is None:
                continue
            self.first_token.labels(bridge).observe(at.first - arrived)
            if answer.token_count > 1:
                self.inter_token.labels(bridge).observe((at.last - at.first) / (answer.token_count - 1))

    def window(self, bridge: str) -> Window:
        """The latest of a bridge: over many outputs a collapse shows, in one it may not."""
        return self.windows.setdefault(bridge, Window())
