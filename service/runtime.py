"""The bridges being served: admit → batch → run → answer. Knows no HTTP.

Tokenising, encoding, loading and generating each have threads of their own, off the event loop, so models can take
turns in memory and the service answers health checks while one loads.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

from latentwire.bridge import engine
from latentwire.bridge.checkpoint import check_models, check_receiver, check_sender, load_bridge
from latentwire.bridge.devices import device_named, dtype_named, is_out_of_memory
from latentwire.bridge.engine import Encoded
from latentwire.bridge.errors import LatentWireError, NotReady, TooLarge, UnknownBridge, at_fault, first_line
from latentwire.bridge.generation.base import Engine, Running
from latentwire.bridge.generation.output import Generation, TokenLogprob
from latentwire.bridge.memory import budget_bytes, free_caches, peak_bytes
from latentwire.bridge.models import load_reader
from latentwire.bridge.prompt import TEXT, Row
from latentwire.bridge.reader import SourceTokens
from latentwire.bridge.residency import Residency
from latentwire.bridge.sampling import SamplingParams
from latentwire.service.batching import Batcher, Load
from latentwire.service.engines import Engines
from latentwire.service.keys import load_keys
from latentwire.service.lanes import Lanes
from latentwire.service.metrics import Metrics
from latentwire.service.redis_store import RedisStore
from latentwire.service.security import Limiter
from latentwire.service.served import Question, Served, Text
from latentwire.service.settings import Settings
from latentwire.service.store import Kind, MemoryStore, Store

log = logging.getLogger(__name__)

WARM_UP_TEXT = "Mara wants a cup of tea."
SWEEP_SECONDS = 1.0
JOB_BYTES = 16 << 20  # of evaluations: some hundred reports
QUIET_SECONDS = 0.25  # without work, before the service stops: requests on their way still get their 503


@dataclass(frozen=True)
class Piece:
    """Text that an output got, and the log-probabilities of its tokens: ``index`` says which output."""

    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class Said:
    """The answers to questions, and when the first token of each came."""

    answers: list[Generation]
    first_token_seconds: list[float]


class Runtime:
    """Bridges, models, batches, engines and store of one service.

    Attributes:
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
        device = device_named(settings.device)
        budget = budget_bytes(settings.memory_budget, device)
        self.residency = Residency(budget, device, dtype_named(settings.dtype, device))
        self.bridges = {name: self._open(name, path) for name, path in checkpoints.items()}
        self.load = Load(settings.max_queue)
        self.ready = self.draining = False
        self.failure: str | None = None
        self.dead: str | None = None
        self.admin_port: int | None = None
        self.on_death: Callable[[], None] = lambda: None
        self.engines = Engines(
            self.residency,
            max_rows=settings.max_batch,
            kv_tokens=settings.kv_tokens,
            step_tokens=settings.step_tokens,
            load_wait=settings.load_wait,
            on_death=self._died,
            on_step=self._note_step,
        )
        self.store: Store = redis or MemoryStore(_budgets(settings))
        self.metrics = Metrics()
        self._lanes = Lanes()
        self._device = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._encoders: dict[str, Batcher[SourceTokens, Encoded]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    def _open(self, name: str, path: str) -> Served:
        """A bridge from its checkpoint; what no request could ever use stops the start."""
        settings = self.settings
        manifest, bridge = load_bridge(path, device=self.residency.device)
        check_models(manifest.bridge)
        models = (manifest.bridge.sender.name, *manifest.bridge.heads)
        for model in models:
            self.residency.predict(model)
            self.residency.keep(model, settings.keep_alive_of(name))
        readers = {model: load_reader(model) for model in models}
        return Served(name, manifest, bridge, readers, settings.message_key, settings.keep_alive_of(name))

    async def start(self) -> None:
        """Start the batchers and warm up in the background; ``ready`` turns true when every bridge has answered."""
        for name, served in self.bridges.items():
            self._encoders[name] = Batcher(
                partial(self._encode, served),
                max_batch=self.settings.max_batch,
                max_batch_tokens=self.settings.batch_tokens,
                cost=lambda source: len(source.ids),
                load=self.load,
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
                    if self.load.admitted:
                        quiet_since = time.monotonic()

    async def stop(self) -> None:
        """Stop everything; whoever still waits gets an error."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.engines.close()
        await asyncio.to_thread(self._device.shutdown)
        await asyncio.to_thread(self._lanes.close)
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
        self, served: Served, rows: Sequence[Text], on_cost: Callable[[int], None] = lambda source_tokens: None
    ) -> list[Encoded]:
        """Latents of texts, batched with whatever else is waiting.

        ``on_cost`` is called at the end, whatever end that is, with the tokens of the texts that reached the sender.
        """

        def tokenize(row: Text) -> SourceTokens:
            with at_fault(row.param):
                return served.tokenize(row)

        sources = await self._lanes.each(tokenize, rows, lambda row: len(row.text))
        read: list[int] = []
        try:
            return await self._encoders[served.name].submit(sources, lambda source: read.append(len(source.ids)))
        finally:
            on_cost(sum(read))

    async def generate(
        self,
        served: Served,
        receiver: str,
        questions: Sequence[Question],
        on_piece: Callable[[Piece], None] | None = None,
        on_cost: Callable[[list[int], int], None] = lambda prompt_tokens, generated_tokens: None,
    ) -> Said:
        """Answers to questions, each of which joins the receiver's running batch at its next step.

        ``on_piece`` is called on the event loop with every piece of text as it comes, ``on_cost`` at the end, whatever
        end that is. Cancelled, what still runs is given up at once.
        """
        rows = await self._lanes.each(partial(served.compose, receiver), questions, lambda asked: asked.characters)
        async with self.engines.lend(receiver, partial(check_receiver, served.manifest.bridge, receiver)) as lent:
            asked = _Asked(lent, served, receiver, rows, questions, on_piece)
            try:
                answers, firsts = await asked.answers()
            finally:
                on_cost([row.slots.count(TEXT) for row in rows], asked.generated_tokens)
        return Said(answers, firsts)

    async def _encode(self, served: Served, sources: Sequence[SourceTokens]) -> list[Encoded]:
        def run() -> list[Encoded]:
            with self.residency.use(served.sender, self.settings.load_wait) as sender:
                check_sender(served.manifest.bridge, sender)
                self.load.progress()  # a large model loads for minutes; that is no stall
                with peak_bytes(self.residency.device) as peak:
                    encoded = engine.encode(served.bridge, sender, sources)
                self.residency.note_activation(served.sender, peak.bytes)
                return encoded

        self.metrics.batch_rows.labels("encode").observe(len(sources))
        with self.metrics.device_seconds.labels("encode").time():
            return await asyncio.get_running_loop().run_in_executor(self._device, run)

    async def _warm_up(self) -> None:
        try:
            for served in self.bridges.values():
                encoded = await self.encode(served, [Text(WARM_UP_TEXT, True, "inputs")])
                for receiver in served.manifest.bridge.heads:
                    question = Question(encoded[0].latent, "Question:", SamplingParams(max_tokens=2))
                    await self.generate(served, receiver, [question])
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
            await asyncio.to_thread(self.residency.sweep)

    def _note_step(self, rows: int, seconds: float) -> None:
        self.metrics.batch_rows.labels("generate").observe(rows)
        self.metrics.device_seconds.labels("generate").observe(seconds)

    def _died(self) -> None:
        self.dead = self.failure = "the generation engine died"
        self.on_death()

    @property
    def stalled(self) -> bool:
        """Work is there, no model is being loaded, and nothing has moved for ``stall_timeout`` seconds."""
        if self.residency.loading is not None:
            return False
        latest = [self.load.last_progress] if self.load.waiting + self.load.running else []
        latest += [engine.last_step for engine in self.engines.all() if engine.running]
        return any(time.monotonic() - at > self.settings.stall_timeout for at in latest)


def _budgets(settings: Settings) -> dict[Kind, int]:
    """Bytes of each kind kept in the process."""
    return {"latent": settings.store_memory, "encode": settings.encode_cache_memory, "job": JOB_BYTES}


class _Asked:
    """The outputs of one request while they are generated."""

    def __init__(
        self,
        engine: Engine,
        served: Served,
        receiver: str,
        rows: Sequence[Row],
        questions: Sequence[Question],
        on_piece: Callable[[Piece], None] | None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._engine, self._served, self._receiver = engine, served, receiver
        self._rows, self._questions, self._on_piece = rows, questions, on_piece
        self._results: list[asyncio.Future[Generation]] = [self._loop.create_future() for _ in rows]
        self._running: list[Running] = []
        self._given_up = False
        self._started = time.monotonic()

    @property
    def generated_tokens(self) -> int:
        """Tokens so far, of all outputs."""
        return sum(running.answer.token_count for running in self._running)

    async def answers(self) -> tuple[list[Generation], list[float]]:
        """All answers, and the seconds to the first token of each."""
        submitting = self._loop.run_in_executor(self._engine.submitting, self._submit)
        try:
            await asyncio.shield(submitting)
            said = await asyncio.gather(*self._results)
            return said, [(running.first_token_at or self._started) - self._started for running in self._running]
        finally:
            self._given_up = True
            await _settled(submitting)
            for running in self._running:
                self._engine.cancel(running)
            for result in self._results:
                result.cancel()

    def _submit(self) -> None:
        """On a thread: heads run here, and locks are waited for."""
        for index, (row, question) in enumerate(zip(self._rows, self._questions, strict=True)):
            if self._given_up:
                return
            self._running.append(
                self._engine.submit(
                    row,
                    question.params,
                    self._served.soft(self._receiver, self._engine.lm, question),
                    partial(self._post, self._end, self._results[index]),
                    None if self._on_piece is None else partial(self._post, self._show, index),
                )
            )

    def _post(self, call: Callable[..., None], *given: object) -> None:
        """From an engine's thread to the loop, which may be gone."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call, *given)

    def _show(self, index: int, text: str, logprobs: tuple[TokenLogprob, ...]) -> None:
        if self._on_piece is not None and not self._given_up:
            self._on_piece(Piece(index, text, logprobs))

    @staticmethod
    def _end(result: asyncio.Future[Generation], said: Generation | LatentWireError) -> None:
        if result.done():
            return
        if isinstance(said, LatentWireError):
            result.set_exception(said)
        else:
            result.set_result(said)


async def _settled(submitting: asyncio.Future[None]) -> None:
    """Until a thread is done, whatever became of it, also for one who was cancelled and is cancelled again."""
    while not submitting.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait([submitting])


def sample_params(base: SamplingParams, sample: int) -> SamplingParams:
    """The parameters of the sample-th output of an input: the first has the request's seed, others derive theirs."""
    if sample == 0:
        return base
    digest = hashlib.sha256(f"{base.seed}/sample/{sample}".encode()).digest()
    return replace(base, seed=int.from_bytes(digest[:8], "little") >> 1)
