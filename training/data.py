"""Which examples a step sees, in an order that one integer remembers, and their batches, made ahead of time.

Dimensions used in this file:
    B batch    K slots    D receiver width
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Generic, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from latentwire.bridge.evaluation.tasks import Example

T = TypeVar("T")
GROUPED = 8  # steps whose examples are sorted by length together: enough to pad little, few enough to stay random
AHEAD = 2  # steps prepared before they are asked for


class Sampler:
    """Which examples step ``step`` sees: a fresh permutation each epoch, a pure function of (seed, position).

    With ``length``, any cheap measure of it, the examples of ``GROUPED`` steps are sorted by it, cut into steps, and
    the steps shuffled: little is padded then.
    """

    def __init__(self, count: int, *, batch_size: int, seed: int, length: Callable[[int], int] | None = None) -> None:
        self.count, self.batch_size, self.seed, self.length = count, batch_size, seed, length

    def batch(self, number: int) -> list[int]:
        """Indices of step ``number``, counted from 0 over the whole run."""
        if self.length is None:
            return self._positions(number * self.batch_size, self.batch_size)
        group, place = divmod(number, GROUPED)
        return self._grouped(group)[place]

    @lru_cache(maxsize=4)  # noqa: B019  one sampler lives as long as its run
    def _grouped(self, group: int) -> list[list[int]]:
        assert self.length is not None
        drawn = self._positions(group * GROUPED * self.batch_size, GROUPED * self.batch_size)
        drawn.sort(key=self.length)  # stable, so that equal lengths stay in the order drawn
        steps = [drawn[start : start + self.batch_size] for start in range(0, len(drawn), self.batch_size)]
        return [steps[i] for i in np.random.default_rng((self.seed, group, 1)).permutation(GROUPED)]

    def _positions(self, start: int, count: int) -> list[int]:
        places = (divmod(position, self.count) for position in range(start, start + count))
        return [int(_permutation(self.count, self.seed, epoch)[place]) for epoch, place in places]


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(count)


class Subset(Sequence[Example]):
    """Some examples of a split, in a given order; nothing is copied, so a generated split stays lazy."""

    def __init__(self, examples: Sequence[Example], chosen: Sequence[int]) -> None:
        self.examples, self.chosen = examples, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self.examples[i] for i in self.chosen[index]]
        return self.examples[self.chosen[index]]


def stratified(labels: Sequence[int | None], count: int, seed: int) -> list[int]:
    """``count`` indices into ``labels``, each label with its share of the whole, seeded; sorted.

    Largest remainders get what rounding leaves, so every label keeps its share to within one example.
    """
    rng = np.random.default_rng((seed, 2))
    kinds = sorted({-1 if label is None else label for label in labels})
    if len(kinds) == 1:
        return sorted(int(i) for i in rng.choice(len(labels), size=count, replace=False))
    held = {kind: [i for i, label in enumerate(labels) if label == kind] for kind in kinds}
    exact = {kind: count * len(rows) / len(labels) for kind, rows in held.items()}
    take = {kind: int(share) for kind, share in exact.items()}
    for kind in sorted(kinds, key=lambda kind: take[kind] - exact[kind])[: count - sum(take.values())]:
        take[kind] += 1
    return sorted(int(i) for kind, rows in held.items() for i in rng.choice(rows, size=take[kind], replace=False))


def split_off(
    examples: Sequence[Example], *, validation: int, limit: int | None, seed: int
) -> tuple[Sequence[Example], Sequence[Example]]:
    """Training and validation examples, disjoint: validation is taken from the training split, never from test.

    Labelled splits are stratified. At most half of the examples go to validation; a generated split of a million
    gives its last ones, which no run of ordinary length reaches.
    """
    count, held = len(examples), min(validation, len(examples) // 2)
    labelled = bool(count) and examples[0].label is not None
    labels: list[int | None] = [example.label for example in examples] if labelled else [None] * count
    away = set(stratified(labels, held, seed)) if labelled else set(range(count - held, count))
    rest: Sequence[int] = range(count - held) if not labelled else [i for i in range(count) if i not in away]
    if limit is not None and limit < len(rest):
        rest = [rest[i] for i in stratified([labels[i] for i in rest], limit, seed)]
    return Subset(examples, rest), Subset(examples, sorted(away))


class Prefetch(Generic[T]):
    """Makes the next ``AHEAD`` steps on a thread while the device works; ``take`` says how long it had to wait."""

    def __init__(self, make: Callable[[int], T], start: int, stop: int) -> None:
        self._make, self._next, self._stop = make, start, stop
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ready: deque[Future[T]] = deque()

    def __enter__(self) -> "Prefetch[T]":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def take(self) -> tuple[T, float]:
        """The next step's data, and the seconds spent waiting for it. What failed on the thread is raised here."""
        while self._next < self._stop and len(self._ready) <= AHEAD:
            self._ready.append(self._pool.submit(self._make, self._next))
            self._next += 1
        started = time.perf_counter()
        made = self._ready.popleft().result()
        return made, time.perf_counter() - started


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """``items`` in pieces of at most ``size``."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
