"""The engine for receivers that continuous batching does not take: left-padded batches of the library's ``generate``.

While one batch runs, the requests that arrive become the next; exact for every decoder family, slower under load.

Dimensions used in this file:
    K soft tokens    D receiver width
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from jaxtyping import Float
from torch import Tensor

from latentwire.bridge import engine
from latentwire.bridge.devices import is_out_of_memory
from latentwire.bridge.errors import InferenceFailed, InsufficientMemory, NotReady, first_line
from latentwire.bridge.generation.base import Engine, Running
from latentwire.bridge.memory import free_caches, halves
from latentwire.bridge.models import FrozenLM

log = logging.getLogger(__name__)


class PaddedEngine(Engine):
    """See the module. Out of memory, a batch is split and goes on where it was; other errors fail its requests only."""

    kind = "padded"

    def __init__(self, lm: FrozenLM, *, max_rows: int = 32, on_death: Callable[[], None] = lambda: None) -> None:
        super().__init__(lm, max_rows=max_rows, on_death=on_death)
        self._waiting: deque[Running] = deque()
        self._soft: dict[str, Float[Tensor, "K D"]] = {}
        self._arrived = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._serve, daemon=True, name="padded-engine")
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def close(self) -> None:
        """End the thread after the batch under way; requests still running fail."""
        self._closed = True
        self._die(NotReady("the service is stopping"))
        self._arrived.set()
        self._thread.join()
        self._end_threads()

    def _prepare(self, running: Running) -> None:
        if running.soft is not None:
            self._soft[running.name] = running.soft.make()

    def _discard(self, running: Running) -> None:
        self._soft.pop(running.name, None)

    def _begin(self, running: Running) -> None:
        self._waiting.append(running)
        self._arrived.set()

    def _stop(self, running: Running) -> None:
        running.tokens.cancel()  # its row takes no more tokens, and does not hold the batch up

    def _serve(self) -> None:
        try:
            while not self._closed:
                self._arrived.wait()
                self._arrived.clear()
                while batch := self._next_batch():
                    self._run(batch)
        except Exception as error:
            log.exception("the generation engine died")
            self._die(InferenceFailed.of(error))
            self.on_death()

    def _next_batch(self) -> list[Running]:
        batch: list[Running] = []
        while self._waiting and len(batch) < self.max_rows:
            running = self._waiting.popleft()
            if self._is_live(running):
                batch.append(running)
        return batch

    def _run(self, batch: list[Running]) -> None:
        """Bring a batch to its end, in as many parts as memory asks for."""
        parts, started = [batch], time.monotonic()
        for running in batch:
            running.waited_seconds = started - running.submitted_at
        while parts:
            with self._lock:  # one that is given up meanwhile has lost its soft tokens
                part = list(filter(self._is_live, parts.pop()))
                soft = [self._soft.get(running.name) for running in part]
            if part and (shortage := self._attempt(part, soft)):
                self.out_of_memory += 1
                free_caches()
                if len(part) == 1:
                    self._end(part[0], InsufficientMemory(f"the request does not fit in memory ({shortage})"))
                parts += halves(part)
        tokens = sum(len(running.row) + running.tokens.token_count for running in batch)
        self.on_step(len(batch), tokens, time.monotonic() - started)

    def _attempt(self, batch: Sequence[Running], soft: Sequence[Float[Tensor, "K D"] | None]) -> str:
        """Run a batch; where memory is too small for it, what the device says."""
        try:
            engine.run(
                self.lm,
                [running.row for running in batch],
                engine.pad_rows(soft),
                [running.tokens for running in batch],
                lambda row: self._token(batch[row]),
            )
        except Exception as error:
            if is_out_of_memory(error):
                return first_line(error)  # and the error goes, with the tensors that its frames hold
            log.error("a batch of %d rows failed: %s", len(batch), first_line(error), exc_info=error)
            for running in filter(self._is_live, batch):
                self._end(running, InferenceFailed.of(error))
        return ""

    def _token(self, running: Running) -> None:
        self.last_step = time.monotonic()
        self._advance(running)
