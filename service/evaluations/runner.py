"""An evaluation among requests: in small passes, each of which waits until nobody is being answered."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from latentwire.bridge.bridge import Bridge
from latentwire.bridge.errors import InsufficientMemory
from latentwire.bridge.evaluation.context import Lender
from latentwire.bridge.evaluation.evaluate import context_of
from latentwire.bridge.evaluation.measure import Progress, measure
from latentwire.bridge.evaluation.tasks import Task
from latentwire.bridge.models import FrozenLM
from latentwire.bridge.reader import Reader
from latentwire.service.inference.runtime import Runtime

BATCH_ROWS = 4  # one pass delays a request that comes meanwhile
YIELD_SECONDS = 2.0  # longest that one pass waits for requests: under steady load an evaluation should still end
POLL_SECONDS = 0.005
MEMORY_SECONDS = 300.0  # for which room for a model is tried for, since hours of work may depend on it


class PoliteLender(Lender):
    """Lends a service's models for one pass each, and lets requests go first.

    Args:
        runtime: Of the service.
        check: Raises when the evaluation should go no further; called before every pass, and while one waits.
        bridge: That is measured; each model lent is checked to be the one it was trained with.
    """

    batch_rows = BATCH_ROWS

    def __init__(self, runtime: Runtime, check: Callable[[], None], bridge: Bridge) -> None:
        self._runtime, self._check, self._bridge = runtime, check, bridge

    @contextmanager
    def lend(self, reader: Reader) -> Iterator[FrozenLM]:
        """A model for one pass, loaded where it is not in memory.

        Raises:
            InsufficientMemory: Models in use left no room for it for very long.
            ModelUnavailable: It cannot be read any more.
            IncompatibleBridge: It is not the one that the bridge was trained with any more.
        """
        asked = time.perf_counter()
        self._let_requests_go_first()
        lm = self._acquire(reader.name)
        try:
            self._bridge.check(lm)
            self.waited_seconds += time.perf_counter() - asked
            yield lm
        finally:
            self._bridge.home(reader.name).release(reader.name)

    def _let_requests_go_first(self) -> None:
        until = time.monotonic() + YIELD_SECONDS
        self._check()
        while self._runtime.admission.admitted and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
            self._check()

    def _acquire(self, name: str) -> FrozenLM:
        until = time.monotonic() + MEMORY_SECONDS
        while True:
            try:
                return self._bridge.home(name).acquire(name, self._runtime.settings.load_wait)
            except InsufficientMemory:
                self._check()
                if time.monotonic() > until:
                    raise
                time.sleep(POLL_SECONDS)


def run(
    runtime: Runtime,
    bridge: Bridge,
    receiver: str,
    task: Task,
    *,
    names: list[str],
    limit: int | None,
    check: Callable[[], None],
    progress: Progress,
    partial: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """The report of ``bridge.evaluation`` on a bridge that is being served; blocks, for as long as it takes.

    Raises:
        LatentWireError: The task does not suit the bridge, or a model cannot be lent.
    """
    context = context_of(bridge, task, PoliteLender(runtime, check, bridge), receiver, limit)
    return measure(context, conditions=names, progress=progress, partial=partial)
