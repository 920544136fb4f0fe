"""The simulation of replicas, on cases whose answer is known."""

import statistics

import numpy as np
import pytest

from benchmarks.capacity import Answer, Steps, fitted, poisson, simulate


def test_one_request_alone_takes_its_steps_and_what_is_outside_them() -> None:
    found = simulate(Steps(0.01, 0.002, fixed_seconds=0.5), 1, [(3.0, 4)])
    assert found.seconds == pytest.approx([0.5 + 4 * 0.012])


def test_requests_at_a_fixed_pace_wait_only_where_that_is_faster_than_they_are_answered() -> None:
    steps = Steps(0.1, rows=1)
    assert simulate(steps, 1, [(0.1 * n, 1) for n in range(50)]).seconds == pytest.approx([0.1] * 50)
    assert simulate(steps, 1, [(0.05 * n, 1) for n in range(20)]).seconds == pytest.approx(
        [0.1 + 0.05 * n for n in range(20)]
    )


def test_requests_of_one_step_that_arrive_at_random_wait_as_long_as_pollaczek_and_khinchine_say() -> None:
    seconds, load = 0.1, 0.8
    found = simulate(Steps(seconds, rows=1, queue=10**6), 1, [(at, 1) for at in poisson(load / seconds, 2000)])
    assert statistics.mean(found.seconds) == pytest.approx(seconds + load * seconds / (2 * (1 - load)), rel=0.05)


@pytest.mark.parametrize("replicas", [1, 2])
def test_where_nobody_may_wait_as_many_are_refused_as_erlang_says(replicas: int) -> None:
    load = 1.2  # arrivals while one is answered
    found = simulate(Steps(0.1, rows=1, queue=1), replicas, [(at, 1) for at in poisson(load / 0.1, 500)])
    terms = [1, load, load**2 / 2][: replicas + 1]
    assert found.figures()["refused_share"] == pytest.approx(terms[-1] / sum(terms), rel=0.05)


def test_a_full_batch_gives_a_token_to_each_row_in_a_step() -> None:
    steps = Steps(0.01, 0.001, rows=8, queue=1000)
    found = simulate(steps, 2, [(0.0, 5)] * 160)
    ten_batches = 10 * 5 * (0.01 + 8 * 0.001)  # at each of two; the first begins with a single row
    assert max(found.seconds) == pytest.approx(ten_batches, rel=0.02)
    assert steps.capacity_per_second(5) == pytest.approx(80 / ten_batches)


def test_the_three_numbers_of_a_replica_are_found_in_its_answers() -> None:
    rng = np.random.default_rng(0)
    answers = [
        Answer(0, 0.02 + tokens * (0.004 + 0.001 * callers) + rng.normal(0, 0.001), tokens, callers)
        for callers in (1, 4, 16)
        for tokens in (8, 16, 64) * 20
    ]
    found = fitted(answers)
    assert (found.fixed_seconds, found.base_seconds, found.row_seconds) == pytest.approx((0.02, 0.004, 0.001), rel=0.05)
