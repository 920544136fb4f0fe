"""Group concurrent rows into one forward pass.

No row waits for others to come: while the device works on one batch, the rows that arrive become the next. Promises,
each with a test in ``tests/unit/test_batching.py``: every row gets exactly one result or one error; a row nobody waits
for any more never reaches the model; a failing batch fails its own rows only; the row that has waited longest is always
in the next batch; a batch that memory is too small for is halved until it fits, and only a row that does not fit alone
is refused.
"""

import asyncio
import gc
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from latentwire.bridge.errors import InferenceFailed, InsufficientMemory, LatentWireError, NotReady, first_line
from latentwire.bridge.memory import halves
from latentwire.service.inference.admission import Admission

Item = TypeVar("Item")
Result = TypeVar("Result")

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Row(Generic[Item, Result]):
    item: Item
    tokens: int
    result: "asyncio.Future[Result]"
    queued_at: float = field(default_factory=time.monotonic)
    started: bool = False


class Batcher(Generic[Item, Result]):
    """A queue in front of ``run``, which maps N rows to N results, or errors, in order.

    A batch holds at most ``max_batch`` rows, and no more than keep rows × longest row within ``max_batch_tokens``;
    a longer row goes alone. Batches are made of rows of like length, around the row that has waited longest.

    Args:
        run: Called with one batch at a time.
        max_batch: Most rows of a batch.
        admission: Where rows are counted.
        max_batch_tokens: Most tokens of a batch, padding included; None: no limit.
        cost: Tokens of a row, asked once when it is submitted.
        is_out_of_memory: Whether an error of ``run`` says that memory did not suffice.
        free_caches: Gives back what is held unused, before a smaller batch is tried; called off the event loop.
        name: Under which batches that memory was too small for are counted.
        on_wait: Called with the seconds that each row has waited, when it reaches ``run``.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Item]], Awaitable[Sequence[Result | LatentWireError]]],
        *,
        max_batch: int,
        admission: Admission,
        max_batch_tokens: int | None = None,
        cost: Callable[[Item], int] = lambda _: 1,
        is_out_of_memory: Callable[[BaseException], bool] = lambda error: isinstance(error, MemoryError),
        free_caches: Callable[[], object] = gc.collect,
        name: str = "",
        on_wait: Callable[[float], object] = lambda seconds: None,
    ) -> None:
        self._run = run
        self._max_batch = max_batch
        self._max_tokens = math.inf if max_batch_tokens is None else max_batch_tokens
        self._cost = cost
        self._admission = admission
        self._is_out_of_memory = is_out_of_memory
        self._free_caches = free_caches
        self._name, self._on_wait = name, on_wait
        self._queue: list[_Row[Item, Result]] = []
        self._arrived = asyncio.Event()

    async def submit(
        self, items: Sequence[Item], on_started: Callable[[Item], object] = lambda item: None
    ) -> list[Result]:
        """Queue all rows of a request and wait for every result; cancelled, rows still queued are removed.

        At the end, also where an error is raised, ``on_started`` is called with each row that reached ``run``.

        Raises:
            InferenceFailed: ``run`` raised for a batch one of them was in.
            InsufficientMemory: One of them does not fit the device's memory, not even alone.
            LatentWireError: What ``run`` returned for one of them.
        """
        loop = asyncio.get_running_loop()
        rows: list[_Row[Item, Result]] = [_Row(item, self._cost(item), loop.create_future()) for item in items]
        if not self._admission.waiting and not self._admission.running:
            self._admission.progress()
        self._queue += rows
        self._admission.waiting += len(rows)
        self._arrived.set()
        try:
            return list(await asyncio.gather(*(row.result for row in rows)))
        finally:
            for row in rows:
                row.result.cancel()
                if row.started:
                    on_started(row.item)
            self._set_queue([row for row in self._queue if not row.result.done()])

    async def serve(self) -> None:
        """Run batches until cancelled; rows still waiting then get an error."""
        try:
            while True:
                await self._arrived.wait()
                self._arrived.clear()
                while batch := self._next_batch():
                    await self._run_batch(batch)
        finally:
            _refuse(self._queue)
            self._set_queue([])

    def _set_queue(self, rows: list[_Row[Item, Result]]) -> None:
        self._admission.waiting -= len(self._queue) - len(rows)
        self._queue = rows

    def _next_batch(self) -> list[_Row[Item, Result]]:
        """The row that has waited longest and those nearest to it in length, while at most half would be padding.

        Nearest first, so that lengths mix only where too few alike are waiting; the bound is for a short row beside
        many long ones, whose own pass is cheaper.
        """
        waiting = [row for row in self._queue if not row.result.done()]
        if not waiting:
            return []
        oldest = waiting[0]
        batch, longest, real = [oldest], oldest.tokens, oldest.tokens
        for row in sorted(waiting[1:], key=lambda row: abs(row.tokens - oldest.tokens)):
            padded = max(longest, row.tokens) * (len(batch) + 1)
            fits = padded <= self._max_tokens and padded <= 2 * (real + row.tokens)
            if fits and len(batch) < self._max_batch:
                batch.append(row)
                longest, real = max(longest, row.tokens), real + row.tokens
        taken = set(batch)
        self._set_queue([row for row in waiting if row not in taken])
        return batch

    async def _run_batch(self, batch: list[_Row[Item, Result]]) -> None:
        """Give every row its result or an error, in as many parts as memory needs."""
        parts = [batch]
        try:
            while parts:
                part = [row for row in parts.pop() if not row.result.done()]
                if part and (shortage := await self._attempt(part)):
                    parts += await self._halve(part, shortage)
        except asyncio.CancelledError:
            _refuse(batch)
            raise

    async def _attempt(self, rows: list[_Row[Item, Result]]) -> str:
        """Run rows and set their results; or, where memory was too small for them, return the reason."""
        results: Sequence[Result | LatentWireError]
        self._admission.running += len(rows)
        now = time.monotonic()
        for row in rows:
            if not row.started:
                self._on_wait(now - row.queued_at)
            row.started = True
        try:
            results = await self._run([row.item for row in rows])
            if len(results) != len(rows):
                raise RuntimeError(f"{len(results)} results for {len(rows)} rows")
        except LatentWireError as error:
            results = [error] * len(rows)
        except Exception as error:
            if self._is_out_of_memory(error):
                return first_line(error)  # and the error goes, with the tensors that its frames hold
            log.exception("a batch of %d rows failed", len(rows))
            results = [InferenceFailed.of(error) for _ in rows]
        finally:
            self._admission.running -= len(rows)
            self._admission.progress()
        for row, result in zip(rows, results, strict=True):
            _set_result(row, result)
        return ""

    async def _halve(self, rows: list[_Row[Item, Result]], reason: str) -> list[list[_Row[Item, Result]]]:
        self._admission.out_of_memory[self._name] += 1
        await asyncio.to_thread(self._free_caches)
        tokens = max(row.tokens for row in rows)
        log.warning("memory is too small for %d rows of at most %d tokens: %s", len(rows), tokens, reason)
        if len(rows) == 1:
            _set_result(
                rows[0], InsufficientMemory(f"a row of {tokens} tokens does not fit the device's memory: {reason}")
            )
        return halves(rows)


def _set_result(row: _Row[Item, Result], result: Result | LatentWireError) -> None:
    if row.result.done():
        return
    if isinstance(result, LatentWireError):
        row.result.set_exception(result)
    else:
        row.result.set_result(result)


def _refuse(rows: Sequence[_Row[Item, Result]]) -> None:
    for row in rows:
        _set_result(row, NotReady("the service is stopping"))
