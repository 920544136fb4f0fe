"""What Prometheus sees. One registry per application, so that tests can build many."""

from collections import deque
from collections.abc import Callable, Iterator

import psutil
import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric

from bridge.diversity import diversity
from bridge.residency import Residency
from service.batching import Load

WINDOW = 256  # latest outputs of a bridge over which diversity is measured
LATENCY_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
ROWS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters and gauges of a service."""

    def __init__(self, residency: Residency, load: Load, ready: Callable[[], bool]) -> None:
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
            "Start of a batch to its first token.",
            buckets=LATENCY_SECONDS,
            registry=r,
        )
        self.tokens = Counter("latentwire_tokens", "Tokens by kind: source, soft, generated.", ["kind"], registry=r)
        self.distinct = Gauge(
            "latentwire_output_distinct_ratio", "Different outputs among the latest.", ["bridge"], registry=r
        )
        self.top_output = Gauge(
            "latentwire_output_top_ratio", "Share of the commonest of the latest outputs.", ["bridge"], registry=r
        )
        self.entropy = Gauge(
            "latentwire_output_entropy_nats", "Word entropy of the latest outputs.", ["bridge"], registry=r
        )
        self.distinct_2 = Gauge(
            "latentwire_output_distinct_2", "Different word pairs among the latest outputs.", ["bridge"], registry=r
        )
        self._latest: dict[str, deque[str]] = {}
        r.register(_Live(residency, load, ready))

    def observe_outputs(self, bridge: str, texts: list[str]) -> None:
        """Fold new outputs into the bridge's diversity: over many requests a collapse shows, in one it may not."""
        latest = self._latest.setdefault(bridge, deque(maxlen=WINDOW))
        latest.extend(texts)
        measured = diversity(latest)
        self.distinct.labels(bridge).set(measured.distinct_ratio)
        self.top_output.labels(bridge).set(measured.top_output_ratio)
        self.entropy.labels(bridge).set(measured.entropy_nats)
        self.distinct_2.labels(bridge).set(measured.distinct_2)


class _Live:
    """Values read when Prometheus asks."""

    def __init__(self, residency: Residency, load: Load, ready: Callable[[], bool]) -> None:
        self.residency, self.load, self.ready = residency, load, ready

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("latentwire_ready", "1 once warmed up.", value=float(self.ready()))
        yield GaugeMetricFamily("latentwire_queue_rows", "Rows waiting.", value=self.load.waiting)
        yield GaugeMetricFamily("latentwire_running_rows", "Rows on the device.", value=self.load.running)
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
        for name, size in self.residency.resident().items():
            models.add_metric([name], size)
        yield models
        budget = self.residency.budget_bytes
        yield GaugeMetricFamily("latentwire_memory_budget_bytes", "0 when unlimited.", value=budget or 0)
