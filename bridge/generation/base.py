"""The life of a request in a generation engine: submitted, running, then ended once, with an output or an error.

What ``ContinuousEngine``, ``PaddedEngine`` and ``RemoteEngine`` have in common; they differ in how they make steps.
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
from typing import ClassVar, Literal, NamedTuple, TypeGuard

from jaxtyping import Float
from torch import Tensor

from latentwire.bridge.errors import InferenceFailed, InvalidRequest, LatentWireError, at_fault
from latentwire.bridge.generation.output import Generation, OutputText, OutputTokens
from latentwire.bridge.models import FrozenLM
from latentwire.bridge.prompt import Row
from latentwire.bridge.reader import check_ids
from latentwire.bridge.results import TokenLogprob
from latentwire.bridge.sampling import SamplingParams

log = logging.getLogger(__name__)
Kind = Literal["continuous", "padded", "vllm"]


@dataclass(frozen=True, eq=False)
class Soft:
    """Soft tokens of one latent for one receiver.

    Attributes:
        key: Identifies them.
        make: Makes them.
        wanted: Whether somebody still waits for the answer, where they must wait for room.
    """

    key: Hashable
    make: Callable[[], Float[Tensor, "K D"]]
    wanted: Callable[[], bool] = lambda: True


class Times(NamedTuple):
    """Of one output, as of ``time.monotonic()``: submitted, first read by a step, first token, last token."""

    submitted: float
    begun: float
    first: float
    last: float


@dataclass(eq=False)
class Running:
    """A request in an engine.

    Attributes:
        on_end: Called once, on the engine's ``CallbackThread``, with the output or the error.
        on_text: When given, called there with each new piece of text, and the log-probabilities that were requested.
        submitted_at: ``time.monotonic()`` of its submission.
        waited_seconds: From submission to the first step that read any of it.
        first_token_at: ``time.monotonic()`` of the first token.
        last_token_at: The same of the last one.
    """

    name: str
    row: Row
    soft: Soft | None
    tokens: OutputTokens
    on_end: Callable[[Generation | LatentWireError], None]
    on_text: Callable[[str, tuple[TokenLogprob, ...]], None] | None = None
    submitted_at: float = field(default_factory=time.monotonic)
    waited_seconds: float = 0.0
    first_token_at: float | None = None
    last_token_at: float | None = None
    text: OutputText = field(init=False)

    @property
    def times(self) -> Times | None:
        """When its stages were; None before the first token."""
        first, last = self.first_token_at, self.last_token_at
        begun = self.submitted_at + self.waited_seconds
        return None if first is None or last is None else Times(self.submitted_at, begun, first, last)

    def __post_init__(self) -> None:
        self.text = OutputText(self.tokens)


class CallbackThread:
    """A thread that decodes the texts of outputs and calls the callbacks of requests, in order.

    The thread that steps has no time for that: with hundreds of streams it would take longer than the step.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True, name="callbacks")
        self._thread.start()

    @property
    def is_current(self) -> bool:
        """Whether it is this thread that asks."""
        return threading.current_thread() is self._thread

    def submit(self, call: Callable[[], None]) -> None:
        """Make a call after all that were submitted before."""
        self._queue.put(call)

    def close(self) -> None:
        """End the thread, once all calls are made."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (call := self._queue.get()) is not None:
            try:
                call()
            except Exception:  # of one request's callback: the other requests get theirs
                log.exception("a caller could not be told")


class Engine(ABC):
    """Generates for many requests at once with one receiver, on a thread of its own.

    Attributes:
        kind: How steps are made; shown by ``GET /bridges``.
        last_step: ``time.monotonic()`` of the last sign of progress.
        failure: Why the engine is dead, when it is: every request then fails with it.
        out_of_memory: How often a step did not fit.
        on_step: Called after every step (of a padded engine: every batch) with its rows, its tokens, those it read
            included, and its seconds.
        on_death: Called after an error that leaves the engine dead.
        submitting: A thread for calls of ``submit``, which make soft tokens, and wait while the engine begins again.
    """

    kind: ClassVar[Kind]

    def __init__(self, lm: FrozenLM, *, max_rows: int, on_death: Callable[[], None] = lambda: None) -> None:
        self.lm, self.max_rows = lm, max_rows
        self.last_step = time.monotonic()
        self.failure: LatentWireError | None = None
        self.out_of_memory = 0
        self.on_step: Callable[[int, int, float], None] = lambda rows, tokens, seconds: None
        self.on_death = on_death
        self._count = 0
        self._running: dict[str, Running] = {}  # until their end is reported
        self._lock = threading.RLock()
        self._callbacks = CallbackThread()
        self.submitting = ThreadPoolExecutor(1, thread_name_prefix="submit")

    @property
    def running(self) -> int:
        """Requests that have not ended."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Of these, those that no step has read any of."""
        return 0

    @property
    def preemptions(self) -> int:
        """Requests that gave up their place in a full cache, and were read again; so far."""
        return 0

    @property
    def capacity_tokens(self) -> int:
        """Most tokens of one request, its output included."""
        return self.lm.max_tokens

    @property
    def block_tokens(self) -> int:
        """Tokens of a block of that cache."""
        return 1

    @property
    def kv_tokens(self) -> int:
        """Tokens that the key/value cache has room for; 0 where each batch makes its own."""
        return 0

    @property
    def kv_tokens_used(self) -> int:
        """Of these, what running requests take now."""
        return 0

    def submit(
        self,
        row: Row,
        params: SamplingParams,
        soft: Soft | None,
        on_end: Callable[[Generation | LatentWireError], None],
        on_text: Callable[[str, tuple[TokenLogprob, ...]], None] | None = None,
    ) -> Running:
        """Accept a request; it joins the running batch at the next step.

        Raises:
            InvalidRequest: It could never fit.
            Overloaded: Its soft tokens found no room, which others' kept; a callback of a request finds it at once or
                not at all, since it is callbacks that make room.
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
            running = Running(f"r{self._count}", row, soft, OutputTokens(self.lm, params), on_end, on_text)
        self._prepare(running)
        with self._lock:
            if not self._running:
                self.last_step = time.monotonic()
            self._running[running.name] = running
            try:
                self._check_alive()
                self._begin(running)
            except BaseException:
                self.cancel(running)
                raise
        return running

    def cancel(self, running: Running) -> None:
        """Cancel a request: it ends at the next step, its memory is freed, and no callback of it is called any more."""
        with self._lock:
            if self._remove(running):
                self._stop(running)

    @abstractmethod
    def close(self) -> None:
        """End the thread and free what it holds; requests still running fail."""

    def _end_threads(self) -> None:
        """End the threads that all engines have, once all callbacks were called."""
        self._callbacks.close()
        self.submitting.shutdown(wait=False)

    @abstractmethod
    def _begin(self, running: Running) -> None:
        """Hand a request to the thread."""

    @abstractmethod
    def _prepare(self, running: Running) -> None:
        """What is done before it is handed over, on the caller's thread."""

    @abstractmethod
    def _stop(self, running: Running) -> None:
        """Tell the thread that a request was cancelled or has failed."""

    @abstractmethod
    def _discard(self, running: Running) -> None:
        """Free what a request held."""

    def _check_alive(self) -> None:
        if self.failure is not None:
            raise type(self.failure)(str(self.failure)) from self.failure.__cause__

    def _is_live(self, running: Running | None) -> TypeGuard[Running]:
        """Whether a request takes more tokens."""
        return running is not None and running.name in self._running and not running.tokens.over

    def _advance(self, running: Running) -> None:
        """After a token, on the thread that steps: have its text decoded where it is needed now."""
        running.last_token_at = time.monotonic()
        if running.first_token_at is None:
            running.first_token_at = running.last_token_at
        tokens = running.tokens
        if tokens.over or running.on_text is not None or tokens.params.stop:
            self._callbacks.submit(partial(self._read, running))

    def _read(self, running: Running) -> None:
        """Decode new tokens, report their text, and end the request where its output has ended."""
        if running.name not in self._running:
            return
        try:
            piece = running.text.read()
            if piece and running.on_text is not None:
                running.on_text(piece, running.text.new_logprobs())
            result: Generation | LatentWireError | None = running.text.generation
        except Exception as error:  # of one request: no reason to end the others
            log.exception("a request failed while its answer was read")
            self._stop(running)
            result = InferenceFailed.of(error)
        if result is not None:
            self._end_here(running, result)

    def _end_here(self, running: Running, result: Generation | LatentWireError) -> None:
        """End a request on the callback thread, unless it has ended."""
        if self._remove(running):
            running.on_end(result)

    def _end(self, running: Running, result: Generation | LatentWireError) -> None:
        """The same from any other thread: it is removed at once, and its callback is called in turn."""
        if self._remove(running):
            self._callbacks.submit(partial(running.on_end, result))

    def _remove(self, running: Running) -> bool:
        with self._lock:
            if self._running.pop(running.name, None) is None:
                return False
            self._discard(running)
            return True

    def _die(self, failure: LatentWireError) -> None:
        """Refuse all later requests; those that run fail, except outputs that are whole and not reported yet."""
        with self._lock:
            self.failure = failure
            unfinished = list(self._running.values())
        for running in unfinished:
            self._stop(running)
            self._callbacks.submit(partial(self._end_here, running, failure))
