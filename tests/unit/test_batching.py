"""What a caller may rely on from the batcher."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import pytest

from bridge.errors import InferenceFailed, InvalidRequest, LatentWireError, Overloaded, TooLarge
from service.batching import Batcher, Load

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
    run: Callable[[Sequence[int]], Awaitable[Sequence[int | LatentWireError]]], load: Load, max_batch: int = 4
) -> AsyncIterator[Batcher[int, int]]:
    batcher: Batcher[int, int] = Batcher(run, max_batch=max_batch, load=load)
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


def test_every_row_of_a_request_gets_exactly_one_result_in_order() -> None:
    async def scenario() -> None:
        model, load = Doubler(), Load(100)
        async with serving(model, load) as batcher:
            rows = list(range(1, 12))
            assert await batcher.submit(rows) == [2 * row for row in rows]
        assert [row for batch in model.batches for row in batch] == rows
        assert max(len(batch) for batch in model.batches) == 4

    asyncio.run(scenario())


def test_concurrent_requests_share_a_batch_and_keep_their_own_answers() -> None:
    async def scenario() -> None:
        model = Doubler()
        async with serving(model, Load(8)) as batcher:
            answers = await asyncio.gather(*(batcher.submit([n]) for n in (1, 2, 3)))
        assert answers == [[2], [4], [6]]
        assert model.batches == [[1, 2, 3]]

    asyncio.run(scenario())


def test_what_arrives_while_the_device_works_becomes_the_next_batch() -> None:
    async def scenario() -> None:
        model, load = Doubler(), Load(8)
        model.gate.clear()
        async with serving(model, load) as batcher:
            first = asyncio.create_task(batcher.submit([1]))
            await until(model.busy.is_set)
            others = [asyncio.create_task(batcher.submit([n])) for n in (2, 3)]
            await until(lambda: load.waiting == 2)
            model.gate.set()
            assert await asyncio.gather(first, *others) == [[2], [4], [6]]
        assert model.batches == [[1], [2, 3]]

    asyncio.run(scenario())


def test_a_row_whose_caller_left_never_reaches_the_model() -> None:
    async def scenario() -> None:
        model, load = Doubler(), Load(8)
        model.gate.clear()
        async with serving(model, load) as batcher:
            first = asyncio.create_task(batcher.submit([1]))
            await until(model.busy.is_set)
            gone = asyncio.create_task(batcher.submit([2, 4]))
            await until(lambda: load.waiting == 2)
            gone.cancel()
            await until(lambda: load.waiting == 0)  # its place is free at once, not when the device gets there
            model.gate.set()
            assert await first == [2]
            assert await batcher.submit([3]) == [6]
            assert load.waiting == load.running == 0
        assert model.batches == [[1], [3]]

    asyncio.run(scenario())


def test_a_caller_who_leaves_while_the_model_runs_disturbs_nobody_in_the_same_batch() -> None:
    async def scenario() -> None:
        model, load = Doubler(), Load(8)
        model.gate.clear()
        async with serving(model, load) as batcher:
            leaving, staying = (asyncio.create_task(batcher.submit([n])) for n in (1, 2))
            await until(model.busy.is_set)
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)
            model.gate.set()
            assert await staying == [4]
        assert model.batches == [[1, 2]]

    asyncio.run(scenario())


def test_a_failing_batch_fails_its_own_rows_and_the_next_works() -> None:
    async def scenario() -> None:
        load = Load(8)
        async with serving(Doubler(), load, max_batch=2) as batcher:
            bad, neighbour, other = await asyncio.gather(
                *(batcher.submit([n]) for n in (-1, 1, 5)), return_exceptions=True
            )
            for failed in (bad, neighbour):
                assert isinstance(failed, InferenceFailed)
                assert str(failed) == "the model failed with ValueError"
                assert isinstance(failed.__cause__, ValueError)
            assert other == [10]
            assert await batcher.submit([6]) == [12]
            assert load.waiting == load.running == 0

    asyncio.run(scenario())


def test_a_deliberate_error_of_a_batch_reaches_its_rows_unchanged() -> None:
    async def scenario() -> None:
        refusal = InvalidRequest("not today")

        async def refuse(_: Sequence[int]) -> list[int | LatentWireError]:
            raise refusal

        async with serving(refuse, Load(8)) as batcher:
            with pytest.raises(InvalidRequest) as caught:
                await batcher.submit([1])
        assert caught.value is refusal

    asyncio.run(scenario())


def test_an_error_of_one_row_is_that_rows_alone() -> None:
    async def scenario() -> None:
        model = Doubler()
        async with serving(model, Load(8)) as batcher:
            good, refused = await asyncio.gather(batcher.submit([1]), batcher.submit([0]), return_exceptions=True)
        assert model.batches == [[1, 0]]
        assert good == [2]
        assert isinstance(refused, InvalidRequest)

    asyncio.run(scenario())


@pytest.mark.parametrize("results", [[], [2], [2, 4, 6]])
def test_a_model_that_loses_or_invents_a_row_fails_the_batch(results: list[int]) -> None:
    async def scenario() -> None:
        async def wrong(_: Sequence[int]) -> list[int | LatentWireError]:
            return list(results)

        async with serving(wrong, Load(8)) as batcher:
            with pytest.raises(InferenceFailed):
                await batcher.submit([1, 2])

    asyncio.run(scenario())


def test_a_request_that_does_not_fit_beside_others_is_refused_and_takes_no_place() -> None:
    load = Load(3)
    with load.admit(2):
        with pytest.raises(Overloaded, match="2 rows are being answered, 2 more exceed 3"), load.admit(2):
            pass
        with load.admit(1):  # the last free place is still there
            assert load.admitted == 3
    with load.admit(3):
        assert load.admitted == 3
    assert load.admitted == 0


def test_a_request_larger_than_the_whole_queue_is_no_matter_of_time() -> None:
    with pytest.raises(TooLarge, match="4 rows; at most 3"), Load(3).admit(4):
        pass


def test_stopping_fails_the_rows_that_wait() -> None:
    async def scenario() -> None:
        load = Load(8)
        batcher: Batcher[int, int] = Batcher(Doubler(), max_batch=4, load=load)
        server = asyncio.create_task(batcher.serve())
        await asyncio.sleep(0)
        waiting = asyncio.create_task(batcher.submit([1, 2]))
        await until(lambda: load.waiting == 2)
        server.cancel()
        with pytest.raises(InferenceFailed, match="stopping"):
            await waiting
        assert load.waiting == load.running == 0

    asyncio.run(scenario())


def test_stopping_fails_the_rows_on_the_device() -> None:
    async def scenario() -> None:
        model, load = Doubler(), Load(8)
        model.gate.clear()
        batcher: Batcher[int, int] = Batcher(model, max_batch=1, load=load)
        server = asyncio.create_task(batcher.serve())
        callers = [asyncio.create_task(batcher.submit([n])) for n in (1, 2)]
        await until(model.busy.is_set)
        server.cancel()
        await until(lambda: all(caller.done() for caller in callers))
        assert [type(caller.exception()) for caller in callers] == [InferenceFailed, InferenceFailed]
        assert load.waiting == load.running == 0

    asyncio.run(scenario())


def test_the_load_says_what_waits_and_what_runs_and_returns_to_nothing() -> None:
    async def scenario() -> None:
        model, load = Doubler(), Load(8)
        model.gate.clear()
        async with serving(model, load, max_batch=2) as batcher:
            asked = asyncio.create_task(batcher.submit([1, 2, 3]))
            await until(model.busy.is_set)
            assert (load.running, load.waiting) == (2, 1)
            model.gate.set()
            await asked
            assert (load.running, load.waiting) == (0, 0)

    asyncio.run(scenario())


def test_progress_is_counted_from_the_first_row_of_an_idle_service_and_from_each_batch() -> None:
    async def scenario() -> None:
        model, load = Doubler(), Load(8, last_progress=0.0)
        model.gate.clear()
        async with serving(model, load, max_batch=1) as batcher:
            first = asyncio.create_task(batcher.submit([1]))
            await until(model.busy.is_set)
            assert load.last_progress > 0  # an idle hour is not a stall
            load.last_progress = 1.0
            second = asyncio.create_task(batcher.submit([2]))
            await until(lambda: load.waiting == 1)
            assert load.last_progress == 1.0  # new rows are no progress while the device hangs
            model.gate.set()
            await asyncio.gather(first, second)
            assert load.last_progress > 1.0

    asyncio.run(scenario())
