"""The models of a service and what runs on them: encode, generate, score. Knows no HTTP and no store.

Encoding, loading and generating each have threads of their own, off the event loop, so models can take turns in memory
and the service answers health checks while one loads.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from prometheus_client import generate_latest

from latentwire.bridge import engine
from latentwire.bridge.bridge import Bridge
from latentwire.bridge.devices import device_named, dtype_named, is_out_of_memory, is_same
from latentwire.bridge.engine import Encoded
from latentwire.bridge.generation.base import Kind
from latentwire.bridge.memory import budget_bytes, free_caches, peak_bytes
from latentwire.bridge.models import pass_bytes
from latentwire.bridge.parking import HostCopies
from latentwire.bridge.reader import SourceTokens
from latentwire.bridge.residency import Residency
from latentwire.bridge.scoring import Continuation
from latentwire.service.inference.admission import Admission
from latentwire.service.inference.batching import Batcher
from latentwire.service.inference.engines import Engines
from latentwire.service.inference.request import Asked, GenerationResult, InFlightRequest, Piece
from latentwire.service.inference.scoring import ScoreItem, Scorers
from latentwire.service.metrics import ModelMetrics
from latentwire.service.settings import Settings

SWEEP_SECONDS = 1.0


@dataclass(frozen=True)
class InMemory:
    """What is in memory: bytes of each model, the kind of engine of each receiver, and which models stay."""

    bytes: dict[str, int]
    engines: dict[str, Kind]
    pinned: list[str]


class Models(Protocol):
    """What the HTTP side needs of models, wherever they run.

    ``on_cost`` is called at the end, also where an error is raised, with the tokens that reached a model.

    Attributes:
        ready: Whether every bridge has been loaded and has answered once.
        failure: Why it will never be ready.
        dead: Why nothing will ever be answered again: an engine has died.
        stalled: Work is there, no model is being loaded, and nothing has moved for ``stall_timeout`` seconds.
    """

    @property
    def ready(self) -> bool: ...
    @property
    def failure(self) -> str | None: ...
    @property
    def dead(self) -> str | None: ...
    @property
    def stalled(self) -> bool: ...

    async def start(self) -> None:
        """Begin; on the event loop."""

    async def stop(self) -> None:
        """Stop everything; whoever still waits gets an error."""

    async def encode(
        self, bridge: Bridge, sources: Sequence[SourceTokens], on_cost: Callable[[int], None]
    ) -> list[Encoded]:
        """Encode sources, batched with those of other requests."""

    async def generate(
        self,
        bridge: Bridge,
        receiver: str,
        asked: Sequence[Asked],
        on_piece: Callable[[Piece], None] | None,
        on_cost: Callable[[int], None],
    ) -> GenerationResult:
        """Generate outputs; each joins the receiver's running batch at its next step.

        ``on_piece`` is called on the event loop with every piece of text as it comes. Cancelled, outputs that are still
        generated are cancelled too.
        """

    async def score(
        self, bridge: Bridge, receiver: str, items: Sequence[ScoreItem], on_cost: Callable[[int], None]
    ) -> list[list[Continuation]]:
        """Score the continuations of inputs, with those of other requests."""

    async def in_memory(self) -> InMemory:
        """What is in memory now."""

    async def load(self, bridge: Bridge) -> None:
        """Bring a bridge's models into memory, one after the other, where they fit together."""

    async def unload(self, bridge: Bridge) -> int:
        """Drop a bridge's models; bytes that came back (ModelInUse)."""

    async def pin(self, bridge: Bridge, stay: bool) -> None:
        """Keep a bridge's models in memory, whoever needs their room; or no longer."""

    async def metrics(self) -> bytes:
        """What Prometheus should know of them, in its text format."""


