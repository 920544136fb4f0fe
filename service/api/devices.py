"""Gauges of the devices that models are on: memory by kind, and where the driver tells, use and power."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from latentwire.bridge.memory import device_bytes, free_bytes, held_bytes, largest_bytes

TOLD: Mapping[str, Callable[[torch.device], float]] = {
    "utilization_ratio": lambda card: torch.cuda.utilization(card) / 100,
    "power_watts": lambda card: torch.cuda.power_draw(card) / 1000,
}
MEANING = {
    "utilization_ratio": "Share of the time in which the device computed, from the driver (package nvidia-ml-py).",
    "power_watts": "What the device draws, from the driver (package nvidia-ml-py).",
}


class DeviceCollector(Collector):
    """Reads devices; labels are their names, as ``cuda:0``."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self.devices = sorted({_numbered(device) for device in devices}, key=str)

    def collect(self) -> Iterator[Metric]:
        """Every gauge, with its value now."""
        memory = GaugeMetricFamily(
            "latentwire_memory_bytes",
            "Memory by device and kind. total and free are the device's, whoever uses it (of a CPU the machine's, or "
            "the container's); the rest is this process's: resident on a CPU, and of an accelerator what the allocator "
            "has given out (allocated), most of it so far (peak), what it holds (reserved), and of that what it could "
            "not use again yet (inactive).",
            labels=["device", "kind"],
        )
        retries = CounterMetricFamily(
            "latentwire_allocator_retries",
            "Times the allocator had to give memory back to get more.",
            labels=["device"],
        )
        for device in self.devices:
            for kind, size in _memory(device).items():
                memory.add_metric([str(device), kind], size)
            if device.type == "cuda":
                retries.add_metric([str(device)], torch.cuda.memory_stats(device).get("num_alloc_retries", 0))
        yield from (memory, retries)
        for name, ask in TOLD.items():
            gauge = GaugeMetricFamily(f"latentwire_device_{name}", MEANING[name], labels=["device"])
            for device in self.devices:
                if device.type == "cuda":
                    with suppress(Exception):  # no package, no rights, or a card that does not tell: not our trouble
                        gauge.add_metric([str(device)], ask(device))
            yield gauge


def _numbered(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _memory(device: torch.device) -> dict[str, float]:
    if device.type != "cuda":
        return {"resident": held_bytes(device), "free": free_bytes(device), "total": device_bytes(device)}
    free, total = torch.cuda.mem_get_info(device)
    stats: dict[str, Any] = torch.cuda.memory_stats(device)
    return {
        "allocated": torch.cuda.memory_allocated(device),
        "reserved": torch.cuda.memory_reserved(device),
        "inactive": stats.get("inactive_split_bytes.all.current", 0),
        "peak": largest_bytes(device),
        "free": free,
        "total": total,
    }
