"""Admission control: the rows a service has accepted, and when there is room for more."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from latentwire.bridge.errors import Overloaded, TooLarge
from latentwire.service.inference.parts import Sum

REMEMBERED_SECONDS = 10.0  # of busy time over which the rate of answers is taken
RETRY_SECONDS = (1.0, 60.0)  # what a refused caller may be told to wait, at least and at most


@dataclass
class Admission:
    """Counts the rows of a service and refuses those over its limit; all batchers share one.

    Attributes:
        limit: Most rows admitted at once, by all processes that answer HTTP.
        waiting: Rows in a queue that somebody still waits for.
        running: Rows handed to the device.
        last_progress: ``time.monotonic()`` of the last batch finished or model loaded.
        out_of_memory: Batches that memory was too small for, so far, by what made them; each was halved, or was a
            single row.
        clock: Tells the time in seconds; tests bring their own.
        rows: Those admitted, by this process and by others.
    """

    limit: int
    waiting: int = 0
    running: int = 0
    last_progress: float = field(default_factory=time.monotonic)
    out_of_memory: Counter[str] = field(default_factory=Counter)
    clock: Callable[[], float] = time.monotonic
    rows: Sum = field(default_factory=Sum)
    _rate: "_Rate" = field(default_factory=lambda: _Rate())

    @property
    def admitted(self) -> int:
        """Rows of requests that this process has accepted and not answered yet."""
        return self.rows.own

    @admitted.setter
    def admitted(self, rows: int) -> None:
        self.rows.own = rows

    @contextmanager
    def admit(self, rows: int) -> Iterator[None]:
        """Keep a place for all rows of a request while it is answered, so that a refusal comes before any work.

        Raises:
            TooLarge: They could never be admitted.
            Overloaded: They do not fit beside what was admitted before; ``retry_after_seconds`` says when they may.
        """
        if rows > self.limit:
            raise TooLarge(f"the request makes {rows} rows; at most {self.limit} can wait", param="inputs")
        self.check_room(rows)
        if not self.admitted:
            self._rate.resume(self.clock())
        self.admitted += rows
        try:
            yield
            self._rate.note(rows, self.clock())
        finally:
            self.admitted -= rows

    def check_room(self, rows: int = 1) -> None:
        """Refuse rows that do not fit beside what was admitted before (Overloaded, with when they may)."""
        if self.rows.all + rows > self.limit:
            raise Overloaded(
                f"{self.rows.all} rows are being answered, {rows} more exceed {self.limit}",
                retry_after_seconds=self.retry_after(rows),
            )

    def retry_after(self, rows: int = 1) -> float:
        """Seconds until ``rows`` more rows will fit, at the rate at which rows were answered lately; 1 to 60.

        Before anything was answered: as long as the work has already taken. Of those that are missing this process
        answers its part, at its own rate; where it has none of them, as large a part as others, at its latest.
        """
        missing = max(self.rows.all + rows - self.limit, 1)
        part = missing * self.admitted / self.rows.all if self.admitted else missing / self.rows.processes
        low, high = RETRY_SECONDS
        return min(max(self._rate.seconds_for(part, self.clock() if self.admitted else None), low), high)

    def progress(self) -> None:
        """Note that work was done."""
        self.last_progress = time.monotonic()


@dataclass
class _Rate:
    """Rows answered and the busy seconds that took, both forgotten over ``REMEMBERED_SECONDS``.

    Idle time does not count: what a full queue drains at is what the device can do, not what it was asked for.
    """

    rows: float = 0.0
    seconds: float = 0.0
    since: float = 0.0

    def resume(self, now: float) -> None:
        """Work begins after an idle time."""
        self.since = now

    def note(self, rows: int, now: float) -> None:
        """So many more rows were answered."""
        elapsed = now - self.since
        kept = math.exp(-elapsed / REMEMBERED_SECONDS)
        self.rows, self.seconds, self.since = self.rows * kept + rows, self.seconds * kept + elapsed, now

    def seconds_for(self, rows: float, now: float | None) -> float:
        """How long ``rows`` rows will take; ``now`` is None while there are none here, and the time is idle."""
        busy = self.seconds + (0.0 if now is None else now - self.since)  # a device that hangs gets slower all the time
        return busy * rows / self.rows if self.rows else busy
