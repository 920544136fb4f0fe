"""Models that run in another process, as the HTTP process sees them.

When that process ends, every request under way ends with ``NotReady``, and so does every new one until the next
process of the models has taken its place.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from latentwire.bridge.bridge import Bridge
from latentwire.bridge.engine import Encoded
from latentwire.bridge.errors import NotReady
from latentwire.bridge.reader import SourceTokens
from latentwire.bridge.scoring import Continuation
from latentwire.service.inference.models import InMemory
from latentwire.service.inference.request import Asked, GenerationResult, Piece
from latentwire.service.inference.scoring import ScoreItem
from latentwire.service.processes.door import Door
from latentwire.service.processes.frames import (
    REPLIES,
    Answer,
    Cancel,
    Encode,
    Evaluate,
    Failure,
    Generate,
    Health,
    Manage,
    Outbox,
    Reply,
    Restart,
    Said,
    Score,
    messages,
    unpack,
)
from latentwire.service.schemas.evaluations import RECORDS, EvaluationRequest, Record

log = logging.getLogger(__name__)

Value = TypeVar("Value")
AGAIN_SECONDS = 0.1  # between tries to reach the process of the models
RETRY_SECONDS = 5.0  # what a caller is told to wait for a process that starts
COST_SECONDS = 1.0  # for which a request that nobody waits for waits for what it has cost
SOON_SECONDS = 5.0  # within which models that do not hang say how they are
ENDED = "the process that holds the models ended before the answer; another is started"
AWAY = "the process that holds the models is being started"


@dataclass(eq=False)
class _Call:
    """A question that waits for its answer."""

    answer: "asyncio.Future[Answer | Failure]"
    on_piece: Callable[[Piece], None] | None = None


@dataclass(eq=False)
class _Connection:
    """To one process of the models: what was asked of it and is not answered yet."""

    outbox: Outbox
    calls: dict[int, _Call] = field(default_factory=dict)
    health: Health | None = None
    is_other: bool = False


class RemoteModels:
    """As ``Models``, behind a door.

    Args:
        door: Of the Unix socket at which ``processes.answering`` listens.
        stall_timeout: Seconds without a sign of the process after which it counts as stalled.
    """

    def __init__(self, door: Door, stall_timeout: float) -> None:
        self._door, self._stall_timeout = door, stall_timeout
        self._bridges: Mapping[str, str] = {}
        self._on_replaced: Callable[[], None] = lambda: None
        self._has_asked = False
        self._connection: _Connection | None = None
        self._task: asyncio.Task[None] | None = None
        self._ids = itertools.count()
        self._heard = time.monotonic()

    @property
    def ready(self) -> bool:
        """As of ``Models``."""
        return bool(self._health and self._health.ready)

    @property
    def failure(self) -> str | None:
        """As of ``Models``."""
        return None if self._health is None else self._health.failure

    @property
    def dead(self) -> str | None:
        """As of ``Models``."""
        return None if self._health is None else self._health.dead

    @property
    def stalled(self) -> bool:
        """As of ``Models``; also where nothing has been heard of the process for as long."""
        return time.monotonic() - self._heard > self._stall_timeout or bool(self._health and self._health.stalled)

    def expect(self, bridges: Mapping[str, str], on_replaced: Callable[[], None]) -> None:
        """Ask only a process with the same bridges, by name and id.

        A checkpoint that was replaced is noticed when one of these processes starts again: the others still have the
        old one, whose latents the new would answer. The older process is ended, for its parent to start another:
        that of the models, where this one has never asked any, else this one, by ``on_replaced``.
        """
        self._bridges, self._on_replaced = bridges, on_replaced

    async def start(self) -> None:
        """Keep a connection, from now on."""
        self._heard = time.monotonic()
        self._task = asyncio.create_task(self._keep_connected())

    async def stop(self) -> None:
        """Let the connection go; whoever still waits gets an error."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def encode(
        self, bridge: Bridge, sources: Sequence[SourceTokens], on_cost: Callable[[int], None]
    ) -> list[Encoded]:
        """As ``Models.encode``."""
        return await self._ask(Encode(next(self._ids), bridge.name, sources), list[Encoded], on_cost)

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
        return await self._ask(question, GenerationResult, on_cost, on_piece)

    async def score(
        self, bridge: Bridge, receiver: str, items: Sequence[ScoreItem], on_cost: Callable[[int], None]
    ) -> list[list[Continuation]]:
        """As ``Models.score``."""
        question = Score(next(self._ids), bridge.name, receiver, items)
        return await self._ask(question, list[list[Continuation]], on_cost)

    async def in_memory(self) -> InMemory:
        """As ``Models.in_memory``; nothing is, while the process is away."""
        try:
            async with asyncio.timeout(SOON_SECONDS):
                return await self._ask(Manage(next(self._ids), "in_memory"), InMemory)
        except (NotReady, TimeoutError):
            return InMemory({}, {}, [])

    async def load(self, bridge: Bridge) -> None:
        """As ``Models.load``."""
        await self._ask(Manage(next(self._ids), "load", bridge.name), type(None))

    async def unload(self, bridge: Bridge) -> int:
        """As ``Models.unload``."""
        return await self._ask(Manage(next(self._ids), "unload", bridge.name), int)

    async def pin(self, bridge: Bridge, stay: bool) -> None:
        """As ``Models.pin``."""
        await self._ask(Manage(next(self._ids), "pin" if stay else "unpin", bridge.name), type(None))

    async def metrics(self) -> bytes:
        """As ``Models.metrics``; of a process that is away, that it is not ready."""
        try:
            async with asyncio.timeout(SOON_SECONDS):
                return await self._ask(Manage(next(self._ids), "metrics"), bytes)
        except (NotReady, TimeoutError):
            return b"# HELP latentwire_ready 1 once warmed up.\n# TYPE latentwire_ready gauge\nlatentwire_ready 0.0\n"

    async def evaluation(self, name: Any, tenant: str, body: str = "", key: str | None = None) -> str:
        """Call ``Jobs`` there; JSON of a record, or of several."""
        return await self._ask(Evaluate(next(self._ids), name, tenant, body, key), str)

    @property
    def _health(self) -> Health | None:
        return None if self._connection is None else self._connection.health

    async def _ask(
        self,
        question: Any,
        type_: type[Value],
        on_cost: Callable[[int], None] = lambda cost: None,
        on_piece: Callable[[Piece], None] | None = None,
    ) -> Value:
        """Ask, and wait for the answer; cancelled, only for what it has cost so far."""
        connection = self._connection
        if connection is None or connection.health is None:
            raise NotReady(AWAY, retry_after_seconds=RETRY_SECONDS)
        connection.outbox.put(question)
        call = connection.calls[question.id] = _Call(asyncio.get_running_loop().create_future(), on_piece)
        try:
            await asyncio.shield(call.answer)
        except asyncio.CancelledError:
            call.on_piece = None
            connection.outbox.put(Cancel(question.id))
            with suppress(asyncio.CancelledError):
                await asyncio.wait([call.answer], timeout=COST_SECONDS)
            raise
        finally:
            connection.calls.pop(question.id, None)
            if call.answer.done() and (cost := call.answer.result().cost) is not None:
                on_cost(cost)
        answer = call.answer.result()
        if isinstance(answer, Failure):
            raise answer.error()
        return unpack(answer.result, type_)

    async def _keep_connected(self) -> None:
        while True:
            try:
                reader, writer = await self._door.enter()
            except OSError:
                await asyncio.sleep(AGAIN_SECONDS)
                continue
            self._connection = connection = _Connection(Outbox(writer))
            try:
                async for reply in messages(reader, REPLIES):
                    self._heard = time.monotonic()
                    self._take(connection, reply)
            except Exception:  # of an odd message: the next connection is a new start
                log.exception("the process of the models cannot be understood")
            finally:
                self._connection = None
                for id, call in connection.calls.items():
                    call.answer.set_result(Failure.of(id, NotReady(ENDED, retry_after_seconds=RETRY_SECONDS), None))
                connection.calls.clear()
                writer.close()
            await asyncio.sleep(AGAIN_SECONDS)

    def _take(self, connection: _Connection, reply: Reply) -> None:
        match reply:
            case Health(bridges=bridges) if bridges != self._bridges:
                if connection.is_other:
                    return  # said already
                connection.is_other = True
                log.error("a checkpoint was replaced: the process that still has the old one starts again")
                self._on_replaced() if self._has_asked else connection.outbox.put(Restart())
            case Health():
                connection.health, self._has_asked = reply, True
            case Said():
                call = connection.calls.get(reply.id)
                if call is not None and call.on_piece is not None:
                    call.on_piece(reply.piece)
            case Answer() | Failure():
                if (call := connection.calls.pop(reply.id, None)) is not None:
                    call.answer.set_result(reply)


class RemoteJobs:
    """As ``Jobs``, of the process that holds the models."""

    def __init__(self, models: RemoteModels) -> None:
        self._models = models

    async def create(self, tenant: str, body: EvaluationRequest, key: str | None = None) -> Record:
        """As ``Jobs.create``."""
        return Record.model_validate_json(await self._models.evaluation("create", tenant, body.model_dump_json(), key))

    async def find(self, tenant: str, job_id: str) -> Record:
        """As ``Jobs.find``."""
        return Record.model_validate_json(await self._models.evaluation("find", tenant, job_id))

    async def all(self, tenant: str) -> list[Record]:
        """As ``Jobs.all``."""
        return RECORDS.validate_json(await self._models.evaluation("all", tenant))

    async def cancel(self, tenant: str, job_id: str) -> Record:
        """As ``Jobs.cancel``."""
        return Record.model_validate_json(await self._models.evaluation("cancel", tenant, job_id))

    def start(self) -> None:
        """They run there."""

    async def stop(self) -> None:
        """They end there."""
