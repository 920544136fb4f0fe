"""Examples → tensors, in an order that one integer remembers.

Dimensions used in this file:
    B batch    S sender tokens
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from bridge.evaluation.tasks import Example


class Order:
    """Which examples step ``step`` sees: a fresh permutation each epoch, a pure function of (seed, position)."""

    def __init__(self, count: int, *, batch_size: int, seed: int) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed

    def batch(self, number: int) -> list[int]:
        """Indices of forward pass ``number``, counted from 0 over the whole run."""
        start = number * self.batch_size
        return [self._at(position) for position in range(start, start + self.batch_size)]

    def _at(self, position: int) -> int:
        epoch, place = divmod(position, self.count)
        return int(_permutation(self.count, self.seed, epoch)[place])


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(count)


def pick(examples: Sequence[Example], indices: Sequence[int]) -> list[Example]:
    """The examples at ``indices``."""
    return [examples[i] for i in indices]
