"""The bridges being served: admit → batch → run → answer. Knows no HTTP.

All model work runs on one worker thread, off the event loop, so models can take turns in memory and the
service answers health checks while one loads.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from bridge import engine, wire
from bridge.answer import Generation
from bridge.checkpoint import Bridge, check_models, check_receiver, check_sender, load_bridge
from bridge.config import Manifest
from bridge.engine import Encoded
from bridge.errors import InvalidRequest, LatentWireError, TooLarge, UnknownBridge, at_fault
from bridge.models import FrozenLM, SourceTokens, tokenize_source
from bridge.prompt import compose, place
from bridge.residency import Residency
from bridge.sampling import SamplingParams
from service.batching import Batcher, Load
from service.metrics import Metrics
from service.settings import Settings
from service.store import LatentStore, MemoryStore, RedisStore

Item = TypeVar("Item")
Ready = TypeVar("Ready")
Result = TypeVar("Result")

log = logging.getLogger(__name__)

WARM_UP_TEXT = "Mara wants a cup of tea."


@dataclass(frozen=True)
class Served:
    """A bridge under the name callers use."""

    name: str
    manifest: Manifest
    bridge: Bridge

    def receiver(self, name: str | None) -> str:
        """The receiver asked for, or the first (UnknownBridge when the bridge has no head for it)."""
        if name is not None:
            self.bridge.head(name)
        return name or self.bridge.default_receiver

    def decode(self, message: bytes) -> NDArray[np.float32]:
        """A latent of this bridge from its message, checked (InvalidMessage, IncompatibleBridge)."""
        config = self.manifest.bridge
        return wire.decode(
            message,
            bridge_id=self.manifest.bridge_id,
            latent_dim=config.encoder.latent_dim,
            max_slots=config.max_slots,
        ).latent


@dataclass(frozen=True, slots=True)
class Text:
    """A row of an encode batch; ``param`` says which field of the request it is."""

    text: str
    truncate: bool
    param: str


@dataclass(frozen=True, eq=False)
class Question:
    """A row of a generate batch."""

    latent: NDArray[np.float32]
    prompt: str
    params: SamplingParams


class Runtime:
    """Bridges, models, batches and store of one service."""

    def __init__(self, settings: Settings, checkpoints: Mapping[str, str]) -> None:
        self.settings = settings
        self.residency = Residency(settings.memory_budget)
        self.bridges = {
            name: Served(name, *load_bridge(path, device=self.residency.device)) for name, path in checkpoints.items()
        }
        for served in self.bridges.values():  # what no request could ever use stops the start
            check_models(served.manifest.bridge)
            for model in (served.manifest.bridge.sender.name, *served.manifest.bridge.heads):
                self.residency.predict(model)
        self.load = Load(settings.max_queue)
        self.ready = False
        self.failure: str | None = None
        self.metrics = Metrics(self.residency, self.load, lambda: self.ready)
        self.store: LatentStore = (
            RedisStore(settings.redis_url, ttl_seconds=settings.store_ttl)
            if settings.redis_url
            else MemoryStore(max_bytes=settings.store_memory, ttl_seconds=settings.store_ttl)
        )
        self._device = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._encoders: dict[str, Batcher[Text, Encoded]] = {}
        self._generators: dict[tuple[str, str], Batcher[Question, Generation]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Start the batchers and warm up in the background; ``ready`` turns true when every bridge has answered."""
        for name, served in self.bridges.items():
            self._encoders[name] = self._batcher("encode", partial(self._encode, served))
            for receiver in served.manifest.bridge.heads:
                self._generators[name, receiver] = self._batcher("generate", partial(self._generate, served, receiver))
        self._tasks.append(asyncio.create_task(self._warm_up()))

    async def stop(self) -> None:
        """Stop the batchers; whoever still waits gets an error."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._device.shutdown(wait=True)
        await self.store.close()

    def find(self, name: str | None) -> Served:
        """The bridge of a name, or the first one.

        Raises:
            UnknownBridge: Naming those there are.
        """
        if name is None:
            return next(iter(self.bridges.values()))
        if name not in self.bridges:
            raise UnknownBridge(f"no bridge is called {name!r}; there are {', '.join(self.bridges)}", param="bridge")
        return self.bridges[name]

    def check_text(self, text: str, param: str) -> None:
        """Refuse a text over the operator's limit before any work (TooLarge)."""
        limit = self.settings.max_text_characters
        if len(text) > limit:
            raise TooLarge(f"the text has {len(text)} characters; at most {limit} are taken", param=param)

    async def encode(self, served: Served, rows: Sequence[Text]) -> list[Encoded]:
        """Latents of texts, batched with whatever else is waiting."""
        encoded = await self._encoders[served.name].submit(rows)
        self.metrics.tokens.labels("source").inc(sum(row.source_tokens for row in encoded))
        return encoded

    async def generate(self, served: Served, receiver: str, questions: Sequence[Question]) -> list[Generation]:
        """Answers to questions, batched with whatever else is waiting."""
        answers = await self._generators[served.name, receiver].submit(questions)
        self.metrics.tokens.labels("soft").inc(sum(len(question.latent) for question in questions))
        self.metrics.tokens.labels("generated").inc(sum(answer.token_count for answer in answers))
        self.metrics.observe_outputs(served.name, [answer.text for answer in answers])
        return answers

    def _batcher(
        self, half: str, run: Callable[[Sequence[Item]], list[Result | LatentWireError]]
    ) -> Batcher[Item, Result]:
        async def on_device(items: Sequence[Item]) -> list[Result | LatentWireError]:
            self.metrics.batch_rows.labels(half).observe(len(items))
            with self.metrics.device_seconds.labels(half).time():
                return await asyncio.get_running_loop().run_in_executor(self._device, run, items)

        batcher = Batcher(on_device, max_batch=self.settings.max_batch, load=self.load)
        self._tasks.append(asyncio.create_task(batcher.serve()))
        return batcher

    def _encode(self, served: Served, rows: Sequence[Text]) -> list[Encoded | LatentWireError]:
        config = served.manifest.bridge
        with self._model(config.sender.name) as sender:
            check_sender(config, sender)

            def prepare(row: Text) -> SourceTokens:
                with at_fault(row.param):
                    return tokenize_source(sender, row.text, max_tokens=config.max_source_tokens, truncate=row.truncate)

            return _each(rows, prepare, partial(engine.encode, served.bridge, sender))

    def _generate(
        self, served: Served, receiver_name: str, rows: Sequence[Question]
    ) -> list[Generation | LatentWireError]:
        config = served.manifest.bridge
        layout = config.heads[receiver_name].layout
        with self._model(receiver_name) as receiver:
            check_receiver(config, receiver_name, receiver)

            def prepare(row: Question) -> engine.Asked:
                room = receiver.max_tokens - row.params.max_tokens
                template = place(layout, row.prompt)
                composed = compose(receiver, layout, template, latent=len(row.latent), max_tokens=room)
                return engine.Asked(composed, row.latent, row.params)

            return _each(rows, prepare, partial(self._ask, served, receiver_name, receiver))

    @contextmanager
    def _model(self, name: str) -> Iterator[FrozenLM]:
        with self.residency.use(name) as lm:
            self.load.progress()  # a large model loads for minutes; that is no stall
            yield lm

    def _ask(
        self, served: Served, receiver_name: str, receiver: FrozenLM, asked: Sequence[engine.Asked]
    ) -> list[Generation]:
        answers, first_token_seconds = engine.ask(served.bridge, receiver_name, receiver, asked)
        self.metrics.first_token.observe(first_token_seconds)
        return answers

    async def _warm_up(self) -> None:
        try:
            for served in self.bridges.values():
                encoded = await self._encoders[served.name].submit([Text(WARM_UP_TEXT, True, "inputs")])
                for receiver in served.manifest.bridge.heads:
                    question = Question(encoded[0].latent, "Question:", SamplingParams(max_tokens=2))
                    await self._generators[served.name, receiver].submit([question])
            self.ready = True
        except LatentWireError as error:
            log.error("warming up failed: %s", error)
            self.failure = str(error)

    @property
    def stalled(self) -> bool:
        """Work is there, no model is being loaded, and nothing has finished for ``stall_timeout`` seconds."""
        busy = self.load.waiting + self.load.running > 0 and self.residency.loading is None
        return busy and time.monotonic() - self.load.last_progress > self.settings.stall_timeout


def _each(
    rows: Sequence[Item], prepare: Callable[[Item], Ready], run: Callable[[Sequence[Ready]], Sequence[Result]]
) -> list[Result | LatentWireError]:
    """Prepare rows one by one, run those that could be, and give each row its result or its own error."""
    results: list[Result | LatentWireError] = []
    ready: list[tuple[int, Ready]] = []
    for at, row in enumerate(rows):
        try:
            ready.append((at, prepare(row)))
            results.append(InvalidRequest("not run"))
        except LatentWireError as error:
            results.append(error)
    if ready:
        for (at, _), result in zip(ready, run([item for _, item in ready]), strict=True):
            results[at] = result
    return results


def sample_params(base: SamplingParams, sample: int) -> SamplingParams:
    """The parameters of the sample-th output of an input: the first has the request's seed, others derive theirs."""
    if sample == 0:
        return base
    digest = hashlib.sha256(f"{base.seed}/sample/{sample}".encode()).digest()
    return replace(base, seed=int.from_bytes(digest[:8], "little") >> 1)
