"""The engine for receivers that continuous batching does not take: left-padded batches of the library's ``generate``.

While one batch runs, the requests that arrive become the next; exact for every decoder family, slower under load.

Dimensions used in this file:
    B rows of a batch    K soft tokens    D receiver width
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bridge import engine
from bridge.devices import is_out_of_memory
from bridge.errors import InsufficientMemory, NotReady, first_line
from bridge.models import FrozenLM
from bridge.running import Engine, Running, failed

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

    def close(self) -> None:
        """End the thread after the batch under way; requests still running fail."""
        self._closed = True
        self._die(NotReady("the service is stopping"))
        self._arrived.set()
        self._thread.join()

    def _prepare(self, running: Running) -> None:
        if running.soft is not None:
            self._soft[running.name] = running.soft.make()

    def _discard(self, running: Running) -> None:
        self._soft.pop(running.name, None)

    def _begin(self, running: Running) -> None:
        self._waiting.append(running)
        self._arrived.set()

    def _stop(self, running: Running) -> None:
        if running.answer.ended_by is None:
            running.answer.ended_by = "length"  # its row takes no more tokens, and does not hold the batch up

    def _serve(self) -> None:
        try:
            while not self._closed:
                self._arrived.wait()
                self._arrived.clear()
                while batch := self._next_batch():
                    self._run(batch)
        except Exception as error:
            log.exception("the generation engine died")
            self._die(failed(error))
            self.on_death()

    def _next_batch(self) -> list[Running]:
        batch: list[Running] = []
        while self._waiting and len(batch) < self.max_rows:
            running = self._waiting.popleft()
            if running.name in self._running:
                batch.append(running)
        return batch

    def _run(self, batch: Sequence[Running]) -> None:
        soft, started = [self._soft.get(running.name) for running in batch], time.monotonic()
        try:
            engine.run(
                self.lm,
                [running.row for running in batch],
                _padded(soft),
                [running.answer for running in batch],
                lambda row: self._token(batch[row]),
            )
        except Exception as error:
            self._recover(batch, error)
        self.on_step(len(batch), time.monotonic() - started)

    def _token(self, running: Running) -> None:
        self.last_step = time.monotonic()
        if running.name in self._running:
            self._advance(running, running.answer.ended_by is not None)

    def _recover(self, batch: Sequence[Running], error: Exception) -> None:
        live = [running for running in batch if running.name in self._running]
        if not is_out_of_memory(error):
            log.error("a batch of %d rows failed: %s", len(batch), first_line(error), exc_info=error)
            for running in live:
                self._end(running, failed(error))
            return
        self.out_of_memory += 1
        if len(live) == 1:
            self._end(live[0], InsufficientMemory(f"the request does not fit in memory ({first_line(error)})"))
            return
        half = (len(live) + 1) // 2
        for part in (live[:half], live[half:]):
            if part:
                self._run(part)


def _padded(soft: Sequence[Float[Tensor, "K D"] | None]) -> Float[Tensor, "B K D"] | None:
    """Soft tokens of rows, right-padded; None stands for a row without."""
    first = next((tokens for tokens in soft if tokens is not None), None)
    if first is None:
        return None
    return pad_sequence([first[:0] if tokens is None else tokens for tokens in soft], batch_first=True)
