"""The outputs of one request while they are generated."""

import asyncio
import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from latentwire.bridge.bridge import Bridge
from latentwire.bridge.config import Prompt
from latentwire.bridge.engine import soften
from latentwire.bridge.errors import LatentWireError
from latentwire.bridge.generation.base import Engine, Running, Soft
from latentwire.bridge.generation.output import Generation
from latentwire.bridge.models import FrozenLM
from latentwire.bridge.prompt import Row
from latentwire.bridge.results import TokenLogprob
from latentwire.bridge.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Text:
    """A row of an encode batch; ``param`` says which field of the request it is."""

    text: str
    truncate: bool
    param: str


@dataclass(frozen=True, eq=False)
class GenerationRequest:
    """One output that is asked for: what stands in the latent's place (a latent, a text, nothing), and the prompt."""

    given: NDArray[np.float32] | str | None
    prompt: Prompt
    params: SamplingParams

    @property
    def characters(self) -> int:
        """Of all its text."""
        said = [self.prompt] if isinstance(self.prompt, str) else [turn.text for turn in self.prompt]
        return sum(map(len, [*said, self.given if isinstance(self.given, str) else ""]))


@dataclass(frozen=True)
class Piece:
    """Text that an output got, and the log-probabilities of its tokens: ``index`` says which output."""

    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class GenerationResult:
    """The answers to requests, and when the first token of each came."""

    answers: list[Generation]
    first_token_seconds: list[float]


class InFlightRequest:
    """The outputs of one request while they are generated."""

    def __init__(
        self,
        engine: Engine,
        bridge: Bridge,
        receiver: str,
        rows: Sequence[Row],
        requests: Sequence[GenerationRequest],
        on_piece: Callable[[Piece], None] | None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._engine, self._bridge, self._receiver = engine, bridge, receiver
        self._rows, self._requests, self._on_piece = rows, requests, on_piece
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
        for index, (row, request) in enumerate(zip(self._rows, self._requests, strict=True)):
            if self._given_up:
                return
            self._running.append(
                self._engine.submit(
                    row,
                    request.params,
                    soft_tokens_of(self._bridge, self._receiver, self._engine.lm, request),
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


def soft_tokens_of(bridge: Bridge, receiver: str, lm: FrozenLM, request: GenerationRequest) -> Soft | None:
    """Soft tokens of a request's latent, under a key that no other latent, encoder or head has."""
    latent = request.given
    if not isinstance(latent, np.ndarray):
        return None

    def make() -> Float[Tensor, "K D"]:
        tokens = soften(bridge.model, receiver, lm, [latent])
        assert tokens is not None
        return tokens[0]

    digest = hashlib.blake2b(latent.tobytes(), digest_size=32).digest()
    return Soft((bridge.manifest.bridge_id, bridge.manifest.heads[receiver].sha256, digest), make)
