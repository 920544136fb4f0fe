"""The outputs of one request while they are generated."""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from latentwire.bridge.errors import LatentWireError
from latentwire.bridge.generation.base import Engine, Running
from latentwire.bridge.generation.output import Generation, TokenLogprob
from latentwire.bridge.prompt import Row
from latentwire.service.inference.bridges import Question, Served


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


class InFlightRequest:
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
