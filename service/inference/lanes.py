"""Where texts are tokenised: off the event loop, unless they are so short that a thread would take longer to wake."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

LONG_CHARACTERS = 10_000  # one to eight milliseconds of a core
BRIEF_CHARACTERS = 500  # a fifth of a millisecond; two turns of a thread beside a busy one cost more


class Lanes:
    """Two threads, one of them for long texts alone: what is short never waits for them."""

    def __init__(self) -> None:
        self._short = ThreadPoolExecutor(1, thread_name_prefix="short-texts")
        self._long = ThreadPoolExecutor(1, thread_name_prefix="long-texts")

    async def each(
        self, work: Callable[[Item], Result], items: Sequence[Item], characters: Callable[[Item], int]
    ) -> list[Result]:
        """Call ``work`` with each of a request's items, in order; the time it takes grows with their ``characters``.

        Many short texts take as long as a long one: they are worked on one by one, and other requests come between.
        """
        loop, length = asyncio.get_running_loop(), sum(map(characters, items))
        if length <= BRIEF_CHARACTERS:
            return [work(item) for item in items]
        if length <= LONG_CHARACTERS:
            return await loop.run_in_executor(self._short, lambda: [work(item) for item in items])
        lanes = (self._long if characters(item) > LONG_CHARACTERS else self._short for item in items)
        return [await loop.run_in_executor(lane, partial(work, item)) for lane, item in zip(lanes, items, strict=True)]

    def close(self) -> None:
        """End both threads, once their work is done."""
        for lane in (self._short, self._long):
            lane.shutdown()
