"""The life of a request in a generation engine: submitted, running, then ended once, with an answer or an error.

``ContinuousEngine`` and ``PaddedEngine`` differ in how steps are made; what is here they have in common.
"""

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import ClassVar, Literal, TypeGuard

from jaxtyping import Float
from torch import Tensor

from latentwire.bridge.errors import InferenceFailed, InvalidRequest, LatentWireError, at_fault
from latentwire.bridge.generation.output import Answer, Generation, Transcript
from latentwire.bridge.models import FrozenLM
from latentwire.bridge.prompt import Row
from latentwire.bridge.reader import check_ids
from latentwire.bridge.results import TokenLogprob
from latentwire.bridge.sampling import SamplingParams

log = logging.getLogger(__name__)
Kind = Literal["continuous", "padded"]


@dataclass(frozen=True, eq=False)
class Soft:
    """Soft tokens of one latent for one receiver: what tells them apart from all others, and how they are made."""

    key: Hashable
    make: Callable[[], Float[Tensor, "K D"]]


@dataclass(eq=False)
class Running:
    """A request in an engine.

    Attributes:
        on_end: Called once, on the thread of the engine's ``Telling``, with the answer or the error.
        on_news: Called there with each piece of text that may be shown, and the log-probabilities of its tokens where
            those were asked for; when given.
        first_token_at: ``time.monotonic()`` when the first token was there.
    """

    name: str
    row: Row
    soft: Soft | None
    answer: Answer
    on_end: Callable[[Generation | LatentWireError], None]
    on_news: Callable[[str, tuple[TokenLogprob, ...]], None] | None = None
    first_token_at: float | None = None
    transcript: Transcript = field(init=False)

    def __post_init__(self) -> None:
        self.transcript = Transcript(self.answer)


class Telling:
    """A thread that does what it is given, one after the other: the text of answers is made here, and told.

    The thread that steps has no time for that: with hundreds of streams it would take longer than the step.
    """

    def __init__(self) -> None:
        self._given: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True, name="telling")
        self._thread.start()

    def soon(self, work: Callable[[], None]) -> None:
        """Do this after all that was given before."""
        self._given.put(work)

    def close(self) -> None:
        """End the thread, once everything is done."""
        self._given.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (work := self._given.get()) is not None:
            try:
                work()
            except Exception:  # of one caller's: the others are told all the same
                log.exception("a caller could not be told")


