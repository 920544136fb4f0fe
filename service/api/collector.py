"""Gauges that are read when Prometheus asks: of models, queues, stores and the latest outputs."""

from collections import Counter
from collections.abc import Iterator
from typing import get_args

import psutil
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from latentwire.service.api.devices import DeviceCollector
from latentwire.service.evaluations.jobs import Jobs
from latentwire.service.inference.models import LocalModels
from latentwire.service.inference.runtime import Runtime
from latentwire.service.metrics import HALVES
from latentwire.service.processes.peers import Peers
from latentwire.service.schemas.evaluations import UNFINISHED, State

WINDOW = {
    "outputs": "Outputs in the window that latentwire_output_… are measured over: the latest 256.",
    "distinct_ratio": "Different outputs among the latest.",
    "top_ratio": "Share of the commonest of the latest outputs.",
    "top_word_ratio": "Share of the commonest word of the latest outputs.",
    "entropy_nats": "Word entropy of the latest outputs.",
    "token_entropy_nats": "How unsure the receiver was: entropy of what a token was chosen from, before temperature, "
    "mean over an output's tokens, then over the latest outputs, those from a text among them. None on vLLM.",
    "distinct_1": "Different words among the words of the latest outputs.",
    "distinct_2": "Different word pairs among the latest outputs.",
    "repetition_ratio": "Share of an output's runs of four words that it has said before, mean of the latest.",
    "empty_ratio": "Share of the latest outputs that say nothing.",
    "truncated_ratio": "Share of the latest outputs that their limit of tokens cut.",
    "latents": "Latents in the window: of the latest 256 texts that were not in the cache.",
    "latent_similarity": "Mean cosine between the mean slots of those latents; 1 where texts make no difference.",
    "latent_drift": "Distance between the mean of those latents and that of the training texts', in standard "
    "deviations of a single text's; from 64 on, where the checkpoint has statistics.",
}
NAMES = {"outputs": "output_window", "latents": "latent_window"}
NAMES |= {name: name for name in WINDOW if name.startswith("latent_")}


def register(runtime: Runtime, jobs: Jobs | None) -> None:
    """Let the models of this process be read whenever Prometheus asks; without ``jobs`` nothing is evaluated here."""
    registry = runtime.local.measures.registry
    registry.register(ModelCollector(runtime, runtime.local, jobs))
    registry.register(DeviceCollector(held.device for held in runtime.local.residencies))


class RequestCollector(Collector):
    """Reads what answers requests; registered beside its counters."""

    def __init__(self, runtime: Runtime, peers: Peers) -> None:
        self.runtime, self.peers = runtime, peers

    def collect(self) -> Iterator[Metric]:
        """Every gauge, with its value now."""
        runtime = self.runtime
        stalled = runtime.models.stalled or bool(self.peers.hanging(runtime.settings.stall_timeout))
        yield GaugeMetricFamily(
            "latentwire_admitted_rows", "Rows accepted, not answered yet.", value=runtime.admission.admitted
        )
        yield GaugeMetricFamily(
            "latentwire_admitted_rows_limit",
            "Rows accepted at once before 429, by all HTTP processes together.",
            value=runtime.admission.limit,
        )
        yield GaugeMetricFamily(
            "latentwire_stalled",
            "1 while there is work and nothing moves, or another process that answers HTTP does not.",
            value=float(stalled),
        )
        yield GaugeMetricFamily(
            "latentwire_store_available", "1 while the store answers.", value=float(runtime.store.available)
        )
        yield CounterMetricFamily(
            "latentwire_store_failures", "Calls the store did not answer.", value=runtime.store.failures
        )
        yield GaugeMetricFamily(
            "latentwire_http_resident_bytes",
            "Resident memory of the process that answers HTTP.",
            value=psutil.Process().memory_info().rss,
        )
        measured = {bridge: window.measured() for bridge, window in list(runtime.metrics.windows.items())}
        for name, meaning in WINDOW.items():
            gauge = GaugeMetricFamily(f"latentwire_{NAMES.get(name, f'output_{name}')}", meaning, labels=["bridge"])
            for bridge, values in measured.items():
                if name in values:
                    gauge.add_metric([bridge], values[name])
            yield gauge


