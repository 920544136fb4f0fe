"""Gauges that are read when Prometheus asks: of memory, models, queues, stores and the latest outputs."""

from collections import Counter
from collections.abc import Iterator

import psutil
import torch
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from latentwire.bridge.diversity import diversity
from latentwire.service.evaluations.jobs import Jobs
from latentwire.service.inference.models import LocalModels
from latentwire.service.inference.runtime import Runtime

DIVERSITY = (
    ("distinct_ratio", "distinct_ratio", "Different outputs among the latest."),
    ("top_ratio", "top_output_ratio", "Share of the commonest of the latest outputs."),
    ("entropy_nats", "entropy_nats", "Word entropy of the latest outputs."),
    ("distinct_2", "distinct_2", "Different word pairs among the latest outputs."),
)


class RequestCollector(Collector):
    """Reads what answers requests; registered beside its counters."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def collect(self) -> Iterator[Metric]:
        """Every gauge, with its value now."""
        runtime = self.runtime
        yield GaugeMetricFamily(
            "latentwire_admitted_rows", "Rows accepted, not answered yet.", value=runtime.admission.admitted
        )
        yield GaugeMetricFamily(
            "latentwire_store_available", "1 while the store answers.", value=float(runtime.store.available)
        )
        yield CounterMetricFamily(
            "latentwire_store_failures", "Calls the store did not answer.", value=runtime.store.failures
        )
        measured = {bridge: diversity(list(texts)) for bridge, texts in list(runtime.metrics.latest.items())}
        for name, attribute, meaning in DIVERSITY:
            gauge = GaugeMetricFamily(f"latentwire_output_{name}", meaning, labels=["bridge"])
            for bridge, values in measured.items():
                gauge.add_metric([bridge], getattr(values, attribute))
            yield gauge


class ModelCollector(Collector):
    """Reads the models of this process and what runs on them; registered beside their counters."""

    def __init__(self, runtime: Runtime, models: LocalModels, jobs: Jobs) -> None:
        self.runtime, self.models, self.jobs = runtime, models, jobs

    def collect(self) -> Iterator[Metric]:
        """Every gauge, with its value now."""
        engines, admission, residencies = self.models.engines.all(), self.runtime.admission, self.models.residencies
        yield GaugeMetricFamily("latentwire_ready", "1 once warmed up.", value=float(self.models.ready))
        yield GaugeMetricFamily("latentwire_queue_rows", "Rows waiting.", value=admission.waiting)
        generating = sum(engine.running for engine in engines)
        yield GaugeMetricFamily("latentwire_running_rows", "Rows in a batch.", value=admission.running + generating)
        oom = admission.out_of_memory + sum(engine.out_of_memory for engine in engines)
        yield CounterMetricFamily("latentwire_out_of_memory", "Batches that memory was too small for.", value=oom)
        evaluations = GaugeMetricFamily("latentwire_evaluations", "Evaluations not finished yet.", labels=["state"])
        for state in ("queued", "running"):
            evaluations.add_metric([state], self.jobs.counts()[state])
        yield evaluations
        memory = GaugeMetricFamily("latentwire_memory_bytes", "Memory of this process.", labels=["kind"])
        memory.add_metric(["cpu_resident"], psutil.Process().memory_info().rss)
        cards = [held.device for held in residencies if held.device.type == "cuda"]
        if cards:
            memory.add_metric(["gpu_allocated"], sum(map(torch.cuda.memory_allocated, cards)))
            memory.add_metric(["gpu_reserved"], sum(map(torch.cuda.memory_reserved, cards)))
            memory.add_metric(["gpu_free"], sum(torch.cuda.mem_get_info(card)[0] for card in cards))
            memory.add_metric(["gpu_total"], sum(torch.cuda.mem_get_info(card)[1] for card in cards))
        yield memory
        models = GaugeMetricFamily("latentwire_model_bytes", "Weights of models now loaded.", labels=["model"])
        resident: Counter[str] = Counter()
        for held in residencies:
            resident.update(held.resident())
        for name, size in resident.items():
            models.add_metric([name], size)
        yield models
        tokens = GaugeMetricFamily("latentwire_kv_tokens", "Of key/value caches.", labels=["model", "kind"])
        for engine in engines:
            tokens.add_metric([engine.lm.name, "room"], engine.kv_tokens)
            tokens.add_metric([engine.lm.name, "used"], engine.kv_tokens_used)
        yield tokens
        budget = sum(held.budget_bytes or 0 for held in residencies)
        yield GaugeMetricFamily("latentwire_memory_budget_bytes", "0 when unlimited.", value=budget)
