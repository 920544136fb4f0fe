"""What Prometheus sees. One registry per application, so that tests can build many."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

import psutil
import torch
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric

from bridge.diversity import diversity
from bridge.residency import Residency
from service.batching import Load

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
        self._latest: dict[str, deque[str]] = {}
        r.register(_Live(residency, load, ready, self._latest))

    def observe_outputs(self, bridge: str, texts: list[str]) -> None:
        """Remember new outputs: over many requests a collapse shows, in one it may not."""
        self._latest.setdefault(bridge, deque(maxlen=WINDOW)).extend(texts)


class _Live:
    """Values read when Prometheus asks."""

    def __init__(
        self, residency: Residency, load: Load, ready: Callable[[], bool], latest: Mapping[str, Sequence[str]]
    ) -> None:
        self.residency, self.load, self.ready, self.latest = residency, load, ready, latest

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("latentwire_ready", "1 once warmed up.", value=float(self.ready()))
        yield GaugeMetricFamily("latentwire_queue_rows", "Rows waiting.", value=self.load.waiting)
        yield GaugeMetricFamily("latentwire_running_rows", "Rows in a batch.", value=self.load.running)
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
        measured = {bridge: diversity(list(texts)) for bridge, texts in list(self.latest.items())}
        for name, attribute, said in DIVERSITY:
            gauge = GaugeMetricFamily(f"latentwire_output_{name}", said, labels=["bridge"])
            for bridge, values in measured.items():
                gauge.add_metric([bridge], getattr(values, attribute))
            yield gauge
        budget = self.residency.budget_bytes
        yield GaugeMetricFamily("latentwire_memory_budget_bytes", "0 when unlimited.", value=budget or 0)
