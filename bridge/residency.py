"""Models in memory, one loaded at a time, never more than the budget.

Sequential loading here is real: a model that would not fit beside the others is loaded only after idle ones
have been dropped; what came back is measured and logged.
"""

import gc
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil
import torch
from torch.distributed.tensor import DTensor

from bridge.devices import default_device, default_dtype
from bridge.errors import InsufficientMemory
from bridge.models import FrozenLM, load_model, predicted_bytes

log = logging.getLogger(__name__)


@dataclass
class _Resident:
    lm: FrozenLM
    bytes: int
    users: int = 0


@dataclass
class Residency:
    """Holds frozen models by name within ``budget_bytes`` (None: no limit).

    ``history`` keeps the last events as (event, model, resident bytes after it), so that an operator, or a
    test, can see in which order models came and went. ``loading`` names the model being read right now.
    """

    budget_bytes: int | None = None
    device: torch.device = field(default_factory=default_device)
    dtype: torch.dtype | None = None
    load: Callable[..., FrozenLM] = load_model
    history: list[tuple[str, str, int]] = field(default_factory=list)
    loading: str | None = None
    _models: OrderedDict[str, _Resident] = field(default_factory=OrderedDict)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def resident_bytes(self) -> int:
        """Bytes of all weights now held."""
        return sum(resident.bytes for resident in self._models.values())

    def resident(self) -> dict[str, int]:
        """Weights in bytes by model name, least recently used first."""
        return {name: resident.bytes for name, resident in list(self._models.items())}

    @contextmanager
    def use(self, name: str) -> Iterator[FrozenLM]:
        """Lend a model, loading it first where needed; it is not dropped while lent.

        Raises:
            InsufficientMemory: It does not fit the budget beside the models in use, or alone.
            ModelUnavailable: As ``load_model``.
        """
        with self._lock:
            resident = self._models.get(name) or self._bring_in(name)
            self._models.move_to_end(name)
            resident.users += 1
        try:
            yield resident.lm
        finally:
            with self._lock:
                resident.users -= 1

    def release(self, name: str) -> None:
        """Drop a model that will not be needed soon, whatever the budget says; nothing happens while it is lent."""
        with self._lock:
            if name in self._models and self._models[name].users == 0:
                self._drop(name)

    def predict(self, name: str) -> int:
        """Bytes a model's weights will take here; nothing is loaded.

        Raises:
            InsufficientMemory: More than the whole budget.
            ModelUnavailable: As ``predicted_bytes``.
        """
        need = predicted_bytes(name, self.dtype or default_dtype(self.device))
        if self.budget_bytes is not None and need > self.budget_bytes:
            raise InsufficientMemory(f"{name!r} needs {need} bytes; the memory budget is {self.budget_bytes}")
        return need

    def _bring_in(self, name: str) -> _Resident:
        self._make_room(name, self.predict(name))
        self.loading = name
        try:
            lm = self.load(name, device=self.device, dtype=self.dtype)
        finally:
            self.loading = None
        held = [t.to_local() if isinstance(t, DTensor) else t for t in lm.model.parameters()]  # a shard counts alone
        actual = sum(t.nbytes for t in {t.data_ptr(): t for t in held}.values())
        resident = self._models[name] = _Resident(lm, actual)
        self._note("load", name)
        return resident

    def _make_room(self, name: str, need: int) -> None:
        if self.budget_bytes is None:
            return
        while self.resident_bytes + need > self.budget_bytes:
            idle = next((key for key, resident in self._models.items() if resident.users == 0), None)
            if idle is None:
                raise InsufficientMemory(
                    f"{name!r} needs {need} bytes; {self.resident_bytes} of the {self.budget_bytes} are in use"
                )
            self._drop(idle)

    def _drop(self, name: str) -> None:
        before = allocated_bytes(self.device)
        resident = self._models.pop(name)
        expected = resident.bytes
        del resident
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        freed = before - allocated_bytes(self.device)
        self._note("drop", name)
        log.info("dropped %s: %d bytes of weights, %d bytes came back", name, expected, freed)

    def _note(self, event: str, name: str) -> None:
        self.history.append((event, name, self.resident_bytes))
        del self.history[:-256]


def allocated_bytes(device: torch.device) -> int:
    """Memory this process holds: allocated on the accelerator, or resident on the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return int(psutil.Process().memory_info().rss)
