"""What is mended in the library's scheduler, and the races of an answer that is given up."""

from collections import deque
from threading import Lock
from types import SimpleNamespace
from typing import Any

import pytest
from transformers.generation.continuous_batching.requests import RequestState

from latentwire.bridge.generation.output import OutputTokens
from latentwire.bridge.generation.scheduler import Scheduler
from latentwire.bridge.models import load_reader
from latentwire.bridge.sampling import SamplingParams


@pytest.mark.parametrize(("cancelled", "blocked"), [({"a"}, False), (set(), True)])
def test_a_request_that_is_cancelled_lets_those_in_that_wait_for_a_full_cache(
    cancelled: set[str], blocked: bool
) -> None:
    freed: list[str] = []
    scheduler: Any = object.__new__(Scheduler)
    scheduler.__dict__ |= {
        "_cancellation_lock": Lock(), "_requests_to_cancel": cancelled,
        "active_requests": {"a": object.__new__(RequestState)},
        "waiting_requests": {}, "waiting_requests_order": deque(), "block_new_requests": True,
        "cache": SimpleNamespace(free_blocks=freed.append),
    }  # fmt: skip
    scheduler.clear_cancelled_requests()
    assert scheduler.block_new_requests is blocked
    assert freed == sorted(cancelled)


def test_a_token_for_an_answer_that_was_given_up_is_no_error() -> None:
    answer = OutputTokens(load_reader("builtin:llama"), SamplingParams(max_tokens=4))
    answer.cancel()
    assert answer.add(7)
    assert answer.ids == []
