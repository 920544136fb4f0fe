"""The bridges being served: admit → batch → run → answer. Knows no HTTP, and not where the models run."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from latentwire.bridge.bridge import Bridge
from latentwire.bridge.checkpoint import check_models
from latentwire.bridge.encoder import slots_of
from latentwire.bridge.engine import Encoded
from latentwire.bridge.errors import (
    InvalidRequest,
    LatentWireError,
    NotReady,
    TooLarge,
    UnknownBridge,
    at_fault,
    first_line,
)
from latentwire.bridge.families import ROLES, Role
from latentwire.bridge.prompt import TEXT, Row
from latentwire.bridge.reader import SourceTokens
from latentwire.bridge.remote import check_named, parse_addresses
from latentwire.bridge.residency import Residency
from latentwire.bridge.sampling import SamplingParams
from latentwire.bridge.scoring import Continuation
from latentwire.bridge.sources import latent_of
from latentwire.service.auth.keys import load_keys
from latentwire.service.auth.limits import Limiter
from latentwire.service.inference.admission import Admission
from latentwire.service.inference.lanes import Lanes
from latentwire.service.inference.models import LocalModels, Models, residencies
from latentwire.service.inference.request import Asked, GenerationRequest, GenerationResult, Piece, Text
from latentwire.service.inference.scoring import ScoreQuestion
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
JOB_BYTES = 16 << 20  # of evaluations: some hundred reports
AGAIN_SECONDS = 2.0  # until a server that was not reached is tried again
QUIET_SECONDS = 0.25  # without work, before the service stops: requests on their way still get their 503


class Runtime:
    """Bridges, models and stores of one service.

    Attributes:
        residency: Holds receivers in memory; nothing where the models run elsewhere.
        senders: Holds models that only send: the same, unless they have a device of their own.
        models: What runs on models.
        store: What is kept: latents, evaluations.
        corpora: Latents that are served from a folder.
        cache: Encodings, which could be made again; the same store, except where the other one is on disk.
        leaving: Whether it is about to stop: not ready, and every answer closes its connection.
        draining: Whether it takes no new requests either.
        admin_port: Where /admin and /metrics are alone, when they are.
        on_death: Called when an engine has died: the process should end, for its supervisor to start another.
    """

    def __init__(
        self,
        settings: Settings,
        checkpoints: Mapping[str, str],
        models: Models | None = None,
        roles: tuple[Role, ...] = ROLES,
    ) -> None:
        """``models`` run elsewhere, where they are given; of those that run here only ``roles`` do."""
        self.settings, self._roles = settings, roles
        self._elsewhere = models is not None
        secret = settings.api_keys
        self.keys = load_keys(settings.api_keys_file, None if secret is None else secret.get_secret_value())
        redis = RedisStore(settings.redis_url) if settings.redis_url else None
        self.limiter = Limiter(self.keys, redis)
        if settings.frontends > 1 and redis is None and self.limiter.limited:
            raise InvalidRequest(
                f"key {self.limiter.limited[0]!r} has limits; the {settings.frontends} processes of LW_FRONTENDS count "
                "together in Redis alone: set LW_REDIS_URL"
            )
        nothing = Residency(None, torch.device("cpu"))
        self.senders, self.residency = (nothing, nothing) if self._elsewhere else residencies(settings)
        addresses = parse_addresses(settings.receiver)
        self.bridges = {name: self._open(name, path, addresses) for name, path in checkpoints.items()}
        check_named(addresses, [name for bridge in self.bridges.values() for name in bridge.receivers])
        self.admission = Admission(settings.max_queue)
        self.leaving = self.draining = False
        self.admin_port: int | None = None
        self.on_death: Callable[[], None] = lambda: None
        self.models: Models = models or LocalModels(
            settings, self.bridges.values(), self.residency, self.senders, self.admission, lambda: self.on_death()
        )
        self.cache: Store = redis or MemoryStore(_budgets(settings))
        self.store = redis or (self.cache if settings.store_dir is None else _on_disk(settings.store_dir, settings))
        self.corpora = Corpora(settings.corpus_dir, set(self.bridge_ids.values()), settings.message_key)
        self.metrics = Metrics({name: one.statistics for name, one in self.bridges.items()}, settings.latency_buckets)
        self._lanes = Lanes()
        self._warming: asyncio.Task[None] | None = None

    def _open(self, name: str, path: str, addresses: Mapping[str | None, str]) -> Bridge:
        """A bridge from its checkpoint; what no request could ever use stops the start."""
        settings = self.settings
        bridge = Bridge.open(
            name, path, self.residency, senders=self.senders, signing_key=settings.message_key, addresses=addresses
        )
        bridge.roles = self._roles
        if not self._elsewhere:
            check_models(bridge.manifest.bridge, self._roles)
        for model in bridge.model_names:
            if not self._elsewhere:
                bridge.home(model).predict(model)
                bridge.home(model).keep(model, settings.keep_alive_of(name))
        for model in {bridge.sender, *bridge.receivers}:
            bridge.reader(model)
        return bridge

    @property
    def bridge_ids(self) -> dict[str, str]:
        """The id of each bridge, by its name."""
        return {name: bridge.manifest.bridge_id for name, bridge in self.bridges.items()}

    @property
    def local(self) -> LocalModels:
        """The models, where they are in this process."""
        assert isinstance(self.models, LocalModels)
        return self.models

    async def start(self) -> None:
        """Start, and warm up in the background; ``ready`` turns true when every bridge has answered."""
        await self.models.start()
        if not self._elsewhere:
            self._warming = asyncio.create_task(self._warm_up())

    async def warmed(self) -> None:
        """Wait until the bridges have answered, or never will: ``models`` says which."""
        if self._warming is not None:
            await self._warming

    async def drain(self) -> None:
        """Not ready for ``drain_delay``, take no more requests then, and wait until those accepted are answered,
        ``drain_timeout`` at most.
        """
        self.leaving = True
        await asyncio.sleep(self.settings.drain_delay)
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
        if self._warming is not None:
            self._warming.cancel()
            await asyncio.gather(self._warming, return_exceptions=True)
        await self.models.stop()
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
        lookups, corpora = self.metrics.lookups, self.corpora
        try:
            of_corpora = {param: await corpora.get(name) for param, name in ids.items() if corpora.holds(name)}
            found = {param: latent for param, latent in of_corpora.items() if latent is not None}
            rest = {param: name for param, name in ids.items() if param not in found}
            kept = await get_latents(self.store, rest, tenant=tenant) if rest else {}
        except LatentWireError as error:
            lookups.labels("miss" if isinstance(error, UnknownBridge) else "error").inc()
            raise
        lookups.labels("hit").inc()
        return {**found, **kept}

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
        return await self.models.encode(bridge, sources, on_cost)

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
        asked = [
            Asked(row, latent_of(request.source), request.params) for row, request in zip(rows, requests, strict=True)
        ]
        read = [row.slots.count(TEXT) for row in rows]
        return await self.models.generate(
            bridge, receiver, asked, on_piece, lambda generated_tokens: on_cost(read, generated_tokens)
        )

    async def score(
        self,
        bridge: Bridge,
        receiver: str,
        questions: Sequence[ScoreQuestion],
        on_cost: Callable[[int], None] = lambda tokens: None,
    ) -> list[list[Continuation]]:
        """Score the choices of questions (``on_cost`` as of ``encode``)."""
        items = await self._lanes.each(
            lambda question: question.item(bridge, receiver), questions, lambda question: question.characters
        )
        return await self.models.score(bridge, receiver, items, on_cost)

    async def _warm_up(self) -> None:
        try:
            while not self.local.ready:
                try:
                    await self._answer_once()
                    self.local.ready = True
                except NotReady as error:  # a vLLM server that is not up yet
                    log.warning("not ready: %s", error)
                    await asyncio.sleep(AGAIN_SECONDS)
        except LatentWireError as error:
            log.error("warming up failed: %s", error)
            self.local.failure = str(error)
        except Exception as error:
            log.exception("warming up failed")
            self.local.failure = first_line(error)

    async def _answer_once(self) -> None:
        """Let every receiver of every bridge answer from a latent: a text's, or any where the sender is elsewhere."""
        for bridge in self.bridges.values():
            encoder = bridge.manifest.bridge.encoder
            latent = np.ones((slots_of(encoder, 1), encoder.latent_dim), np.float32)
            if "sender" in self._roles:
                latent = (await self.encode(bridge, [Text(WARM_UP_TEXT, True, "inputs")]))[0].latent
            for receiver in bridge.receivers if "receiver" in self._roles else ():
                request = GenerationRequest(latent, "Question:", SamplingParams(max_tokens=2))
                await self.generate(bridge, receiver, [request])


def _budgets(settings: Settings) -> dict[Kind, int]:
    """Bytes of each kind kept in the process."""
    return {"latent": settings.store_memory, "encode": settings.encode_cache_memory, "job": JOB_BYTES}


def _on_disk(folder: Path, settings: Settings) -> Store:
    return DiskStore(folder, {"latent": settings.store_disk, "job": JOB_BYTES})
