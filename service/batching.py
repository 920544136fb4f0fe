"""Group concurrent rows into one forward pass.

No row waits for company: while the device works on one batch, the rows that arrive become the next. Three
promises, each with a test of its name in ``tests/unit/test_batching.py``: every row gets exactly one result
or one error; a row nobody waits for any more never reaches the model; a failing batch fails its own rows only.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from bridge.errors import InferenceFailed, LatentWireError, Overloaded, TooLarge

Item = TypeVar("Item")
Result = TypeVar("Result")

log = logging.getLogger(__name__)


@dataclass
class Load:
    """What a service has taken on, and the last time anything moved; shared by all its batchers.

    Attributes:
        limit: Most rows admitted at once.
        admitted: Rows of requests accepted and not answered yet.
        waiting: Rows in a queue that somebody still waits for.
        running: Rows handed to the device.
        last_progress: ``time.monotonic()`` of the last batch finished or model loaded.
    """

    limit: int
    admitted: int = 0
    waiting: int = 0
    running: int = 0
    last_progress: float = field(default_factory=time.monotonic)

    @contextmanager
    def admit(self, rows: int) -> Iterator[None]:
        """Keep a place for all rows of a request while it is answered, so that a refusal comes before any work.

        Raises:
            TooLarge: They could never be admitted.
            Overloaded: They do not fit beside what was admitted before.
        """
        if rows > self.limit:
            raise TooLarge(f"the request makes {rows} rows; at most {self.limit} can wait", param="inputs")
        if self.admitted + rows > self.limit:
            raise Overloaded(f"{self.admitted} rows are being answered, {rows} more exceed {self.limit}")
        self.admitted += rows
        try:
            yield
        finally:
            self.admitted -= rows

    def progress(self) -> None:
        """Something moved."""
        self.last_progress = time.monotonic()


class Batcher(Generic[Item, Result]):
    """A queue in front of ``run``, which maps N rows to N results, or errors, in order."""

    def __init__(
        self,
        run: Callable[[Sequence[Item]], Awaitable[Sequence[Result | LatentWireError]]],
        *,
        max_batch: int,
        load: Load,
    ) -> None:
        self._run = run
        self._max_batch = max_batch
        self._load = load
        self._queue: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self._arrived = asyncio.Event()

    async def submit(self, items: Sequence[Item]) -> list[Result]:
        """Queue all rows of a request and wait for every result; cancelled, rows still queued are taken out.

        Raises:
            InferenceFailed: ``run`` raised for a batch one of them was in.
            LatentWireError: What ``run`` returned for one of them.
        """
        loop = asyncio.get_running_loop()
        answers: list[asyncio.Future[Result]] = [loop.create_future() for _ in items]
        if not self._load.waiting and not self._load.running:
            self._load.progress()
        self._queue.extend(zip(items, answers, strict=True))
        self._load.waiting += len(items)
        self._arrived.set()
        try:
            return list(await asyncio.gather(*answers))
        finally:
            for answer in answers:
                answer.cancel()
            self._forget_abandoned()

    async def serve(self) -> None:
        """Run batches until cancelled; rows still waiting then get an error, not silence."""
        try:
            while True:
                await self._arrived.wait()
                self._arrived.clear()
                while live := self._next_batch():
                    await self._answer(live)
        finally:
            for _, answer in self._queue:
                if not answer.done():
                    answer.set_exception(InferenceFailed("the service is stopping"))
            self._load.waiting -= len(self._queue)
            self._queue.clear()

    def _forget_abandoned(self) -> None:
        live = deque(row for row in self._queue if not row[1].done())
        self._load.waiting -= len(self._queue) - len(live)
        self._queue = live

    def _next_batch(self) -> list[tuple[Item, asyncio.Future[Result]]]:
        batch: list[tuple[Item, asyncio.Future[Result]]] = []
        while self._queue and len(batch) < self._max_batch:
            item, answer = self._queue.popleft()
            self._load.waiting -= 1
            if not answer.done():
                batch.append((item, answer))
        return batch

    async def _answer(self, live: list[tuple[Item, asyncio.Future[Result]]]) -> None:
        results: Sequence[Result | LatentWireError]
        self._load.running += len(live)
        try:
            results = await self._run([item for item, _ in live])
            if len(results) != len(live):
                raise RuntimeError(f"{len(results)} results for {len(live)} rows")
        except asyncio.CancelledError:
            for _, answer in live:
                if not answer.done():
                    answer.set_exception(InferenceFailed("the service is stopping"))
            raise
        except LatentWireError as error:
            results = [error] * len(live)
        except Exception as error:
            log.exception("a batch of %d rows failed", len(live))
            results = [_failed(error) for _ in live]
        finally:
            self._load.running -= len(live)
            self._load.progress()
        for (_, answer), result in zip(live, results, strict=True):
            if answer.done():
                continue
            if isinstance(result, LatentWireError):
                answer.set_exception(result)
            else:
                answer.set_result(result)


def _failed(error: Exception) -> InferenceFailed:
    failure = InferenceFailed(f"the model failed with {type(error).__name__}")
    failure.__cause__ = error
    return failure
