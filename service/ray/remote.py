"""Models that run in replicas on Ray, as the HTTP side sees them.

A replica that ends, or whose node does, takes no request with it: each is asked again of another. What a model does
depends on the question alone, its seed included, so the answer is the same, and a stream goes on where it was.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus

from latentwire.bridge.bridge import Bridge
from latentwire.bridge.engine import Encoded
from latentwire.bridge.errors import InferenceFailed, LatentWireError, NotReady, first_line, shorten
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
from latentwire.service.ray.measures import merged
from latentwire.service.ray.replicas import EngineDied, identity, shifted
from latentwire.service.ray.told import RETRY_SECONDS, Told

log = logging.getLogger(__name__)

Value = TypeVar("Value")
AGAIN_SECONDS = (0.0, 0.1, 0.2, 0.5, *[1.0] * 30)  # before a question is asked, and again: Ray learns who has gone
DIED = (EngineDied, RayActorError)
GONE = (*DIED, TaskCancelledError, RayServeException)
DEATHS = 3  # of replicas, all while they had one request: it is not asked of the next
POLL_SECONDS = 1.0  # between signs of life
SOON_SECONDS = 5.0  # within which a replica that does not hang says how it is


class RayModels:
    """As ``Models``, by handles, which ``attach`` gives.

    Attributes:
        ready: Whether a replica of each deployment has answered lately; Ray shows none that is not warm.
        failure: What Ray says of a deployment that could not start.
        dead: Never set: Ray replaces a replica whose engine has died.
        stalled: Never set: it replaces one that hangs, too.
    """

    dead: str | None = None
    stalled = False

    def __init__(self) -> None:
        self._halves: tuple[DeploymentHandle, ...] = ()
        self.failure: str | None = None
        self.ready = self._was_ready = False
        self._heard: dict[str, float] = {}  # when each deployment answered last
        self._ids = itertools.count()
        self._waiting: set[asyncio.Timeout] = set()
        self._task: asyncio.Task[None] | None = None

    def attach(self, encoder: DeploymentHandle, generator: DeploymentHandle) -> None:
        """Ask these: the deployment that encodes, and that which generates and scores."""
        self._halves = self._encoder, self._generator = encoder, generator

    async def start(self) -> None:
        """Look again and again whether replicas are there, from now on."""
        self._task = asyncio.create_task(self._keep_looking())

    async def stop(self) -> None:
        """Look no more; whoever still waits gets an error. The replicas are not this process's."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for waiting in self._waiting:
            waiting.reschedule(0.0)

    async def encode(
        self, bridge: Bridge, sources: Sequence[SourceTokens], on_cost: Callable[[int], None]
    ) -> list[Encoded]:
        """As ``Models.encode``."""
        question = Encode(next(self._ids), bridge.name, sources)
        return await self._ask(self._encoder, question, bridge, Told(None), list[Encoded], on_cost)

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
        told = Told(on_piece)
        return shifted(await self._ask(self._generator, question, bridge, told, GenerationResult, on_cost), told.began)

    async def score(
        self, bridge: Bridge, receiver: str, items: Sequence[ScoreItem], on_cost: Callable[[int], None]
    ) -> list[list[Continuation]]:
        """As ``Models.score``."""
        question = Score(next(self._ids), bridge.name, receiver, items)
        return await self._ask(self._generator, question, bridge, Told(None), list[list[Continuation]], on_cost)

    async def in_memory(self) -> InMemory:
        """As ``Models.in_memory``, in one replica of each deployment; nothing is, while there is none."""
        parts = await asyncio.gather(*map(self._look, self._halves))
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
        """As ``Models.metrics``: of the replicas of each deployment, where they all answer soon."""
        halves = self._halves if self.ready else ()
        told = [
            half.broadcast("metrics").results_async(timeout_s=SOON_SECONDS, return_exceptions=True) for half in halves
        ]
        answers = await asyncio.gather(*told, return_exceptions=True)
        replies = [reply for answer in answers for reply in (answer if isinstance(answer, list) else [answer])]
        for error in replies:
            if isinstance(error, Exception):
                log.warning("a replica's metrics cannot be had: %s", first_line(error))
        return merged(self.ready, dict(reply for reply in replies if isinstance(reply, tuple)))

    async def _ask(
        self, half: DeploymentHandle, question: Any, bridge: Bridge, told: Told, type_: type[Value],
        on_cost: Callable[[int], None],
    ) -> Value:  # fmt: skip
        """Ask about a bridge, until an answer comes or the service stops.

        Raises:
            NotReady: None could answer, or another one says something else than the caller has seen already.
            InferenceFailed: It ends replicas, or they have failed in an unknown way.
        """
        self._check_there()
        try:
            async with asyncio.timeout(None) as waiting:
                self._waiting.add(waiting)
                reply = await self._answer(half, question, identity(bridge), told)
        except TimeoutError:
            raise NotReady("the service is stopping") from None
        finally:
            self._waiting.discard(waiting)
        return _value(reply, type_, on_cost)

    async def _answer(self, half: DeploymentHandle, question: Any, of: str, told: Told) -> Answer | Failure:
        """Ask, and again where a replica goes."""
        name, data, deaths = half.deployment_name, encoded(question), 0
        for pause in AGAIN_SECONDS:
            await asyncio.sleep(pause)
            told.begin()
            try:
                async with aclosing(_replies(half, data, of, getattr(question, "stream", False))) as replies:
                    async for reply in replies:
                        self._heard[name] = time.monotonic()
                        if isinstance(reply, Said):
                            told.take(reply.piece)
                        elif isinstance(reply, Answer | Failure):
                            return reply
                log.warning("a replica of %s ended its answer early", name)
            except (RayError, RayServeException) as error:
                cause = _why(error)
                deaths += isinstance(cause, DIED)
                if deaths == DEATHS:
                    raise InferenceFailed(f"{deaths} replicas ended while they answered this") from None
                what = type(question).__name__
                log.warning("a replica of %s has gone: %s; %s is asked again", name, first_line(cause), what)
        raise NotReady("no replica could answer", retry_after_seconds=RETRY_SECONDS)

    def _check_there(self) -> None:
        """What starts, or cannot, takes no questions yet: who waits for it would wait in vain (NotReady)."""
        if self.failure is not None or not self._was_ready:
            raise NotReady(self.failure or "the models are still loading", retry_after_seconds=RETRY_SECONDS)

    async def _tell(self, question: Manage, bridge: Bridge, type_: type[Value]) -> list[Value]:
        """Ask every replica of both deployments."""
        self._check_there()
        answers: list[Value] = []
        for half in self._halves:
            told = half.broadcast("ask", encoded(question), identity(bridge))
            try:
                replies = await told.results_async()
            except (RayError, RayServeException) as error:
                gone = f"a replica has gone: {first_line(_why(error))}"
                raise NotReady(gone, retry_after_seconds=RETRY_SECONDS) from None
            answers += [_value(reply, type_) for data in replies for reply in unframed(data)]
        return answers

    async def _look(self, half: DeploymentHandle) -> InMemory | None:
        """What a replica of a deployment has in memory; None where none answers."""
        with suppress(LatentWireError, TimeoutError):
            async with asyncio.timeout(SOON_SECONDS):
                question = Manage(next(self._ids), "in_memory")
                return _value(await self._answer(half, question, "", Told(None)), InMemory)
        return None

    async def _is_there(self, half: DeploymentHandle) -> bool:
        """Whether a replica answers; those that are busy answered others lately."""
        found = await self._look(half)
        heard = self._heard.get(half.deployment_name)
        return found is not None or (heard is not None and time.monotonic() - heard < SOON_SECONDS)

    async def _keep_looking(self) -> None:
        names = {half.app_name for half in self._halves}
        while True:
            try:
                self.ready = all(await asyncio.gather(*map(self._is_there, self._halves)))
                self._was_ready |= self.ready
                self.failure = None if self.ready else await asyncio.to_thread(_failure, names)
            except Exception:  # Ray is on its way up, or down
                log.exception("Ray says nothing of the replicas")
                self.ready = False
            await asyncio.sleep(POLL_SECONDS)


async def _replies(half: DeploymentHandle, data: bytes, of: str, stream: bool) -> AsyncGenerator[Reply, None]:
    """What a replica replies; closed before its end, the replica stops."""
    asked = half.options(stream=True).stream.remote(data, of) if stream else half.ask.remote(data, of)
    is_over = False
    try:
        async for frames in asked if stream else _alone(asked):
            for reply in unframed(frames):
                is_over = isinstance(reply, Answer | Failure)
                yield reply
    finally:
        if not is_over:
            asked.cancel()


async def _alone(answer: Awaitable[bytes]) -> AsyncIterator[bytes]:
    yield await answer


def _why(error: Exception) -> Exception:
    """Why a replica has gone (InferenceFailed where it has not: the error is then in what it runs)."""
    cause: Exception = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(error, RayTaskError) and not isinstance(cause, GONE):
        log.error("a replica failed", exc_info=error)
        raise InferenceFailed.of(cause) from None
    return cause


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
