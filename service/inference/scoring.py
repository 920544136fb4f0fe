"""Continuations of many requests scored together: a queue for each bridge and receiver, and one thread.

A row of a queue is one input with all its continuations, which share what the receiver reads of it. The passes take
turns with those of the receiver's generation engine.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from latentwire.bridge.bridge import Bridge
from latentwire.bridge.config import Prompt
from latentwire.bridge.devices import is_out_of_memory
from latentwire.bridge.memory import free_caches
from latentwire.bridge.prompt import Row
from latentwire.bridge.residency import Residency
from latentwire.bridge.scoring import Continuation, score_from_latents, shared
from latentwire.bridge.sources import Given, characters_in, latent_of
from latentwire.service.inference.admission import Admission
from latentwire.service.inference.batching import Batcher
from latentwire.service.metrics import ModelMetrics
from latentwire.service.settings import Sizes


@dataclass(frozen=True, eq=False)
class ScoreQuestion:
    """One input to score about: what stands in the latent's place, and what may follow."""

    source: Given
    prompt: Prompt
    choices: Sequence[str]
    end: bool

    def item(self, bridge: Bridge, receiver: str) -> "ScoreItem":
        """As its receiver reads it (InvalidRequest: no room, or an empty choice)."""
        rows = bridge.continue_with(receiver, self.source, self.prompt, self.choices, end=self.end)
        return ScoreItem(latent_of(self.source), rows)

    @property
    def characters(self) -> int:
        """Length of all that is tokenised: the prompt goes before each choice."""
        texts = [self.prompt] if isinstance(self.prompt, str) else [turn.text for turn in self.prompt]
        before = sum(map(len, texts)) + characters_in(self.source)
        return sum(before + len(choice) for choice in self.choices)


@dataclass(frozen=True, eq=False)
class ScoreItem:
    """A question as its receiver reads it: a row for each choice."""

    latent: NDArray[np.float32] | None
    rows: list[Row]

    @property
    def tokens(self) -> int:
        """Tokens that are read: what the rows share once, and the rest of each."""
        length = shared(self.rows)
        return length + sum(len(row) - length for row in self.rows)


class Scorers:
    """See the module."""

    def __init__(
        self, residency: Residency, admission: Admission, measures: ModelMetrics, sizes: Sizes, load_wait: float
    ) -> None:
        self._residency, self._admission, self._measures = residency, admission, measures
        self._sizes, self._load_wait = sizes, load_wait
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="score")
        self._queues: dict[tuple[str, str], Batcher[ScoreItem, list[Continuation]]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def score(
        self, bridge: Bridge, receiver: str, items: Sequence[ScoreItem], on_cost: Callable[[int], None]
    ) -> list[list[Continuation]]:
        """Score the choices of inputs, with those of other requests.

        ``on_cost`` is called at the end, also where an error is raised, with the tokens that reached the receiver.
        """
        read: list[int] = []
        try:
            return await self._queue(bridge, receiver).submit(items, lambda item: read.append(item.tokens))
        finally:
            on_cost(sum(read))

    async def close(self) -> None:
        """End the queues; whoever still waits gets an error."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._thread.shutdown)

    def _queue(self, bridge: Bridge, receiver: str) -> Batcher[ScoreItem, list[Continuation]]:
        key = (bridge.name, receiver)
        if key not in self._queues:
            self._queues[key] = Batcher(
                partial(self._run, bridge, receiver),
                max_batch=self._sizes.max_batch,
                max_batch_tokens=self._sizes.batch_tokens,
                cost=lambda item: item.tokens,
                admission=self._admission,
                is_out_of_memory=is_out_of_memory,
                free_caches=free_caches,
                name="score",
                on_wait=self._measures.queue_seconds.labels("score").observe,
            )
            self._tasks.append(asyncio.create_task(self._queues[key].serve()))
        return self._queues[key]

    async def _run(self, bridge: Bridge, receiver: str, items: Sequence[ScoreItem]) -> list[list[Continuation]]:
        def run() -> list[list[Continuation]]:
            with self._residency.use(receiver, self._load_wait) as lm:
                bridge.check(lm)
                self._admission.progress()  # a large model loads for minutes; that is no stall
                latents = [item.latent for item in items]
                return score_from_latents(bridge.model, receiver, lm, latents, [item.rows for item in items])

        with self._measures.batch("score", len(items), sum(item.tokens for item in items)):
            return await asyncio.get_running_loop().run_in_executor(self._thread, run)
