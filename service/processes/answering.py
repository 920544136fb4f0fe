"""The process that holds the models: it does what the HTTP process asks, over a Unix socket."""

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Coroutine
from contextlib import closing, suppress
from functools import partial
from typing import Any

import uvloop

from latentwire.bridge.errors import LatentWireError
from latentwire.service.api.collector import register
from latentwire.service.evaluations.jobs import Jobs
from latentwire.service.inference.runtime import Runtime
from latentwire.service.processes.door import is_known
from latentwire.service.processes.frames import (
    QUESTIONS,
    Answer,
    Cancel,
    Encode,
    Evaluate,
    Failure,
    Generate,
    Health,
    Manage,
    Outbox,
    Question,
    Reply,
    Restart,
    Said,
    Score,
    messages,
    packed,
)
from latentwire.service.processes.supervisor import REPLACED
from latentwire.service.schemas.evaluations import RECORDS, EvaluationRequest

log = logging.getLogger(__name__)

HEALTH_SECONDS = 0.25  # between signs of life; readiness is known this late
ENGINE_DIED = 1


class Answering:
    """Answers one HTTP process: each question is a task, which ends with that process.

    ``put`` takes the replies; it raises ValueError for one that cannot cross. Without ``jobs`` nothing is evaluated.
    """

    def __init__(
        self, runtime: Runtime, jobs: Jobs | None, put: Callable[[Reply], None], restart: Callable[[], None]
    ) -> None:
        self._runtime, self._jobs, self._put, self._restart = runtime, jobs, put, restart
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def take(self, question: Question) -> None:
        """Begin to answer, or to end."""
        if isinstance(question, Restart):
            self._restart()
        elif not isinstance(question, Cancel):
            task = self._tasks[question.id] = asyncio.create_task(self._answer(question))
            task.add_done_callback(lambda ended: self._end(question.id, ended))
        elif question.id in self._tasks:
            self._tasks[question.id].cancel()

    async def close(self) -> None:
        """Nobody waits any more."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _end(self, id: int, task: asyncio.Task[None]) -> None:
        del self._tasks[id]
        if task.cancelled():  # before its first step: it has said nothing
            self._put(Failure.of(id, asyncio.CancelledError(), None))

    async def _answer(self, question: Any) -> None:
        cost: list[int] = []
        rows, admission = _rows(question), self._runtime.admission
        admission.admitted += rows  # counted for evaluations, which wait; HTTP has admitted or refused already
        try:
            result = packed(await self._do(question, cost.append))
            self._put(Answer(question.id, result, sum(cost) if cost else None))
        except BaseException as error:
            if not isinstance(error, LatentWireError | asyncio.CancelledError):
                log.exception("a request failed")
            failure = Failure.of(question.id, error, sum(cost) if cost else None)
            try:
                self._put(failure)
            except ValueError:  # half a character in a path, say
                self._put(Failure(question.id, "InferenceFailed", "the model failed", cost=failure.cost))
        finally:
            admission.admitted -= rows

    def _do(self, question: Question, on_cost: Callable[[int], None]) -> Coroutine[Any, Any, Any]:
        models, find = self._runtime.models, self._runtime.find
        match question:
            case Encode(bridge=name, sources=sources):
                return models.encode(find(name), sources, on_cost)
            case Generate(id=id, bridge=name, receiver=receiver, asked=asked, stream=stream):
                show = (lambda piece: self._put(Said(id, piece))) if stream else None
                return models.generate(find(name), receiver, asked, show, on_cost)
            case Score(bridge=name, receiver=receiver, items=items):
                return models.score(find(name), receiver, items, on_cost)
            case Manage(name="in_memory"):
                return models.in_memory()
            case Manage(name="metrics"):
                return models.metrics()
            case Manage(name="load", bridge=name):
                return models.load(find(name))
            case Manage(name="unload", bridge=name):
                return models.unload(find(name))
            case Manage(name=name, bridge=of):
                return models.pin(find(of), name == "pin")
            case Evaluate():
                return self._evaluate(question)
        raise AssertionError(question)

    async def _evaluate(self, asked: Evaluate) -> str:
        jobs = self._jobs
        assert jobs is not None, "who asks knows where evaluations run"
        if asked.name == "all":
            return RECORDS.dump_json(await jobs.all(asked.tenant)).decode()
        if asked.name == "create":
            body = EvaluationRequest.model_validate_json(asked.body)
            return (await jobs.create(asked.tenant, body, asked.key)).model_dump_json()
        return (await (jobs.find if asked.name == "find" else jobs.cancel)(asked.tenant, asked.body)).model_dump_json()


def _rows(question: Question) -> int:
    """Rows that a model works on; while there are any, an evaluation waits."""
    match question:
        case Encode():
            return len(question.sources)
        case Generate():
            return len(question.asked)
        case Score():
            return len(question.items)
    return 0


def answer(runtime: Runtime, listener: socket.socket, secret: bytes, on_ready: Callable[[], None]) -> int:
    """Answer HTTP processes at a listening Unix socket until SIGTERM, or until an engine dies; the exit code.

    Who does not say the ``secret`` first is not heard. ``on_ready`` is called once every bridge has answered. SIGINT is
    left to the process that started this one.
    """
    return uvloop.run(_serve(runtime, listener, secret, on_ready))


async def _serve(runtime: Runtime, listener: socket.socket, secret: bytes, on_ready: Callable[[], None]) -> int:
    loop, ended, code = asyncio.get_running_loop(), asyncio.Event(), 0

    def end(with_code: int) -> None:
        """From an engine's thread: those who wait have been told already."""
        nonlocal code
        code = with_code
        loop.call_soon_threadsafe(ended.set)

    loop.add_signal_handler(signal.SIGTERM, ended.set)
    runtime.on_death = partial(end, ENGINE_DIED)
    models, jobs = runtime.models, Jobs(runtime)
    bridges = runtime.bridge_ids
    register(runtime, jobs)
    await runtime.start()
    jobs.start()
    connections: set[asyncio.Task[Any]] = set()

    async def say_health(outbox: Outbox) -> None:
        while True:
            outbox.put(Health(bridges, models.ready, models.failure, models.dead, models.stalled))
            if models.ready:
                on_ready()
            await asyncio.sleep(HEALTH_SECONDS)

    async def answer_one(reader: asyncio.StreamReader, outbox: Outbox) -> None:
        answering, saying = (
            Answering(runtime, jobs, outbox.put, partial(end, REPLACED)),
            asyncio.create_task(say_health(outbox)),
        )
        try:
            async for question in messages(reader, QUESTIONS):
                answering.take(question)
        finally:
            saying.cancel()
            await answering.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None, "asyncio calls this as a task"
        connections.add(task)
        task.add_done_callback(connections.discard)
        # Ended here where the service ends: asyncio would log that as an error.
        with closing(writer), suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            if await is_known(reader, secret):
                await answer_one(reader, Outbox(writer))

    server = await asyncio.start_unix_server(connected, sock=listener)
    await ended.wait()
    server.close()
    await jobs.stop()
    await runtime.stop()
    for task in connections:
        task.cancel()
    with suppress(asyncio.CancelledError):
        await asyncio.gather(*connections, return_exceptions=True)
    return code
