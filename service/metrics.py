"""What Prometheus sees. One registry per application, so that tests can build many."""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Histogram

from latentwire.bridge.gate import Judged
from latentwire.service.schemas.inference import Usage
from latentwire.service.schemas.lenient import OTHER

WINDOW = 256  # latest outputs of a bridge over which diversity is measured
LATENCY_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TRUST = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 1)
ROWS = (1, 2, 4, 8, 16, 32, 64)


class ModelMetrics:
    """Counters of what runs on models; of the process that holds them."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        self.batch_rows = Histogram("latentwire_batch_rows", "Rows per batch.", ["half"], buckets=ROWS, registry=r)
        self.device_seconds = Histogram(
            "latentwire_device_seconds", "One batch on the device.", ["half"], buckets=LATENCY_SECONDS, registry=r
        )

    def observe_batch(self, half: str, rows: int, seconds: float) -> None:
        """Count a batch: of ``encode``, ``generate`` or ``score``."""
        self.batch_rows.labels(half).observe(rows)
        self.device_seconds.labels(half).observe(seconds)

    @contextmanager
    def batch(self, half: str, rows: int) -> Iterator[None]:
        """Count a batch, which is what the block runs; also one that fails."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.observe_batch(half, rows, time.perf_counter() - started)


class Metrics:
    """Counters of requests, and the latest outputs of each bridge."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        self.requests = Counter("latentwire_requests", "Requests answered.", ["route", "status"], registry=r)
        self.latency = Histogram(
            "latentwire_request_seconds", "Request to answer.", ["route"], buckets=LATENCY_SECONDS, registry=r
        )
        self.first_token = Histogram(
            "latentwire_first_token_seconds",
            "From joining the engine to the first token.",
            buckets=LATENCY_SECONDS,
            registry=r,
        )
        self.tokens = Counter(
            "latentwire_tokens", "Tokens by kind: source, prompt, soft, generated.", ["kind"], registry=r
        )
        self.cached = Counter(
            "latentwire_encode_cache", "Texts looked up, by result: hit, miss.", ["result"], registry=r
        )
        self.ignored = Counter(
            "latentwire_ignored_fields", "Fields of /v1 that were taken and not used.", ["field"], registry=r
        )
        self.ignored.labels(OTHER)
        self.gated = Counter(
            "latentwire_gated_answers", "Answers with a fallback, by where they come from: latent, text.",
            ["bridge", "answered_from"], registry=r,
        )  # fmt: skip
        self.trust = Histogram(
            "latentwire_trust", "Trust in the latent's answer, where a fallback was asked for.", ["bridge"],
            buckets=TRUST, registry=r,
        )  # fmt: skip
        self.latest: dict[str, deque[str]] = {}

    def observe_gate(self, bridge: str, judged: Judged) -> None:
        """Count where the answers of a request with a fallback come from."""
        for answered_from, trust in judged:
            self.gated.labels(bridge, answered_from).inc()
            self.trust.labels(bridge).observe(trust)

    def observe(self, bridge: str, texts: Iterable[str], first_token_seconds: Iterable[float], usage: Usage) -> None:
        """Count what a request brought. Its outputs are remembered: over many a collapse shows, in one it may not."""
        self.tokens.labels("source").inc(usage.source_tokens)
        self.tokens.labels("prompt").inc(usage.prompt_tokens)
        self.tokens.labels("soft").inc(usage.soft_tokens)
        self.tokens.labels("generated").inc(usage.generated_tokens)
        for seconds in first_token_seconds:
            self.first_token.observe(seconds)
        self.latest.setdefault(bridge, deque(maxlen=WINDOW)).extend(texts)
