"""What runs in each replica of a deployment: half of the models, which answer the questions of ``processes.frames``.

A question comes as bytes and is answered with bytes: Ray carries them, and nothing of ours is pickled. Latents are in
them as between the two processes of one service.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any

from latentwire.bridge.errors import IncompatibleBridge
from latentwire.bridge.families import Role
from latentwire.service.inference.runtime import Runtime
from latentwire.service.processes.answering import Answering
from latentwire.service.processes.frames import (
    QUESTIONS,
    Answer,
    Cancel,
    Evaluate,
    Failure,
    Question,
    Reply,
    Restart,
    framed,
)
from latentwire.service.settings import Settings

log = logging.getLogger(__name__)


class Replica:
    """Half of the models of a service. Once made it has answered: Ray sends it requests from then on.

    Raises:
        RuntimeError: Warming up failed; Ray tries again, and then says so in the application's status.
    """

    role: Role

    async def __init__(self, bridges: Mapping[str, str], settings: Mapping[str, Any]) -> None:  # type: ignore[misc]
        """Of bridges {name: checkpoint}; Ray awaits this."""
        self._runtime = Runtime(Settings(**settings), bridges, roles=(self.role,))
        await self._runtime.start()
        await self._runtime.warmed()
        if self._runtime.models.failure is not None:
            raise RuntimeError(self._runtime.models.failure)

    async def ask(self, question: bytes, bridge_id: str) -> bytes:
        """The answer to a question about the bridge of that id (or about none), or why there is none."""
        async for reply, is_last in self._replies(question, bridge_id):
            if is_last:
                return reply
        raise AssertionError("every question is answered")

    async def stream(self, question: bytes, bridge_id: str) -> AsyncIterator[bytes]:
        """As ``ask``, after the pieces of text as they are said; those that came together are sent together."""
        async for reply, _ in self._replies(question, bridge_id):
            yield reply

    def check_health(self) -> None:
        """Ray replaces a replica for which this raises."""
        if self._runtime.models.dead is not None:
            raise RuntimeError(self._runtime.models.dead)
        if self._runtime.models.stalled:
            raise RuntimeError("there is work, and no step was made")

    async def _replies(self, data: bytes, bridge_id: str) -> AsyncIterator[tuple[bytes, bool]]:
        """Replies that came together, and whether the last is among them."""
        waiting: asyncio.Queue[tuple[bytes, bool]] = asyncio.Queue()
        question = QUESTIONS.decode(data)

        def put(reply: Reply) -> None:
            waiting.put_nowait((framed(reply), isinstance(reply, Answer | Failure)))

        answering = Answering(self._runtime, None, put, lambda: None)
        if (refusal := self._refused(question, bridge_id)) is not None:
            put(refusal)
        else:
            answering.take(question)
        try:
            is_last = False
            while not is_last:
                replies = [await waiting.get()]
                while not waiting.empty():
                    replies.append(waiting.get_nowait())
                is_last = replies[-1][1]
                yield b"".join(reply for reply, _ in replies), is_last
        finally:
            await answering.close()

    def _refused(self, question: Question, bridge_id: str) -> Failure | None:
        """A replica that starts again after its checkpoint was replaced has the new one, and others the old."""
        assert not isinstance(question, Evaluate | Cancel | Restart), question
        mine = self._runtime.bridge_ids.get(question.bridge, "nothing") if question.bridge else bridge_id
        if mine == bridge_id:
            return None
        error = IncompatibleBridge(
            f"bridge {question.bridge!r} is {bridge_id} here and {mine} in a replica: it was replaced; deploy again"
        )
        return Failure.of(question.id, error, None)


class Encoder(Replica):
    """Senders, and the encoders of bridges."""

    role = "sender"


class Generator(Replica):
    """Receivers, and the heads of bridges."""

    role = "receiver"