class LocalModels:
    """Models in this process; see ``Models`` and the module."""

    def __init__(
        self, settings: Settings, bridges: Iterable[Bridge], receivers: Residency, senders: Residency,
        admission: Admission, on_death: Callable[[], None],
    ) -> None:  # fmt: skip
        self._settings, self._bridges, self._receivers, self._admission = settings, list(bridges), receivers, admission
        self._on_death = on_death
        self.residencies = [receivers] if senders is receivers else [receivers, senders]
        self.names = {name for bridge in self._bridges for name in bridge.model_names}
        self.sizes = settings.sizes(receivers.device)
        self.ready = False
        self.failure: str | None = None
        self.dead: str | None = None
        self.measures = ModelMetrics(settings.latency_buckets)
        self.engines = Engines(
            receivers,
            max_rows=self.sizes.max_batch,
            kv_tokens=settings.kv_tokens,
            cache_bytes=self._cache_bytes(),
            step_tokens=self.sizes.step_tokens,
            mode=self.sizes.step_mode,
            required=settings.require_engine,
            load_wait=settings.load_wait,
            on_death=self._died,
            on_step=partial(self.measures.observe_batch, "generate"),
            remote={name: url for bridge in self._bridges for name, url in bridge.remote.items()},
        )
        self.scorers = Scorers(receivers, admission, self.measures, self.sizes, settings.load_wait)
        self._device = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._encoders: dict[str, Batcher[SourceTokens, Encoded]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Start the batchers."""
        for bridge in self._bridges:
            sizes = self._settings.sizes(bridge.home(bridge.sender).device)
            self._encoders[bridge.name] = Batcher(
                partial(self._encode, bridge),
                max_batch=sizes.max_batch,
                max_batch_tokens=sizes.batch_tokens,
                cost=lambda source: len(source.ids),
                admission=self._admission,
                is_out_of_memory=is_out_of_memory,
                free_caches=free_caches,
                name="encode",
                on_wait=self.measures.queue_seconds.labels("encode").observe,
            )
            self._tasks.append(asyncio.create_task(self._encoders[bridge.name].serve()))
        self._tasks.append(asyncio.create_task(self._sweep()))

    async def stop(self) -> None:
        """Stop everything; whoever still waits gets an error."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.scorers.close()
        await self.engines.close()
        await asyncio.to_thread(self._device.shutdown)

    async def encode(
        self, bridge: Bridge, sources: Sequence[SourceTokens], on_cost: Callable[[int], None]
    ) -> list[Encoded]:
        """As ``Models.encode``."""
        read: list[int] = []
        try:
            return await self._encoders[bridge.name].submit(sources, lambda source: read.append(len(source.ids)))
        finally:
            on_cost(sum(read))

    async def generate(
        self,
        bridge: Bridge,
        receiver: str,
        asked: Sequence[Asked],
        on_piece: Callable[[Piece], None] | None,
        on_cost: Callable[[int], None],
    ) -> GenerationResult:
        """As ``Models.generate``."""
        async with self.engines.lend(receiver, bridge.check) as engine:
            in_flight = InFlightRequest(engine, bridge, receiver, asked, on_piece)
            try:
                return await in_flight.result()
            finally:
                on_cost(in_flight.generated_tokens)
                for seconds in in_flight.waited_seconds:
                    self.measures.queue_seconds.labels("generate").observe(seconds)

    async def score(
        self, bridge: Bridge, receiver: str, items: Sequence[ScoreItem], on_cost: Callable[[int], None]
    ) -> list[list[Continuation]]:
        """As ``Models.score``."""
        return await self.scorers.score(bridge, receiver, items, on_cost)

    async def in_memory(self) -> InMemory:
        """As ``Models.in_memory``."""
        homes = {name: bridge.home(name) for bridge in self._bridges for name in bridge.model_names}
        loaded = {name: found.bytes for name, home in homes.items() if (found := home.find(name)) is not None}
        receivers = {name for bridge in self._bridges for name in bridge.receivers}
        kinds = {name: kind for name in receivers if (kind := self.engines.kind(name)) is not None}
        return InMemory(loaded, kinds, [name for name, home in homes.items() if home.is_pinned(name)])

    async def load(self, bridge: Bridge) -> None:
        """As ``Models.load``."""
        for name in bridge.model_names:
            await self.engines.acquire(name, bridge.home(name))
            bridge.home(name).release(name)

    async def unload(self, bridge: Bridge) -> int:
        """As ``Models.unload``."""
        return sum([await asyncio.to_thread(bridge.home(name).unload, name) for name in bridge.model_names])

    async def pin(self, bridge: Bridge, stay: bool) -> None:
        """As ``Models.pin``."""
        for name in bridge.model_names:
            (bridge.home(name).pin if stay else bridge.home(name).unpin)(name)

    async def metrics(self) -> bytes:
        """As ``Models.metrics``."""
        return generate_latest(self.measures.registry)

    @property
    def stalled(self) -> bool:
        """As of ``Models``."""
        if any(residency.loading is not None for residency in self.residencies):
            return False
        latest = [self._admission.last_progress] if self._admission.waiting + self._admission.running else []
        latest += [engine.last_step for engine in self.engines.all() if engine.running]
        return any(time.monotonic() - at > self._settings.stall_timeout for at in latest)

    async def _encode(self, bridge: Bridge, sources: Sequence[SourceTokens]) -> list[Encoded]:
        residency = bridge.home(bridge.sender)

        def run() -> list[Encoded]:
            with residency.use(bridge.sender, self._settings.load_wait) as sender:
                bridge.check(sender)
                self._admission.progress()  # a large model loads for minutes; that is no stall
                with peak_bytes(residency.device) as peak:
                    encoded = engine.encode(bridge.model, sender, sources)
                residency.note_activation(bridge.sender, peak.bytes)
                return encoded

        with self.measures.batch("encode", len(sources), sum(len(source.ids) for source in sources)):
            return await asyncio.get_running_loop().run_in_executor(self._device, run)

    async def _sweep(self) -> None:
        """Let models go whose time is over."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            for residency in self.residencies:
                await asyncio.to_thread(residency.sweep)

    def _cache_bytes(self) -> int:
        """Bytes for the cache of each receiver, where the budget holds all models and the largest pass: its part of a
        share of the rest."""
        held = self._receivers
        here = {name for one in self._bridges for name in one.model_names if one.home(name) is held}
        dtype = held.dtype or torch.float32
        largest = max((pass_bytes(name, self.sizes.batch_tokens, dtype) for name in here), default=0)
        left = (held.budget_bytes or 0) - sum(map(held.predict, here)) - largest
        receivers = {name for bridge in self._bridges for name in bridge.receivers if name not in bridge.remote}
        return max(int(self.sizes.cache_share * left), 0) // max(len(receivers), 1)

    def _died(self) -> None:
        self.dead = self.failure = "the generation engine died"
        self._on_death()


def residencies(settings: Settings) -> tuple[Residency, Residency]:
    """What holds senders, and what holds receivers: one for both, unless they have devices of their own.

    Raises:
        InvalidRequest: A device is not there.
    """
    sending = device_named(settings.sender_device or settings.device)
    receiving = device_named(settings.receiver_device or settings.device)
    receivers = _residency(settings, receiving)
    return (receivers if is_same(sending, receiving) else _residency(settings, sending)), receivers


def _residency(settings: Settings, device: torch.device) -> Residency:
    budget = budget_bytes(settings.sizes(device).memory_budget, device)
    copies = HostCopies.beside(device, settings.host_memory)
    return Residency(budget, device, dtype_named(settings.dtype, device), copies=copies)
