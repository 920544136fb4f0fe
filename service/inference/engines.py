"""The generation engines of a service: one for each receiver in memory, opened when it is first needed.

An engine lives with its model: it is attached to it in ``bridge.residency``, counted in the budget with its cache, and
closed before the model leaves. That of a receiver on a vLLM server stays until the service ends.
"""

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

from latentwire.bridge.config import Fingerprint, Mode
from latentwire.bridge.errors import InsufficientMemory
from latentwire.bridge.generation.base import Engine, Kind
from latentwire.bridge.generation.continuous import token_bytes
from latentwire.bridge.generation.room import SMALLEST_KV_TOKENS
from latentwire.bridge.generation.select import open_engine
from latentwire.bridge.models import FrozenLM
from latentwire.bridge.remote import open_remote
from latentwire.bridge.residency import Residency

log = logging.getLogger(__name__)

LINGER_SECONDS = 0.1  # for which a model just loaded stays lent, so that those who waited for it come before others
KV_TOKENS = 8192


class Engines:
    """Lends engines, and loads their models; see the module."""

    def __init__(
        self,
        residency: Residency,
        *,
        max_rows: int,
        kv_tokens: int | None,
        cache_bytes: int = 0,
        step_tokens: int,
        mode: Mode = "plain",
        required: Kind | None = None,
        load_wait: float,
        on_death: Callable[[], None],
        on_step: Callable[[int, int, float], None],
        remote: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """``kv_tokens`` of a cache; or by default the usual, or where they hold more, ``cache_bytes`` for each.

        ``remote`` are URLs of vLLM servers, by the names of receivers that answer there.
        """
        self.residency, self._remote = residency, remote
        self._kv_tokens, self._cache_bytes = kv_tokens, cache_bytes
        self._options: dict[str, Any] = {
            "max_rows": max_rows, "step_tokens": step_tokens, "mode": mode, "required": required,
        }  # fmt: skip
        self._load_wait, self._on_death, self._on_step = load_wait, on_death, on_step
        self._engines: dict[Fingerprint | str, Engine] = {}  # by name where they are on a server
        self._past: Counter[str] = Counter()  # of engines that were closed: what is counted does not go down
        self._closing = threading.Lock()  # an engine is among those that are open, or in the past
        self._pending: dict[Hashable, asyncio.Task[None]] = {}
        self._threads = ThreadPoolExecutor(8, thread_name_prefix="loader")  # each model that is waited for takes one

    def all(self) -> list[Engine]:
        """All open engines."""
        return list(self._engines.values())

    def total(self, count: Literal["out_of_memory", "preemptions"]) -> int:
        """What all engines have counted so far."""
        with self._closing:
            return self._past[count] + sum(int(getattr(engine, count)) for engine in self.all())

    def kind(self, name: str) -> Kind | None:
        """How a receiver generates: ``continuous``, ``padded`` or ``vllm``; None until it is first asked."""
        names = {engine.lm.name: engine.kind for engine in self.all()}
        return names.get(name)

    @asynccontextmanager
    async def lend(self, name: str, check: Callable[[FrozenLM], None]) -> AsyncIterator[Engine]:
        """The engine of a receiver, which stays in memory while the block runs; ``check`` may refuse the model.

        Raises:
            InsufficientMemory: There is no room beside the models in use, and none came within the time to wait.
            ModelUnavailable: It cannot be read.
            LatentWireError: As of ``open_remote``, where it is on a server.
        """
        if name in self._remote:
            while (remote := self._engines.get(name)) is None:
                await self._run_once(f"engine of {name}", partial(self._connect, name, check))
            check(remote.lm)
            yield remote
            return
        lm = await self.acquire(name)
        try:
            check(lm)
            yield await self._engine(lm)
        finally:
            opening = self._pending.get(_engine_of(lm))
            if opening is None:
                self.residency.release(name)
            else:  # who asked for the engine leaves before it is open
                opening.add_done_callback(lambda _: self.residency.release(name))

    async def acquire(self, name: str, residency: Residency | None = None) -> FrozenLM:
        """A model, lent until ``residency.release``; the event loop goes on while it is loaded."""
        residency = residency or self.residency
        while (lm := residency.try_acquire(name)) is None:
            await self._run_once((name, id(residency)), partial(self._load, name, residency))
        return lm

    async def close(self) -> None:
        """Let every model go, and its engine with it; what runs fails."""
        for engine in self.all():
            await asyncio.to_thread(engine.close)
        self._engines.clear()
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)  # a large model may be on its way

    async def _engine(self, lm: FrozenLM) -> Engine:
        while (engine := self._engines.get(lm.fingerprint)) is None:
            await self._run_once(_engine_of(lm), partial(self._open, lm))
        return engine

    async def _run_once(self, name: Hashable, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run something that takes long, once for all who wait for it now."""

        def done(task: asyncio.Task[None]) -> None:
            del self._pending[name]
            if not task.cancelled():
                task.exception()  # is raised where it is awaited; nobody may be left to do so

        if name not in self._pending:
            self._pending[name] = asyncio.create_task(work())
            self._pending[name].add_done_callback(done)
        await asyncio.shield(self._pending[name])

    async def _load(self, name: str, residency: Residency) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._threads, partial(residency.acquire, name, self._load_wait))
        loop.call_later(LINGER_SECONDS, residency.release, name)

    async def _open(self, lm: FrozenLM) -> None:
        await asyncio.get_running_loop().run_in_executor(self._threads, self._open_on_thread, lm)

    async def _connect(self, name: str, check: Callable[[FrozenLM], None]) -> None:
        opening = partial(open_remote, name, self._remote[name], self.residency, check)
        self._engines[name] = await asyncio.get_running_loop().run_in_executor(self._threads, opening)

    def _open_on_thread(self, lm: FrozenLM) -> None:
        """On a thread: make room for the cache, then the engine."""
        each = token_bytes(lm)
        tokens = self._tokens(lm, each)
        fingerprint = lm.fingerprint  # and nothing else of the model: it must be free when what came back is measured

        def close() -> None:
            with self._closing:
                if (engine := self._engines.pop(fingerprint, None)) is not None:
                    self._past += Counter(out_of_memory=engine.out_of_memory, preemptions=engine.preemptions)
            if engine is not None:
                engine.close()

        self.residency.attach(lm.name, close, tokens * each)
        try:
            engine = open_engine(lm, kv_tokens=tokens, on_death=self._on_death, **self._options)
        except BaseException:
            self.residency.detach(lm.name, close)
            raise
        engine.on_step = self._on_step
        self._engines[fingerprint] = engine

    def _tokens(self, lm: FrozenLM, each: int) -> int:
        """How many tokens a cache is made for: as many as are wanted, or as there is room for."""
        wanted, room = self._kv_tokens or max(KV_TOKENS, self._cache_bytes // each), self.residency.room(lm.name)
        least, most = min(SMALLEST_KV_TOKENS, wanted), room // each
        if most < least:
            raise InsufficientMemory(
                f"{lm.name!r} has {room} bytes left for its key/value cache; {least} tokens need {least * each}"
            )
        if self._kv_tokens is not None and most < wanted:
            log.warning("%s: memory has room for a cache of %d tokens, not of LW_KV_TOKENS=%d", lm.name, most, wanted)
        return min(wanted, most)


def _engine_of(lm: FrozenLM) -> str:
    """What is being opened; a model may go by several names."""
    return f"engine of {lm.fingerprint}"
