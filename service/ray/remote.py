"""Models that run in replicas on Ray, as the HTTP side sees them.

A replica that ends, or whose node does, takes no request with it: each is asked again of another. What a model does
depends on the question alone, its seed included, so the answer is the same, and a stream goes on where it was.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus

from latentwire.bridge.bridge import Bridge
from latentwire.bridge.engine import Encoded
from latentwire.bridge.errors import NotReady, first_line, shorten
from latentwire.bridge.reader import SourceTokens
from latentwire.bridge.scoring import Continuation
from latentwire.service.inference.models import InMemory
from latentwire.service.inference.request import Asked, GenerationResult, Piece
from latentwire.service.inference.scoring import ScoreItem
from latentwire.service.processes.frames import (
    Answer,
    Encode,
    Failure,
    Generate,
    Manage,
    Reply,
    Said,
    Score,
    encoded,
    unframed,
    unpack,
)
from latentwire.service.ray.told import RETRY_SECONDS, Told

log = logging.getLogger(__name__)

Value = TypeVar("Value")
AGAIN_SECONDS = (0.0, 0.1, 0.2, 0.5, *[1.0] * 30)  # before a question is asked, and again: Ray learns who has gone
POLL_SECONDS = 1.0  # between signs of life
SOON_SECONDS = 5.0  # within which a replica that does not hang says how it is


class RayModels:
    """As ``Models``, by handles.

    Args:
        encoder: Of the deployment that encodes.
        generator: Of that which generates and scores.
        stall_timeout: Seconds without any answer, while there are questions, after which they count as stalled.

    Attributes:
        ready: Whether a replica of each deployment has answered lately; Ray shows none that is not warm.
        failure: What Ray says of a deployment that could not start.
        dead: Never set: Ray replaces a replica whose engine has died.
    """

    dead: str | None = None

    def __init__(self, encoder: DeploymentHandle, generator: DeploymentHandle, stall_timeout: float) -> None:
        self._encoder, self._generator, self._stall_timeout = encoder, generator, stall_timeout
        self.failure: str | None = None
        self.ready = False
        self._heard, self._asked = time.monotonic(), 0
        self._ids = itertools.count()
        self._task: asyncio.Task[None] | None = None

    @property
    def stalled(self) -> bool:
        """As of ``Models``."""
        return self._asked > 0 and time.monotonic() - self._heard > self._stall_timeout

    async def start(self) -> None:
        """Look again and again whether replicas are there, from now on."""
        self._task = asyncio.create_task(self._keep_looking())

    async def stop(self) -> None:
        """Look no more. The replicas are not this process's."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def encode(
        self, bridge: Bridge, sources: Sequence[SourceTokens], on_cost: Callable[[int], None]
    ) -> list[Encoded]:
        """As ``Models.encode``."""
        question = Encode(next(self._ids), bridge.name, sources)
        return await self._ask(self._encoder, question, bridge, list[Encoded], on_cost)

    async def generate(
        self,
        bridge: Bridge,
        receiver: str,
        asked: Sequence[Asked],
        on_piece: Callable[[Piece], None] | None,
        on_cost: Callable[[int], None],
    ) -> GenerationResult:
        """As ``Models.generate``."""
        question = Generate(next(self._ids), bridge.name, receiver, asked, on_piece is not None)
        return await self._ask(self._generator, question, bridge, GenerationResult, on_cost, on_piece)

    async def score(
        self, bridge: Bridge, receiver: str, items: Sequence[ScoreItem], on_cost: Callable[[int], None]
    ) -> list[list[Continuation]]:
        """As ``Models.score``."""
        question = Score(next(self._ids), bridge.name, receiver, items)
        return await self._ask(self._generator, question, bridge, list[list[Continuation]], on_cost)

    async def in_memory(self) -> InMemory:
        """As ``Models.in_memory``, in one replica of each deployment; nothing is, while there is none."""
        parts = await asyncio.gather(*map(self._look, (self._encoder, self._generator)))
        held = [part for part in parts if part is not None]
        return InMemory(
            {name: size for part in held for name, size in part.bytes.items()},
            {name: kind for part in held for name, kind in part.engines.items()},
            [name for part in held for name in part.pinned],
        )

    async def load(self, bridge: Bridge) -> None:
        """As ``Models.load``, in every replica."""
        await self._tell(Manage(next(self._ids), "load", bridge.name), bridge, type(None))

    async def unload(self, bridge: Bridge) -> int:
        """As ``Models.unload``, in every replica."""
        return sum(await self._tell(Manage(next(self._ids), "unload", bridge.name), bridge, int))

    async def pin(self, bridge: Bridge, stay: bool) -> None:
        """As ``Models.pin``, in every replica."""
        await self._tell(Manage(next(self._ids), "pin" if stay else "unpin", bridge.name), bridge, type(None))

    async def metrics(self) -> bytes:
        """Whether they are ready: what runs in replicas is Ray's to tell."""
        return b"# HELP latentwire_ready 1 once warmed up.\n# TYPE latentwire_ready gauge\nlatentwire_ready %d\n" % (
            self.ready
        )

    async def _ask(
        self,
        half: DeploymentHandle,
        question: Any,
        bridge: Bridge | None,
        type_: type[Value],
        on_cost: Callable[[int], None] = lambda cost: None,
        on_piece: Callable[[Piece], None] | None = None,
    ) -> Value:
        """Ask, and again where a replica goes.

        Raises:
            NotReady: None could answer, or another one says something else than the caller has seen already.
        """
        data, bridge_id = encoded(question), "" if bridge is None else bridge.manifest.bridge_id
        told = Told(on_piece)
        if not self._asked:
            self._heard = time.monotonic()
        self._asked += 1
        try:
            for pause in AGAIN_SECONDS:
                await asyncio.sleep(pause)
                told.begin()
                try:
                    async with aclosing(_replies(half, data, bridge_id, on_piece is not None)) as replies:
                        async for reply in replies:
                            self._heard = time.monotonic()
                            if isinstance(reply, Said):
                                told.take(reply.piece)
                            elif isinstance(reply, Answer | Failure):
                                return _value(reply, type_, on_cost)
                    log.warning("a replica of %s ended its answer early", half.deployment_name)
                except (RayError, RayServeException) as error:
                    log.warning("a replica of %s has gone: %s", half.deployment_name, first_line(error))
            raise NotReady("no replica could answer", retry_after_seconds=RETRY_SECONDS)
        finally:
            self._asked -= 1

    async def _tell(self, question: Manage, bridge: Bridge, type_: type[Value]) -> list[Value]:
        """Ask every replica of both deployments."""
        answers: list[Value] = []
        for half in (self._encoder, self._generator):
            told = half.broadcast("ask", encoded(question), bridge.manifest.bridge_id)
            try:
                replies = await told.results_async()
            except (RayError, RayServeException) as error:
                raise NotReady(f"a replica has gone: {first_line(error)}", retry_after_seconds=RETRY_SECONDS) from None
            answers += [_value(reply, type_) for data in replies for reply in unframed(data)]
        return answers

    async def _look(self, half: DeploymentHandle) -> InMemory | None:
        """What a replica of a deployment has in memory; None where none answers."""
        with suppress(NotReady, TimeoutError):
            async with asyncio.timeout(SOON_SECONDS):
                return await self._ask(half, Manage(next(self._ids), "in_memory"), None, InMemory)
        return None

    async def _keep_looking(self) -> None:
        halves = (self._encoder, self._generator)
        while True:
            try:
                self.ready = None not in await asyncio.gather(*map(self._look, halves))
                self.failure = (
                    None if self.ready else await asyncio.to_thread(_failure, {half.app_name for half in halves})
                )
            except Exception:  # Ray is on its way up, or down
                log.exception("Ray says nothing of the replicas")
                self.ready = False
            await asyncio.sleep(POLL_SECONDS)


async def _replies(half: DeploymentHandle, data: bytes, bridge_id: str, stream: bool) -> AsyncGenerator[Reply, None]:
    """What a replica replies; closed before its end, the replica stops."""
    if stream:
        pieces = half.options(stream=True).stream.remote(data, bridge_id)
        try:
            async for frames in pieces:
                for reply in unframed(frames):
                    yield reply
        finally:
            pieces.cancel()
    else:
        answer = half.ask.remote(data, bridge_id)
        try:
            for reply in unframed(await answer):
                yield reply
        finally:
            answer.cancel()


def _value(reply: Reply, type_: type[Value], on_cost: Callable[[int], None] = lambda cost: None) -> Value:
    assert isinstance(reply, Answer | Failure), reply
    if reply.cost is not None:
        on_cost(reply.cost)
    if isinstance(reply, Failure):
        raise reply.error()
    return unpack(reply.result, type_)


def _failure(names: Collection[str]) -> str | None:
    """What Ray says of applications that could not be started."""
    found = serve.status().applications
    failed = [found[name] for name in names if name in found and found[name].status == ApplicationStatus.DEPLOY_FAILED]
    return shorten(failed[0].message) if failed else None
