"""What a caller may rely on from the batcher."""

import asyncio
import random
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from latentwire.bridge.errors import (
    InferenceFailed,
    InsufficientMemory,
    InvalidRequest,
    LatentWireError,
    NotReady,
    Overloaded,
    TooLarge,
)
from latentwire.service.inference.admission import Admission
from latentwire.service.inference.batching import Batcher
from latentwire.service.inference.parts import Sum

LONG = 10.0


class Doubler:
    """A fake model: doubles numbers, records batches, raises on a negative number, refuses 0.

    While ``gate`` is cleared a batch stays on the device; ``busy`` tells that one is there.
    """

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate, self.busy = asyncio.Event(), asyncio.Event()
        self.gate.set()

    async def __call__(self, items: Sequence[int]) -> list[int | LatentWireError]:
        self.batches.append(list(items))
        self.busy.set()
        await self.gate.wait()
        self.busy.clear()
        if min(items) < 0:
            raise ValueError("negative")
        return [2 * item if item else InvalidRequest("zero") for item in items]


@asynccontextmanager
async def serving(
    run: Callable[[Sequence[int]], Awaitable[Sequence[int | LatentWireError]]],
    admission: Admission,
    max_batch: int = 4,
    **more: Any,
) -> AsyncIterator[Batcher[int, int]]:
    batcher: Batcher[int, int] = Batcher(run, max_batch=max_batch, admission=admission, **more)
    server = asyncio.create_task(batcher.serve())
    try:
        yield batcher
    finally:
        server.cancel()
        await asyncio.gather(server, return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    """Give other tasks turns until ``condition`` holds; a promise that is broken ends in a TimeoutError."""
    async with asyncio.timeout(LONG):
        while not condition():
            await asyncio.sleep(0)


async def test_every_row_of_a_request_gets_exactly_one_result_in_order() -> None:
    model, admission = Doubler(), Admission(100)
    async with serving(model, admission) as batcher:
        rows = list(range(1, 12))
        assert await batcher.submit(rows) == [2 * row for row in rows]
    assert [row for batch in model.batches for row in batch] == rows
    assert max(len(batch) for batch in model.batches) == 4


async def test_concurrent_requests_share_a_batch_and_keep_their_own_answers() -> None:
    model = Doubler()
    async with serving(model, Admission(8)) as batcher:
        answers = await asyncio.gather(*(batcher.submit([n]) for n in (1, 2, 3)))
    assert answers == [[2], [4], [6]]
    assert model.batches == [[1, 2, 3]]


async def test_what_arrives_while_the_device_works_becomes_the_next_batch() -> None:
    model, admission = Doubler(), Admission(8)
    model.gate.clear()
    async with serving(model, admission) as batcher:
        first = asyncio.create_task(batcher.submit([1]))
        await until(model.busy.is_set)
        others = [asyncio.create_task(batcher.submit([n])) for n in (2, 3)]
        await until(lambda: admission.waiting == 2)
        model.gate.set()
        assert await asyncio.gather(first, *others) == [[2], [4], [6]]
    assert model.batches == [[1], [2, 3]]


async def test_a_row_whose_caller_left_never_reaches_the_model() -> None:
    model, admission = Doubler(), Admission(8)
    model.gate.clear()
    async with serving(model, admission) as batcher:
        first = asyncio.create_task(batcher.submit([1]))
        await until(model.busy.is_set)
        gone = asyncio.create_task(batcher.submit([2, 4]))
        await until(lambda: admission.waiting == 2)
        gone.cancel()
        await until(lambda: admission.waiting == 0)  # its place is free at once, not when the device gets there
        model.gate.set()
        assert await first == [2]
        assert await batcher.submit([3]) == [6]
        assert admission.waiting == admission.running == 0
    assert model.batches == [[1], [3]]


async def test_a_caller_who_leaves_while_the_model_runs_disturbs_nobody_in_the_same_batch() -> None:
    model, admission = Doubler(), Admission(8)
    model.gate.clear()
    async with serving(model, admission) as batcher:
        leaving, staying = (asyncio.create_task(batcher.submit([n])) for n in (1, 2))
        await until(model.busy.is_set)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        model.gate.set()
        assert await staying == [4]
    assert model.batches == [[1, 2]]


async def test_a_failing_batch_fails_its_own_rows_and_the_next_works() -> None:
    admission = Admission(8)
    async with serving(Doubler(), admission, max_batch=2) as batcher:
        bad, neighbour, other = await asyncio.gather(*(batcher.submit([n]) for n in (-1, 1, 5)), return_exceptions=True)
        for failed in (bad, neighbour):
            assert isinstance(failed, InferenceFailed)
            assert str(failed) == "the model failed with ValueError"
            assert isinstance(failed.__cause__, ValueError)
        assert other == [10]
        assert await batcher.submit([6]) == [12]
        assert admission.waiting == admission.running == 0


async def test_a_deliberate_error_of_a_batch_reaches_its_rows_unchanged() -> None:
    refusal = InvalidRequest("not today")

    async def refuse(_: Sequence[int]) -> list[int | LatentWireError]:
        raise refusal

    async with serving(refuse, Admission(8)) as batcher:
        with pytest.raises(InvalidRequest) as caught:
            await batcher.submit([1])
    assert caught.value is refusal


async def test_an_error_of_one_row_is_that_rows_alone() -> None:
    model = Doubler()
    async with serving(model, Admission(8)) as batcher:
        good, refused = await asyncio.gather(batcher.submit([1]), batcher.submit([0]), return_exceptions=True)
    assert model.batches == [[1, 0]]
    assert good == [2]
    assert isinstance(refused, InvalidRequest)


@pytest.mark.parametrize("results", [[], [2], [2, 4, 6]])
async def test_a_model_that_loses_or_invents_a_row_fails_the_batch(results: list[int]) -> None:
    async def wrong(_: Sequence[int]) -> list[int | LatentWireError]:
        return list(results)

    async with serving(wrong, Admission(8)) as batcher:
        with pytest.raises(InferenceFailed):
            await batcher.submit([1, 2])


def test_a_request_that_does_not_fit_beside_others_is_refused_and_takes_no_place() -> None:
    admission = Admission(3)
    with admission.admit(2):
        with pytest.raises(Overloaded, match="2 rows are being answered, 2 more exceed 3"), admission.admit(2):
            pass
        with admission.admit(1):  # the last free place is still there
            assert admission.admitted == 3
    with admission.admit(3):
        assert admission.admitted == 3
    assert admission.admitted == 0


def test_a_request_larger_than_the_whole_queue_is_no_matter_of_time() -> None:
    with pytest.raises(TooLarge, match="4 rows; at most 3"), Admission(3).admit(4):
        pass


async def test_stopping_fails_the_rows_that_wait() -> None:
    admission = Admission(8)
    batcher: Batcher[int, int] = Batcher(Doubler(), max_batch=4, admission=admission)
    server = asyncio.create_task(batcher.serve())
    await asyncio.sleep(0)
    waiting = asyncio.create_task(batcher.submit([1, 2]))
    await until(lambda: admission.waiting == 2)
    server.cancel()
    with pytest.raises(NotReady, match="stopping"):
        await waiting
    assert admission.waiting == admission.running == 0


async def test_stopping_fails_the_rows_on_the_device() -> None:
    model, admission = Doubler(), Admission(8)
    model.gate.clear()
    batcher: Batcher[int, int] = Batcher(model, max_batch=1, admission=admission)
    server = asyncio.create_task(batcher.serve())
    callers = [asyncio.create_task(batcher.submit([n])) for n in (1, 2)]
    await until(model.busy.is_set)
    server.cancel()
    await until(lambda: all(caller.done() for caller in callers))
    assert [type(caller.exception()) for caller in callers] == [NotReady, NotReady]
    assert admission.waiting == admission.running == 0


async def test_the_load_says_what_waits_and_what_runs_and_returns_to_nothing() -> None:
    model, admission = Doubler(), Admission(8)
    model.gate.clear()
    async with serving(model, admission, max_batch=2) as batcher:
        asked = asyncio.create_task(batcher.submit([1, 2, 3]))
        await until(model.busy.is_set)
        assert (admission.running, admission.waiting) == (2, 1)
        model.gate.set()
        await asked
        assert (admission.running, admission.waiting) == (0, 0)


async def test_progress_is_counted_from_the_first_row_of_an_idle_service_and_from_each_batch() -> None:
    model, admission = Doubler(), Admission(8, last_progress=0.0)
    model.gate.clear()
    async with serving(model, admission, max_batch=1) as batcher:
        first = asyncio.create_task(batcher.submit([1]))
        await until(model.busy.is_set)
        assert admission.last_progress > 0  # an idle hour is not a stall
        admission.last_progress = 1.0
        second = asyncio.create_task(batcher.submit([2]))
        await until(lambda: admission.waiting == 1)
        assert admission.last_progress == 1.0  # new rows are no progress while the device hangs
        model.gate.set()
        await asyncio.gather(first, second)
        assert admission.last_progress > 1.0


async def batches_of(
    rows: Sequence[int], *, max_batch: int = 100, max_batch_tokens: int | None = 100
) -> list[list[int]]:
    """The batches made of rows that wait while the device is busy; a row's tokens are its number."""
    model, admission = Doubler(), Admission(1000)
    model.gate.clear()
    limits = {"max_batch": max_batch, "max_batch_tokens": max_batch_tokens}
    async with serving(model, admission, **limits, cost=lambda row: row) as batcher:  # type: ignore[arg-type]
        busy = asyncio.create_task(batcher.submit([1]))
        await until(model.busy.is_set)
        asked = [asyncio.create_task(batcher.submit([row])) for row in rows]
        await until(lambda: admission.waiting == len(rows))
        model.gate.set()
        await busy
        assert await asyncio.gather(*asked) == [[2 * row] for row in rows]
    return model.batches[1:]


@pytest.mark.parametrize(
    "rows, batches",
    [
        ([10, 10, 10, 10], [[10, 10, 10, 10]]),
        ([30, 30, 30, 30], [[30, 30, 30], [30]]),  # 4 × 30 are over 100
        ([20, 50, 20, 50, 20], [[20, 20, 20], [50, 50]]),  # with a 50 it would be 4 × 50
        ([50, 20, 20, 50, 20], [[50, 50], [20, 20, 20]]),
        ([40, 30, 33], [[40, 33], [30]]),  # 3 × 40 are over; 33 is nearer than 30
        ([150, 10, 10], [[150], [10, 10]]),  # a row over the budget goes alone
        ([10, 150, 10], [[10, 10], [150]]),
        ([24, 1, 1, 1], [[24, 1], [1, 1]]),  # at most half of a batch is padding
    ],
)
async def test_a_batch_holds_rows_of_like_length_within_the_token_budget(
    rows: list[int], batches: list[list[int]]
) -> None:
    assert await batches_of(rows) == batches


async def test_without_a_token_budget_only_rows_count() -> None:
    assert await batches_of([90, 80, 70, 85], max_batch=3, max_batch_tokens=None) == [[90, 85, 80], [70]]


async def test_every_batch_is_within_its_bounds_and_holds_the_row_that_waited_longest() -> None:
    for seed in range(20):
        rows = random.Random(seed).sample(range(1, 140), 60)
        batches = await batches_of(rows, max_batch=8)
        waiting = list(rows)
        for batch in batches:
            assert batch[0] == waiting[0]
            assert len(batch) == 1 or len(batch) * max(batch) <= min(100, 2 * sum(batch))
            assert len(batch) <= 8
            waiting = [row for row in waiting if row not in batch]
        assert not waiting


async def test_a_long_row_is_served_in_its_turn_while_short_ones_keep_coming() -> None:
    model, admission = Doubler(), Admission(1000)

    async def keep_asking(batcher: Batcher[int, int]) -> None:
        while True:
            await batcher.submit([1])

    async with serving(model, admission, max_batch=2, max_batch_tokens=10, cost=lambda row: row) as batcher:
        short = [asyncio.create_task(keep_asking(batcher)) for _ in range(6)]
        await until(lambda: len(model.batches) > 3)
        before = len(model.batches)
        assert await batcher.submit([9]) == [18]
        assert len(model.batches) - before <= 5  # what waited before it, two by two, and the one on the device
        for task in short:
            task.cancel()
        await asyncio.gather(*short, return_exceptions=True)


async def test_the_tokens_of_a_row_are_asked_once_when_it_is_submitted() -> None:
    asked: list[int] = []

    def cost(row: int) -> int:
        asked.append(row)
        return row

    async with serving(Doubler(), Admission(10), max_batch=1, cost=cost) as batcher:
        await batcher.submit([3, 1, 2])
    assert asked == [3, 1, 2]


class SmallDevice:
    """A fake model with memory for so many tokens in a batch; keeps what it was given alive in the failing frame."""

    def __init__(self, tokens: int, error: Callable[[], Exception] = MemoryError) -> None:
        self.tokens, self.error = tokens, error
        self.batches: list[list[int]] = []
        self.held: list[weakref.ref[Any]] = []
        self.freed: list[bool] = []

    async def __call__(self, items: Sequence[int]) -> list[int | LatentWireError]:
        class Activation:
            pass

        self.batches.append(list(items))
        activation = Activation()
        self.held.append(weakref.ref(activation))
        if len(items) * max(items) > self.tokens:
            raise self.error()
        return [2 * item for item in items]

    def free(self) -> None:
        self.freed.append(all(ref() is None for ref in self.held))


async def test_a_batch_that_memory_is_too_small_for_is_halved_until_it_fits() -> None:
    device, admission = SmallDevice(9), Admission(100)
    async with serving(device, admission, max_batch=8, free_caches=device.free) as batcher:
        assert await batcher.submit([3, 4, 3, 4, 3]) == [6, 8, 6, 8, 6]
        assert (admission.running, admission.waiting, admission.out_of_memory.total()) == (0, 0, 2)
    assert device.batches == [[3, 4, 3, 4, 3], [3, 4], [3, 4, 3], [3], [4, 3]]
    assert device.freed == [True, True]  # caches are freed once nothing of the failed batch is alive


async def test_only_a_row_that_does_not_fit_alone_is_refused() -> None:
    device, admission = SmallDevice(9), Admission(100)
    async with serving(device, admission, max_batch=8, cost=lambda row: row) as batcher:
        answers = await asyncio.gather(*(batcher.submit([n]) for n in (3, 10, 4)), return_exceptions=True)
    assert answers[0] == [6] and answers[2] == [8]
    assert isinstance(answers[1], InsufficientMemory)
    assert str(answers[1]) == "a row of 10 tokens does not fit the device's memory: MemoryError"
    assert admission.out_of_memory.total() == 3  # three rows, two rows, one row


async def test_the_caller_says_which_errors_mean_that_memory_ran_out() -> None:
    class Exhausted(RuntimeError):
        pass

    async def scenario(**more: Any) -> list[Any]:
        device = SmallDevice(9, Exhausted)
        async with serving(device, Admission(100), **more) as batcher:
            return await asyncio.gather(*(batcher.submit([n]) for n in (4, 5)), return_exceptions=True)

    assert await scenario(is_out_of_memory=lambda error: isinstance(error, Exhausted)) == [[8], [10]]
    assert [type(answer) for answer in await scenario()] == [InferenceFailed] * 2


async def test_a_row_abandoned_while_its_batch_failed_is_not_tried_again() -> None:
    device = SmallDevice(9)
    tasks: list[asyncio.Task[list[int]]] = []
    loop = asyncio.get_running_loop()
    async with serving(
        device, Admission(100), free_caches=lambda: loop.call_soon_threadsafe(tasks[0].cancel)
    ) as batcher:
        tasks += [asyncio.create_task(batcher.submit([n])) for n in (4, 5)]
        assert await tasks[1] == [10]
    assert device.batches == [[4, 5], [5]]


async def test_stopping_between_two_halves_fails_the_rows_of_both() -> None:
    device, admission = SmallDevice(9), Admission(100)
    batcher: Batcher[int, int] = Batcher(device, max_batch=8, admission=admission, free_caches=lambda: server.cancel())
    server = asyncio.create_task(batcher.serve())
    answers = await asyncio.gather(*(batcher.submit([n]) for n in (4, 5, 6)), return_exceptions=True)
    assert [type(answer) for answer in answers] == [NotReady] * 3
    assert admission.waiting == admission.running == 0


class Clock:
    """Tells the time it was given."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def answer(admission: Admission, clock: Clock, rows: int, seconds: float) -> None:
    with admission.admit(rows):
        clock.now += seconds


def test_a_refused_caller_is_told_when_its_rows_will_fit_at_the_rate_of_the_latest_answers() -> None:
    clock = Clock()
    admission = Admission(40, clock=clock)
    for _ in range(10):
        answer(admission, clock, 2, 1.0)
    with admission.admit(30):
        assert admission.retry_after(20) == pytest.approx(5.0)  # ten of them fit already
        with admission.admit(10):
            assert admission.retry_after(1) == 1.0  # half a second at two rows a second, but no less than one
            assert admission.retry_after(10) == pytest.approx(5.0)
            with pytest.raises(Overloaded) as caught, admission.admit(20):
                pass
            assert caught.value.retry_after_seconds == pytest.approx(10.0)


def test_an_idle_hour_does_not_slow_the_rate_and_a_hanging_device_does() -> None:
    clock = Clock()
    admission = Admission(40, clock=clock)
    answer(admission, clock, 20, 10.0)
    clock.now += 3600
    with admission.admit(40):
        before = admission.retry_after(10)
        assert before == pytest.approx(5.0)
        clock.now += 10
        assert admission.retry_after(10) == pytest.approx(10.0)
        clock.now += 1000
        assert admission.retry_after(10) == 60.0


def test_the_rate_follows_what_the_device_does_now() -> None:
    clock = Clock()
    admission = Admission(40, clock=clock)
    for seconds, expected in ((0.1, 1.0), (2.0, 20.0), (0.1, 1.0)):
        for _ in range(300):
            answer(admission, clock, 1, seconds)
        with admission.admit(40):
            assert admission.retry_after(10) == pytest.approx(expected, rel=0.05)


def test_before_anything_was_answered_a_caller_is_told_to_wait_as_long_as_the_work_has_taken() -> None:
    clock = Clock()
    admission = Admission(2, clock=clock)
    with pytest.raises(ValueError), admission.admit(2):
        assert admission.retry_after() == 1.0
        clock.now += 7
        assert admission.retry_after() == 7.0
        raise ValueError
    with admission.admit(2):
        clock.now += 3
        assert admission.retry_after() == 3.0  # what failed was no answer


def test_processes_that_share_a_limit_refuse_what_all_of_them_have_no_room_for() -> None:
    clock, parts = Clock(), memoryview(bytearray(16)).cast("q")
    one, other = (Admission(40, clock=clock, rows=Sum(parts, own)) for own in (0, 1))
    for _ in range(10):
        answer(one, clock, 2, 1.0)
    with one.admit(10), other.admit(30):
        assert (one.admitted, other.admitted, one.rows.all) == (10, 30, 40)
        with pytest.raises(Overloaded, match="40 rows are being answered, 20 more exceed 40") as caught, one.admit(20):
            pass
        assert caught.value.retry_after_seconds == pytest.approx(2.5)  # of twenty it answers five, at two a second
    assert (one.rows.all, parts.tolist()) == (0, [0, 0])


def test_a_process_with_no_rows_of_its_own_counts_no_idle_time_for_those_of_others() -> None:
    clock, parts = Clock(), memoryview(bytearray(16)).cast("q")
    one, other = (Admission(40, clock=clock, rows=Sum(parts, own)) for own in (0, 1))
    with one.admit(40):
        assert other.retry_after(10) == 1.0  # it has never answered anything, and knows no better
    for _ in range(10):
        answer(other, clock, 2, 1.0)
    clock.now += 3600
    with one.admit(40):
        clock.now += 30
        assert other.retry_after(20) == pytest.approx(5.0)  # half of the twenty, at two a second