class Engine(ABC):
    """Generates for many requests at once with one receiver, on a thread of its own.

    Attributes:
        kind: How steps are made; shown by ``GET /bridges``.
        last_step: ``time.monotonic()`` of the last sign of progress.
        failure: Why the engine is dead, when it is: every request then fails with it.
        out_of_memory: How often a step did not fit.
        on_step: Called after every step (of a padded engine: every batch) with its rows and seconds.
        on_death: Called after an error that leaves the engine dead.
        submitting: A thread for calls of ``submit``, which make soft tokens, and wait while the engine begins again.
    """

    kind: ClassVar[Kind]

    def __init__(self, lm: FrozenLM, *, max_rows: int, on_death: Callable[[], None] = lambda: None) -> None:
        self.lm, self.max_rows = lm, max_rows
        self.last_step = time.monotonic()
        self.failure: LatentWireError | None = None
        self.out_of_memory = 0
        self.on_step: Callable[[int, float], None] = lambda rows, seconds: None
        self.on_death = on_death
        self._count = 0
        self._running: dict[str, Running] = {}  # until they are told how they ended
        self._lock = threading.RLock()
        self._telling = Telling()
        self.submitting = ThreadPoolExecutor(1, thread_name_prefix="submit")

    @property
    def running(self) -> int:
        """Requests that have not ended."""
        return len(self._running)

    @property
    def capacity_tokens(self) -> int:
        """Most tokens of one request, its answer included."""
        return self.lm.max_tokens

    def submit(
        self,
        row: Row,
        params: SamplingParams,
        soft: Soft | None,
        on_end: Callable[[Generation | LatentWireError], None],
        on_news: Callable[[str, tuple[TokenLogprob, ...]], None] | None = None,
    ) -> Running:
        """Take a request; it joins the running batch at the next step.

        Raises:
            InvalidRequest: It could never fit.
            LatentWireError: The engine is dead or closed.
        """
        if len(row) + params.max_tokens > self.capacity_tokens:
            raise InvalidRequest(
                f"the input takes {len(row)} tokens and the answer up to {params.max_tokens}; "
                f"this receiver has room for {self.capacity_tokens}",
                param="max_tokens",
            )
        check_ids(self.lm, row.text_ids)
        with at_fault("stop_ids"):
            check_ids(self.lm, params.stop_ids)
        with self._lock:
            self._count += 1
            running = Running(f"r{self._count}", row, soft, Answer(self.lm, params), on_end, on_news)
        self._prepare(running)
        with self._lock:
            try:
                self._check_alive()
            except LatentWireError:
                self._discard(running)
                raise
            if not self._running:
                self.last_step = time.monotonic()
            self._running[running.name] = running
            try:
                self._begin(running)
            except BaseException:
                self.cancel(running)
                raise
        return running

    def cancel(self, running: Running) -> None:
        """Give a request up: it ends at the next step, its memory is free, and nobody is called any more."""
        with self._lock:
            if self._take_out(running):
                self._stop(running)

    @abstractmethod
    def close(self) -> None:
        """End the thread and free what it holds; requests still running fail."""

    def _end_threads(self) -> None:
        """Those that all engines have, once everybody has been told."""
        self._telling.close()
        self.submitting.shutdown(wait=False)

    @abstractmethod
    def _begin(self, running: Running) -> None:
        """Hand a request to the thread."""

    @abstractmethod
    def _prepare(self, running: Running) -> None:
        """What can be done before it is handed over, on the caller's thread."""

    @abstractmethod
    def _stop(self, running: Running) -> None:
        """Tell the thread that a request is over before its time."""

    @abstractmethod
    def _discard(self, running: Running) -> None:
        """Let go of what a request held."""

    def _check_alive(self) -> None:
        if self.failure is not None:
            raise type(self.failure)(str(self.failure)) from self.failure.__cause__

    def _is_live(self, running: Running | None) -> TypeGuard[Running]:
        """Whether a request takes more tokens."""
        return running is not None and running.name in self._running and not running.answer.over

    def _advance(self, running: Running) -> None:
        """After a token, on the thread that steps: let its text be read where somebody waits for that."""
        if running.first_token_at is None:
            running.first_token_at = time.monotonic()
        answer = running.answer
        if answer.over or running.on_news is not None or answer.params.stop:
            self._telling.soon(partial(self._tell, running))

    def _tell(self, running: Running) -> None:
        """Show what is new, and end the request where it ended."""
        if running.name not in self._running:
            return
        try:
            news = running.transcript.read()
            if news and running.on_news is not None:
                running.on_news(news, running.transcript.told())
            said: Generation | LatentWireError | None = running.transcript.generation
        except Exception as error:  # of one request's reading: no reason to end the others
            log.exception("a request failed while its answer was read")
            self._stop(running)
            said = failed(error)
        if said is not None:
            self._tell_end(running, said)

    def _tell_end(self, running: Running, result: Generation | LatentWireError) -> None:
        """End a request, unless somebody has just done so."""
        if self._take_out(running):
            running.on_end(result)

    def _end(self, running: Running, result: Generation | LatentWireError) -> None:
        """The same from any other thread: it is out at once, and its caller is told in turn."""
        if self._take_out(running):
            self._telling.soon(partial(running.on_end, result))

    def _take_out(self, running: Running) -> bool:
        with self._lock:
            if self._running.pop(running.name, None) is None:
                return False
            self._discard(running)
            return True

    def _die(self, failure: LatentWireError) -> None:
        """No request will be served any more; those that run fail, but for answers that are there and only untold."""
        with self._lock:
            self.failure = failure
            lost = list(self._running.values())
        for running in lost:
            self._stop(running)
            self._telling.soon(partial(self._tell_end, running, failure))


def failed(error: BaseException) -> InferenceFailed:
    """What callers are told of an error that no request caused."""
    failure = InferenceFailed(f"the model failed with {type(error).__name__}")
    failure.__cause__ = error
    return failure
