"""Which requests a step takes: the library's order, and what is counted of it."""

from typing import Any

from transformers.generation.continuous_batching.requests import RequestState, RequestStatus
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler


class Scheduler(FIFOScheduler):
    """The library's; but a request that is cancelled makes room for others, as one that finishes does.

    After it has taken requests out of a full cache, the library lets none in until one finishes; all may be cancelled.
    And where a step is still under way for one, the library would look for its blocks when it reads the token.

    Attributes:
        step_tokens: Of the step that is being made.
        preemptions: Requests taken out of a full cache so far; they are read again.
    """

    NAME = "latentwire"
    step_tokens = 0
    preemptions = 0

    def add_waiting_request(self, state: RequestState) -> None:
        self.preemptions += bool(state._true_initial_tokens)  # only one that was taken out of the cache has any
        super().add_waiting_request(state)

    def schedule_batch(self, token_budget: int, cache_budget: int) -> Any:
        scheduled = super().schedule_batch(token_budget, cache_budget)
        self.step_tokens = scheduled[2]
        return scheduled

    def clear_cancelled_requests(self) -> list[RequestState]:
        cancelled = super().clear_cancelled_requests()
        if cancelled:
            self.block_new_requests = False
        for state in cancelled:
            state.status = RequestStatus.FINISHED
        return cancelled


SCHEDULER_MAPPING[Scheduler.NAME] = Scheduler
