"""The outputs of one request while they are generated."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from latentwire.bridge.bridge import Bridge
from latentwire.bridge.config import Prompt
from latentwire.bridge.errors import LatentWireError
from latentwire.bridge.generation.base import Engine, Running, Times
from latentwire.bridge.generation.output import Generation
from latentwire.bridge.prompt import Row
from latentwire.bridge.results import TokenLogprob
from latentwire.bridge.sampling import SamplingParams
from latentwire.bridge.sources import Given, characters_in


@dataclass(frozen=True, slots=True)
class Text:
    """A row of an encode batch; ``param`` says which field of the request it is."""

    text: str
    truncate: bool
    param: str


@dataclass(frozen=True, eq=False)
class GenerationRequest:
    """One output to generate: what stands in the latent's place, and the prompt."""

    source: Given
    prompt: Prompt
    params: SamplingParams

    @property
    def characters(self) -> int:
        """Length of all its text."""
        texts = [self.prompt] if isinstance(self.prompt, str) else [turn.text for turn in self.prompt]
        return sum(map(len, texts)) + characters_in(self.source)


@dataclass(frozen=True, eq=False)
class Asked:
    """An output to generate: what its receiver reads, the latent (K, C) at its slots, and how it is answered."""

    row: Row
    latent: NDArray[np.float32] | None
    params: SamplingParams


@dataclass(frozen=True)
class Piece:
    """New text of output ``index``, and the log-probabilities of its tokens."""

    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class GenerationResult:
    """What was generated for each request, and when."""

    generations: list[Generation]
    times: list[Times | None]


class InFlightRequest:
    """The outputs of one request while they are generated."""

    def __init__(
        self,
        engine: Engine,
        bridge: Bridge,
        receiver: str,
        asked: Sequence[Asked],
        on_piece: Callable[[Piece], None] | None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._engine, self._bridge, self._receiver = engine, bridge, receiver
        self._asked, self._on_piece = asked, on_piece
        self._results: list[asyncio.Future[Generation]] = [self._loop.create_future() for _ in asked]
        self._running: list[Running] = []
        self._cancelled = False

    @property
    def generated_tokens(self) -> int:
        """Tokens so far, of all outputs."""
        return sum(running.tokens.token_count for running in self._running)

    @property
    def waited_seconds(self) -> list[float]:
        """From submission to the first step, of the outputs that have a token."""
        return [running.waited_seconds for running in self._running if running.times]

    async def result(self) -> GenerationResult:
        """Submit all requests to the engine, and wait for their ends; cancelled, they are cancelled too."""
        submitting = self._loop.run_in_executor(self._engine.submitting, self._submit)
        try:
            await asyncio.shield(submitting)
            generations = await asyncio.gather(*self._results)
            return GenerationResult(generations, [running.times for running in self._running])
        finally:
            self._cancelled = True
            await _settled(submitting)
            for running in self._running:
                self._engine.cancel(running)
            for result in self._results:
                result.cancel()

    def _submit(self) -> None:
        """On the engine's submitting thread: makes soft tokens, and waits for locks."""
        for index, asked in enumerate(self._asked):
            if self._cancelled:
                return
            soft = self._bridge.soft(self._receiver, self._engine.lm, asked.latent)
            self._running.append(
                self._engine.submit(
                    asked.row,
                    asked.params,
                    soft and replace(soft, wanted=lambda: not self._cancelled),
                    partial(self._post, self._end, self._results[index]),
                    None if self._on_piece is None else partial(self._post, self._show, index),
                )
            )

    def _post(self, call: Callable[..., None], *arguments: object) -> None:
        """Call something on the event loop from an engine's thread; the loop may have been closed."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call, *arguments)

    def _show(self, index: int, text: str, logprobs: tuple[TokenLogprob, ...]) -> None:
        if self._on_piece is not None and not self._cancelled:
            self._on_piece(Piece(index, text, logprobs))

    @staticmethod
    def _end(future: asyncio.Future[Generation], result: Generation | LatentWireError) -> None:
        if future.done():
            return
        if isinstance(result, LatentWireError):
            future.set_exception(result)
        else:
            future.set_result(result)


async def _settled(submitting: asyncio.Future[None]) -> None:
    """Wait until a thread is done, whatever its outcome; being cancelled does not end the wait."""
    while not submitting.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait([submitting])
