"""Which requests a step takes: the library's order, and what is counted of it."""

import time
from collections import deque
from typing import Any, NamedTuple

from transformers.generation.continuous_batching.requests import RequestState, RequestStatus
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler


class Made(NamedTuple):
    """Steps whose tokens have come: what they read, and the seconds that they took."""

    tokens: int
    seconds: float


class _Step(NamedTuple):
    tokens: int
    speaks: bool
    started: float


class Scheduler(FIFOScheduler):
    """The library's; but a request that is cancelled makes room for others, as one that finishes does.

    After it has taken requests out of a full cache, the library lets none in until one finishes; all may be cancelled.
    And where a step is still under way for one, the library would look for its blocks when it reads the token.

    Attributes:
        preemptions: Requests taken out of a full cache so far; they are read again.
    """

    NAME = "latentwire"
    preemptions = 0

    def __init__(self, *library: Any, **options: Any) -> None:
        super().__init__(*library, **options)
        self._steps, self._delivered = deque[_Step](), time.monotonic()

    def made(self, under_way: int) -> Made:
        """The step whose tokens are being delivered, with those before it that only read parts of prompts.

        Of later ones at most so many are under way: what is older was for requests that nobody waits for any more.
        """
        tokens, started, speaks = 0, time.monotonic(), False
        while self._steps and (not speaks or len(self._steps) > under_way):
            step = self._steps.popleft()
            tokens, started, speaks = tokens + step.tokens, min(started, step.started), speaks or step.speaks
        since, self._delivered = max(started, self._delivered), time.monotonic()
        return Made(tokens, self._delivered - since)

    def add_waiting_request(self, state: RequestState) -> None:
        self.preemptions += bool(state._true_initial_tokens)  # only one that was taken out of the cache has any
        super().add_waiting_request(state)

    def schedule_batch(self, token_budget: int, cache_budget: int) -> Any:
        started = time.monotonic()
        scheduled = super().schedule_batch(token_budget, cache_budget)
        if requests := scheduled[0]:
            self._steps.append(_Step(scheduled[2], any(one.has_new_token for one in requests), started))
        return scheduled

    def clear_cancelled_requests(self) -> list[RequestState]:
        cancelled = super().clear_cancelled_requests()
        if cancelled:
            self.block_new_requests = False
        for state in cancelled:
            state.status = RequestStatus.FINISHED
        return cancelled


SCHEDULER_MAPPING[Scheduler.NAME] = Scheduler