class ModelCollector(Collector):
    """Reads the models of this process and what runs on them; registered beside their counters."""

    def __init__(self, runtime: Runtime, models: LocalModels, jobs: Jobs | None) -> None:
        self.runtime, self.models, self.jobs = runtime, models, jobs

    def collect(self) -> Iterator[Metric]:
        """Every gauge, with its value now."""
        yield GaugeMetricFamily("latentwire_ready", "1 once warmed up.", value=float(self.models.ready))
        yield from self._rows()
        yield from self._residency()
        yield from self._caches()
        if self.jobs is not None:
            yield from self._evaluations(self.jobs)

    def _rows(self) -> Iterator[Metric]:
        engines, admission = self.models.engines.all(), self.runtime.admission
        waiting = sum(engine.waiting for engine in engines)
        generating = max(sum(engine.running for engine in engines) - waiting, 0)
        yield GaugeMetricFamily("latentwire_queue_rows", "Rows waiting.", value=admission.waiting + waiting)
        yield GaugeMetricFamily("latentwire_running_rows", "Rows in a batch.", value=admission.running + generating)
        shortages = CounterMetricFamily(
            "latentwire_out_of_memory", "Batches that memory was too small for.", labels=["half"]
        )
        counts = {**admission.out_of_memory, "generate": self.models.engines.total("out_of_memory")}
        for half in HALVES:
            shortages.add_metric([half], counts.get(half, 0))
        yield shortages
        yield CounterMetricFamily(
            "latentwire_preemptions",
            "Outputs that gave up their place in a full key/value cache, and were read again.",
            value=self.models.engines.total("preemptions"),
        )

    def _residency(self) -> Iterator[Metric]:
        residencies = self.models.residencies
        models = GaugeMetricFamily("latentwire_model_bytes", "Weights of models now loaded.", labels=["model"])
        resident, counts, seconds = Counter[str](), Counter[tuple[str, str]](), Counter[str]()
        for held in residencies:
            resident.update(held.resident())
            counts.update(held.counts)
            seconds.update(held.load_seconds)
        for name, size in resident.items():
            models.add_metric([name], size)
        yield models
        loads = CounterMetricFamily("latentwire_model_loads", "Times a model was loaded.", labels=["model"])
        drops = CounterMetricFamily("latentwire_model_unloads", "Times a model was dropped.", labels=["model"])
        took = CounterMetricFamily("latentwire_model_load_seconds", "Time that loading took.", labels=["model"])
        for name in sorted(self.models.names):
            loads.add_metric([name], counts["load", name])
            drops.add_metric([name], counts["drop", name])
            took.add_metric([name], seconds[name])
        yield from (loads, drops, took)
        budget = sum(held.budget_bytes or 0 for held in residencies)
        yield GaugeMetricFamily("latentwire_memory_budget_bytes", "0 when unlimited.", value=budget)

    def _caches(self) -> Iterator[Metric]:
        tokens = GaugeMetricFamily("latentwire_kv_tokens", "Of key/value caches.", labels=["model", "kind"])
        blocks = GaugeMetricFamily(
            "latentwire_kv_blocks", "Blocks of key/value caches, of 16 tokens each.", labels=["model", "kind"]
        )
        share = GaugeMetricFamily("latentwire_kv_usage_ratio", "Share of a key/value cache in use.", labels=["model"])
        for engine in self.models.engines.all():
            for kind, count in {"room": engine.kv_tokens, "used": engine.kv_tokens_used}.items():
                tokens.add_metric([engine.lm.name, kind], count)
                blocks.add_metric([engine.lm.name, kind], count // engine.block_tokens)
            share.add_metric([engine.lm.name], engine.kv_tokens_used / max(engine.kv_tokens, 1))
        yield from (tokens, blocks, share)

    def _evaluations(self, jobs: Jobs) -> Iterator[Metric]:
        going = GaugeMetricFamily("latentwire_evaluations", "Evaluations not finished yet.", labels=["state"])
        ended = CounterMetricFamily(
            "latentwire_evaluations_finished", "Evaluations by how they ended.", labels=["state"]
        )
        for state in get_args(State):
            if state in UNFINISHED:
                going.add_metric([state], jobs.counts()[state])
            else:
                ended.add_metric([state], jobs.finished[state])
        yield from (going, ended)
        score = GaugeMetricFamily(
            "latentwire_evaluation_score",
            "Score of a bridge and of what it is compared with in its last evaluation here, by condition.",
            labels=["bridge", "task", "condition"],
        )
        for (bridge, task), report in jobs.latest.items():
            for condition, row in report["conditions"].items():
                score.add_metric([bridge, task, condition], row["value"])
        yield score
