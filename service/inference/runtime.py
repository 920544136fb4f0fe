"""The bridges being served: admit → batch → run → answer. Knows no HTTP.

Tokenising, encoding, loading and generating each have threads of their own, off the event loop, so models can take
turns in memory and the service answers health checks while one loads.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from latentwire.bridge import engine
from latentwire.bridge.bridge import Bridge
from latentwire.bridge.checkpoint import check_models
from latentwire.bridge.devices import device_named, dtype_named, is_out_of_memory, is_same
from latentwire.bridge.engine import Encoded
from latentwire.bridge.errors import LatentWireError, NotReady, TooLarge, UnknownBridge, at_fault, first_line
from latentwire.bridge.memory import budget_bytes, free_caches, peak_bytes
from latentwire.bridge.models import pass_bytes
from latentwire.bridge.prompt import TEXT, Row
from latentwire.bridge.reader import SourceTokens
from latentwire.bridge.residency import Residency
from latentwire.bridge.sampling import SamplingParams
from latentwire.service.auth.keys import load_keys
from latentwire.service.auth.limits import Limiter
from latentwire.service.inference.admission import Admission
from latentwire.service.inference.batching import Batcher
from latentwire.service.inference.engines import Engines
from latentwire.service.inference.lanes import Lanes
from latentwire.service.inference.request import GenerationRequest, GenerationResult, InFlightRequest, Piece, Text
from latentwire.service.inference.scoring import Scorers
from latentwire.service.metrics import Metrics
from latentwire.service.settings import Settings
from latentwire.service.store.base import Kind, Store
from latentwire.service.store.corpora import Corpora
from latentwire.service.store.disk import DiskStore
from latentwire.service.store.latents import KeptLatent, get_latents
from latentwire.service.store.memory import MemoryStore
from latentwire.service.store.redis import RedisStore

log = logging.getLogger(__name__)

WARM_UP_TEXT = "Mara wants a cup of tea."
SWEEP_SECONDS = 1.0
JOB_BYTES = 16 << 20  # of evaluations: some hundred reports
QUIET_SECONDS = 0.25  # without work, before the service stops: requests on their way still get their 503


class Runtime:
    """Bridges, models, batches, engines and store of one service.

    Attributes:
        residency: Holds receivers in memory.
        senders: Holds models that only send: the same, unless they have a device of their own.
        sizes: How much is done at once where receivers compute.
        store: What is kept: latents, evaluations.
        corpora: Latents that are served from a folder.
        cache: Encodings, which could be made again; the same store, except where the other one is on disk.
        ready: Whether every bridge has been loaded and has answered once.
        failure: Why it will never be ready.
        dead: Why it will never answer again: an engine has died.
        draining: Whether it takes no new requests, because it is about to stop.
        admin_port: Where /admin and /metrics are alone, when they are.
        on_death: Called when an engine has died: the process should end, for its supervisor to start another.
    """

    def __init__(self, settings: Settings, checkpoints: Mapping[str, str]) -> None:
        self.settings = settings
        secret = settings.api_keys
        self.keys = load_keys(settings.api_keys_file, None if secret is None else secret.get_secret_value())
        redis = RedisStore(settings.redis_url) if settings.redis_url else None
        self.limiter = Limiter(self.keys, redis)
        self.senders, self.residency = residencies(settings)
        self.sizes = settings.sizes(self.residency.device)
        self.bridges = {name: self._open(name, path) for name, path in checkpoints.items()}
        self.admission = Admission(settings.max_queue)
        self.ready = self.draining = False
        self.failure: str | None = None
        self.dead: str | None = None
        self.admin_port: int | None = None
        self.on_death: Callable[[], None] = lambda: None
        self.engines = Engines(
            self.residency,
            max_rows=self.sizes.max_batch,
            kv_tokens=settings.kv_tokens,
            cache_bytes=self._cache_bytes(),
            step_tokens=self.sizes.step_tokens,
            required=settings.require_engine,
            load_wait=settings.load_wait,
            on_death=self._died,
            on_step=self._note_step,
        )
        self.cache: Store = redis or MemoryStore(_budgets(settings))
        self.store = redis or (self.cache if settings.store_dir is None else _on_disk(settings.store_dir, settings))
        served = {bridge.manifest.bridge_id for bridge in self.bridges.values()}
        self.corpora = Corpora(settings.corpus_dir, served, settings.message_key)
        self.metrics = Metrics()
        self._lanes = Lanes()
        self.scorers = Scorers(
            self.residency, self._lanes, self.admission, self.metrics, self.sizes, settings.load_wait
        )
        self._device = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._encoders: dict[str, Batcher[SourceTokens, Encoded]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def residencies(self) -> list[Residency]:
        """What holds models, once each."""
        return [self.residency] if self.senders is self.residency else [self.residency, self.senders]

    def _open(self, name: str, path: str) -> Bridge:
        """A bridge from its checkpoint; what no request could ever use stops the start."""
        settings = self.settings
        bridge = Bridge.open(name, path, self.residency, senders=self.senders, signing_key=settings.message_key)
        check_models(bridge.manifest.bridge)
        for model in bridge.model_names:
            bridge.home(model).predict(model)
            bridge.home(model).keep(model, settings.keep_alive_of(name))
            bridge.reader(model)
        return bridge

    def _cache_bytes(self) -> int:
        """Bytes for the cache of each receiver, where the budget holds all models and the largest pass: its part of a
        share of the rest."""
        held, bridges = self.residency, self.bridges.values()
        here = {name for one in bridges for name in one.model_names if one.home(name) is held}
        dtype = held.dtype or torch.float32
        largest = max((pass_bytes(name, self.sizes.batch_tokens, dtype) for name in here), default=0)
        left = (held.budget_bytes or 0) - sum(map(held.predict, here)) - largest
        receivers = {name for bridge in bridges for name in bridge.receivers}
        return max(int(self.sizes.cache_share * left), 0) // max(len(receivers), 1)

    async def start(self) -> None:
        """Start the batchers and warm up in the background; ``ready`` turns true when every bridge has answered."""
        for name, bridge in self.bridges.items():
            sizes = self.settings.sizes(bridge.home(bridge.sender).device)
            self._encoders[name] = Batcher(
                partial(self._encode, bridge),
                max_batch=sizes.max_batch,
                max_batch_tokens=sizes.batch_tokens,
                cost=lambda source: len(source.ids),
                admission=self.admission,
                is_out_of_memory=is_out_of_memory,
                free_caches=free_caches,
            )
            self._tasks.append(asyncio.create_task(self._encoders[name].serve()))
        self._tasks += [asyncio.create_task(self._warm_up()), asyncio.create_task(self._sweep())]

    async def drain(self) -> None:
        """Take no more requests, and wait until those accepted are answered, ``drain_timeout`` at most."""
        self.draining = True
        quiet_since = time.monotonic()
        with suppress(TimeoutError):
            async with asyncio.timeout(self.settings.drain_timeout):
                while time.monotonic() - quiet_since < QUIET_SECONDS:
                    await asyncio.sleep(0.01)
                    if self.admission.admitted:
                        quiet_since = time.monotonic()

    async def stop(self) -> None:
        """Stop everything; whoever still waits gets an error."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.scorers.close()
        await self.engines.close()
        await asyncio.to_thread(self._device.shutdown)
        await asyncio.to_thread(self._lanes.close)
        for store in {self.cache, self.store}:
            await store.close()

    def find(self, name: str | None) -> Bridge:
        """The bridge of a name, or the first one.

        Raises:
            UnknownBridge: Naming those there are.
        """
        if name is None:
            return next(iter(self.bridges.values()))
        if name not in self.bridges:
            raise UnknownBridge(f"no bridge is called {name!r}; there are {', '.join(self.bridges)}", param="bridge")
        return self.bridges[name]

    async def latents(self, ids: Mapping[str, str], tenant: str) -> dict[str, KeptLatent]:
        """Latents of corpora, and those that a tenant keeps, by the fields that hold their ids (as ``get_latents``)."""
        of_corpora = {param: await self.corpora.get(name) for param, name in ids.items() if self.corpora.holds(name)}
        found = {param: latent for param, latent in of_corpora.items() if latent is not None}
        rest = {param: name for param, name in ids.items() if param not in found}
        return {**found, **(await get_latents(self.store, rest, tenant=tenant) if rest else {})}

    def check_open(self) -> None:
        """Refuse new work while the service stops (NotReady)."""
        if self.draining:
            raise NotReady("the service is stopping and takes no more requests")

    def check_text(self, text: str, param: str) -> None:
        """Refuse a text over the operator's limit before any work (TooLarge)."""
        limit = self.settings.max_text_characters
        if len(text) > limit:
            raise TooLarge(f"the text has {len(text)} characters; at most {limit} are taken", param=param)

    async def encode(
        self, bridge: Bridge, rows: Sequence[Text], on_cost: Callable[[int], None] = lambda source_tokens: None
    ) -> list[Encoded]:
        """Encode texts, batched with those of other requests.

        ``on_cost`` is called at the end, also where an error is raised, with the tokens of the texts that reached the
        sender.
        """

        def tokenize(row: Text) -> SourceTokens:
            with at_fault(row.param):
                return bridge.tokenize(row.text, truncate=row.truncate)

        sources = await self._lanes.each(tokenize, rows, lambda row: len(row.text))
        read: list[int] = []
        try:
            return await self._encoders[bridge.name].submit(sources, lambda source: read.append(len(source.ids)))
        finally:
            on_cost(sum(read))

    async def compose(self, bridge: Bridge, receiver: str, requests: Sequence[GenerationRequest]) -> list[Row]:
        """The receiver's inputs (InvalidRequest where one has no room)."""
        return await self._lanes.each(
            lambda request: bridge.compose(receiver, request.source, request.prompt, request.params),
            requests,
            lambda request: request.characters,
        )

    async def generate(
        self,
        bridge: Bridge,
        receiver: str,
        requests: Sequence[GenerationRequest],
        on_piece: Callable[[Piece], None] | None = None,
        on_cost: Callable[[list[int], int], None] = lambda prompt_tokens, generated_tokens: None,
    ) -> GenerationResult:
        """Generate for requests; each joins the receiver's running batch at its next step.

        ``on_piece`` is called on the event loop with every piece of text as it comes, and ``on_cost`` at the end, also
        where an error is raised. Cancelled, requests that still run are cancelled too.
        """
        rows = await self.compose(bridge, receiver, requests)
        async with self.engines.lend(receiver, bridge.check) as engine:
            in_flight = InFlightRequest(engine, bridge, receiver, rows, requests, on_piece)
            try:
                return await in_flight.result()
            finally:
                on_cost([row.slots.count(TEXT) for row in rows], in_flight.generated_tokens)

    async def _encode(self, bridge: Bridge, sources: Sequence[SourceTokens]) -> list[Encoded]:
        residency = bridge.home(bridge.sender)

        def run() -> list[Encoded]:
            with residency.use(bridge.sender, self.settings.load_wait) as sender:
                bridge.check(sender)
                self.admission.progress()  # a large model loads for minutes; that is no stall
                with peak_bytes(residency.device) as peak:
                    encoded = engine.encode(bridge.model, sender, sources)
                residency.note_activation(bridge.sender, peak.bytes)
                return encoded

        self.metrics.batch_rows.labels("encode").observe(len(sources))
        with self.metrics.device_seconds.labels("encode").time():
            return await asyncio.get_running_loop().run_in_executor(self._device, run)

    async def _warm_up(self) -> None:
        try:
            for bridge in self.bridges.values():
                encoded = await self.encode(bridge, [Text(WARM_UP_TEXT, True, "inputs")])
                for receiver in bridge.receivers:
                    request = GenerationRequest(encoded[0].latent, "Question:", SamplingParams(max_tokens=2))
                    await self.generate(bridge, receiver, [request])
            self.ready = True
        except LatentWireError as error:
            log.error("warming up failed: %s", error)
            self.failure = str(error)
        except Exception as error:
            log.exception("warming up failed")
            self.failure = first_line(error)

    async def _sweep(self) -> None:
        """Let models go whose time is over."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            for residency in self.residencies:
                await asyncio.to_thread(residency.sweep)

    def _note_step(self, rows: int, seconds: float) -> None:
        self.metrics.batch_rows.labels("generate").observe(rows)
        self.metrics.device_seconds.labels("generate").observe(seconds)

    def _died(self) -> None:
        self.dead = self.failure = "the generation engine died"
        self.on_death()

    @property
    def stalled(self) -> bool:
        """Work is there, no model is being loaded, and nothing has moved for ``stall_timeout`` seconds."""
        if any(residency.loading is not None for residency in self.residencies):
            return False
        latest = [self.admission.last_progress] if self.admission.waiting + self.admission.running else []
        latest += [engine.last_step for engine in self.engines.all() if engine.running]
        return any(time.monotonic() - at > self.settings.stall_timeout for at in latest)


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
    return Residency(budget, device, dtype_named(settings.dtype, device))


def _budgets(settings: Settings) -> dict[Kind, int]:
    """Bytes of each kind kept in the process."""
    return {"latent": settings.store_memory, "encode": settings.encode_cache_memory, "job": JOB_BYTES}


def _on_disk(folder: Path, settings: Settings) -> Store:
    return DiskStore(folder, {"latent": settings.store_disk, "job": JOB_BYTES})
