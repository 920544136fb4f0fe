"""What Prometheus sees. One registry per application, so that tests can build many."""

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

import psutil
import torch
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from latentwire.bridge.diversity import diversity
from latentwire.service.lenient import OTHER
from latentwire.service.schemas import Usage

if TYPE_CHECKING:
    from latentwire.service.runtime import Runtime, Said

WINDOW = 256  # latest outputs of a bridge over which diversity is measured
LATENCY_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
DIVERSITY = (
    ("distinct_ratio", "distinct_ratio", "Different outputs among the latest."),
    ("top_ratio", "top_output_ratio", "Share of the commonest of the latest outputs."),
    ("entropy_nats", "entropy_nats", "Word entropy of the latest outputs."),
    ("distinct_2", "distinct_2", "Different word pairs among the latest outputs."),
)
ROWS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters and gauges of a service."""

    def __init__(self, runtime: "Runtime") -> None:
        self.registry = r = CollectorRegistry()
        self.requests = Counter("latentwire_requests", "Requests answered.", ["route", "status"], registry=r)
        self.latency = Histogram(
            "latentwire_request_seconds", "Request to answer.", ["route"], buckets=LATENCY_SECONDS, registry=r
        )
        self.batch_rows = Histogram("latentwire_batch_rows", "Rows per batch.", ["half"], buckets=ROWS, registry=r)
        self.device_seconds = Histogram(
            "latentwire_device_seconds", "One batch on the device.", ["half"], buckets=LATENCY_SECONDS, registry=r
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
        self.latest: dict[str, deque[str]] = {}
        r.register(_Live(runtime, self))

    def observe(self, bridge: str, said: "Said", usage: Usage) -> None:
        """Count what a request brought. Its outputs are remembered: over many a collapse shows, in one it may not."""
        self.tokens.labels("source").inc(usage.source_tokens)
        self.tokens.labels("prompt").inc(usage.prompt_tokens)
        self.tokens.labels("soft").inc(usage.soft_tokens)
        self.tokens.labels("generated").inc(usage.generated_tokens)
        for seconds in said.first_token_seconds:
            self.first_token.observe(seconds)
        self.latest.setdefault(bridge, deque(maxlen=WINDOW)).extend(answer.text for answer in said.answers)


class _Live:
    """Values read when Prometheus asks."""

    def __init__(self, runtime: "Runtime", metrics: Metrics) -> None:
        self.runtime, self.latest = runtime, metrics.latest

    def collect(self) -> Iterator[Metric]:
        runtime = self.runtime
        engines, load, residency = runtime.engines.all(), runtime.load, runtime.residency
        yield GaugeMetricFamily("latentwire_ready", "1 once warmed up.", value=float(runtime.ready))
        yield GaugeMetricFamily("latentwire_queue_rows", "Rows waiting.", value=load.waiting)
        generating = sum(engine.running for engine in engines)
        yield GaugeMetricFamily("latentwire_running_rows", "Rows in a batch.", value=load.running + generating)
        yield GaugeMetricFamily("latentwire_admitted_rows", "Rows accepted, not answered yet.", value=load.admitted)
        oom = load.out_of_memory + sum(engine.out_of_memory for engine in engines)
        yield CounterMetricFamily("latentwire_out_of_memory", "Batches that memory was too small for.", value=oom)
        yield GaugeMetricFamily(
            "latentwire_store_available", "1 while the store answers.", value=float(runtime.store.available)
        )
        yield CounterMetricFamily(
            "latentwire_store_failures", "Calls the store did not answer.", value=runtime.store.failures
        )
        evaluations = GaugeMetricFamily("latentwire_evaluations", "Evaluations not finished yet.", labels=["state"])
        for state in ("queued", "running"):
            evaluations.add_metric([state], runtime.jobs.counts()[state])
        yield evaluations
        memory = GaugeMetricFamily("latentwire_memory_bytes", "Memory of this process.", labels=["kind"])
        memory.add_metric(["cpu_resident"], psutil.Process().memory_info().rss)
        if torch.cuda.is_available():
            memory.add_metric(["gpu_allocated"], torch.cuda.memory_allocated())
            memory.add_metric(["gpu_reserved"], torch.cuda.memory_reserved())
            free, total = torch.cuda.mem_get_info()
            memory.add_metric(["gpu_free"], free)
            memory.add_metric(["gpu_total"], total)
        yield memory
        models = GaugeMetricFamily("latentwire_model_bytes", "Weights of models now loaded.", labels=["model"])
        for name, size in residency.resident().items():
            models.add_metric([name], size)
        yield models
        measured = {bridge: diversity(list(texts)) for bridge, texts in list(self.latest.items())}
        for name, attribute, said in DIVERSITY:
            gauge = GaugeMetricFamily(f"latentwire_output_{name}", said, labels=["bridge"])
            for bridge, values in measured.items():
                gauge.add_metric([bridge], getattr(values, attribute))
            yield gauge
        budget = residency.budget_bytes
        yield GaugeMetricFamily("latentwire_memory_budget_bytes", "0 when unlimited.", value=budget or 0)
