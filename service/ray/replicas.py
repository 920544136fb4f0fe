"""What runs in each replica of a deployment: half of the models, which answer the questions of ``processes.frames``.

A question comes as bytes and is answered with bytes: Ray carries them, and nothing of ours is pickled. Latents are in
them as between the two processes of one service.
"""

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

from ray import serve

from latentwire.bridge.bridge import Bridge
from latentwire.bridge.devices import use_threads
from latentwire.bridge.errors import IncompatibleBridge, InferenceFailed
from latentwire.bridge.families import Role
from latentwire.bridge.generation.base import Times
from latentwire.service.api.collector import register
from latentwire.service.inference.request import GenerationResult
from latentwire.service.inference.runtime import Runtime
from latentwire.service.processes.answering import Answering
from latentwire.service.processes.frames import (
    QUESTIONS,
    Answer,
    Cancel,
    Evaluate,
    Failure,
    Generate,
    Question,
    Reply,
    Restart,
    framed,
    packed,
    unpack,
)
from latentwire.service.settings import Settings

TELLING_SECONDS = 0.5  # for which a replica whose engine has died tells those who wait


class EngineDied(Exception):
    """The replica ends: what was asked of it is to be asked of another."""


def identity(bridge: Bridge) -> str:
    """Of a bridge's weights (32 hex digits): bridges of one id may have other heads."""
    manifest = bridge.manifest
    parts = [manifest.bridge_id, *(f"{name}={head.sha256}" for name, head in sorted(manifest.heads.items()))]
    return hashlib.sha256("/".join(parts).encode()).hexdigest()[:32]


def shifted(result: GenerationResult, seconds: float) -> GenerationResult:
    """A result with later times: nodes have clocks of their own, so what crosses counts from the question."""
    times = [None if at is None else Times(*(moment + seconds for moment in at)) for at in result.times]
    return replace(result, times=times)


class Replica:
    """Half of the models of a service. Once made it has answered: Ray sends it requests from then on.

    Raises:
        RuntimeError: Warming up failed; Ray tries again, and then says so in the application's status.
    """

    role: Role

    async def __init__(self, bridges: Mapping[str, str], settings: Mapping[str, Any]) -> None:  # type: ignore[misc]
        """Of bridges {name: checkpoint}; Ray awaits this."""
        made = Settings(**settings)
        use_threads(made.threads)
        self._runtime = Runtime(made, bridges, roles=(self.role,))
        loop = asyncio.get_running_loop()
        self._identities = {name: identity(bridge) for name, bridge in self._runtime.bridges.items()}

        def end() -> None:
            """From an engine's thread."""
            loop.call_soon_threadsafe(loop.call_later, TELLING_SECONDS, os._exit, 1)

        self._runtime.on_death = end
        register(self._runtime, None)
        await self._runtime.start()
        await self._runtime.warmed()
        if self._runtime.models.failure is not None:
            raise RuntimeError(self._runtime.models.failure)

    async def ask(self, question: bytes, of: str) -> bytes:
        """The answer to a question about the bridge of that ``identity`` (or about none), or why there is none.

        Raises:
            EngineDied: Another replica can answer.
        """
        async for reply, is_last in self._replies(question, of):
            if is_last:
                return reply
        raise AssertionError("every question is answered")

    async def stream(self, question: bytes, of: str) -> AsyncIterator[bytes]:
        """As ``ask``, after the pieces of text as they are said; those that came together are sent together."""
        async for reply, _ in self._replies(question, of):
            yield reply

    async def metrics(self) -> tuple[str, str]:
        """Which replica this is, and what it counts in Prometheus's text format."""
        context = serve.get_replica_context()
        text = await self._runtime.models.metrics()
        return f"{context.deployment}-{context.replica_tag}", text.decode()

    def check_health(self) -> None:
        """Ray replaces a replica for which this raises."""
        self._check_alive()
        if self._runtime.models.stalled:
            raise RuntimeError("there is work, and no step was made")

    def _check_alive(self) -> None:
        """Before any request of an engine fails with it, the engine says that it has died."""
        if any(isinstance(engine.failure, InferenceFailed) for engine in self._runtime.local.engines.all()):
            raise EngineDied("the generation engine died")

    async def _replies(self, data: bytes, of: str) -> AsyncIterator[tuple[bytes, bool]]:
        """Replies that came together, and whether the last is among them."""
        self._check_alive()
        waiting: asyncio.Queue[tuple[bytes, Reply]] = asyncio.Queue()
        question, taken = QUESTIONS.decode(data), time.monotonic()

        def put(reply: Reply) -> None:
            if isinstance(reply, Answer) and isinstance(question, Generate):
                reply.result = packed(shifted(unpack(reply.result, GenerationResult), -taken))
            waiting.put_nowait((framed(reply), reply))

        answering = Answering(self._runtime, None, put, lambda: None)
        if (refusal := self._refused(question, of)) is not None:
            put(refusal)
        else:
            answering.take(question)
        try:
            is_last = False
            while not is_last:
                replies = [await waiting.get()]
                while not waiting.empty():
                    replies.append(waiting.get_nowait())
                last = replies[-1][1]
                is_last = isinstance(last, Answer | Failure)
                if isinstance(last, Failure):
                    self._check_alive()
                yield b"".join(frame for frame, _ in replies), is_last
        finally:
            await answering.close()

    def _refused(self, question: Question, of: str) -> Failure | None:
        """A replica that starts again after its checkpoint was replaced has the new one, and others the old."""
        assert not isinstance(question, Evaluate | Cancel | Restart), question
        mine = self._identities.get(question.bridge, "nothing") if question.bridge else of
        if mine == of:
            return None
        error = IncompatibleBridge(
            f"bridge {question.bridge!r} is {of} here and {mine} in a replica: it was replaced; deploy again"
        )
        return Failure.of(question.id, error, None)


class Encoder(Replica):
    """Senders, and the encoders of bridges."""

    role = "sender"


class Generator(Replica):
    """Receivers, and the heads of bridges."""

    role = "receiver"
