"""Examples → tensors, in an order that one integer remembers.

Dimensions used in this file:
    B batch    K slots    D receiver width
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from bridge.models import AS_TEXT, FrozenLM


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


def covered_words(
    sender: FrozenLM, receiver: FrozenLM, texts: Sequence[str], *, ratio: int, max_source_tokens: int
) -> tuple[Float[Tensor, "B K D"], Bool[Tensor, "B K"]]:
    """What the windows of each text hold, in the receiver's own embedding: the sum of the tokens that end there.

    The two tokenizers meet at character offsets, so any pair of fast tokenizers can be aligned. A window in
    which no receiver token ends has no target (False in the mask).
    """
    bos = int(sender.tokenizer.bos_token_id is not None)
    owners: list[list[tuple[int, int]]] = []
    for text in texts:
        mine = sender.tokenizer(text, return_offsets_mapping=True, **AS_TEXT)
        theirs = receiver.tokenizer(text, return_offsets_mapping=True, **AS_TEXT)
        ends = np.asarray([end for _, end in mine["offset_mapping"]][: max_source_tokens - bos])
        owners.append(
            [
                ((int(np.searchsorted(ends, end)) + bos) // ratio, token)
                for token, (_, end) in zip(theirs["input_ids"], theirs["offset_mapping"], strict=True)
                if len(ends) and end <= ends[-1]
            ]
        )
    K = 1 + max((slot for row in owners for slot, _ in row), default=0)
    total = torch.zeros(len(texts), K, receiver.width, device=receiver.device)
    count = torch.zeros(len(texts), K, device=receiver.device)
    for i, row in enumerate(owners):
        slots = torch.tensor([slot for slot, _ in row], dtype=torch.long, device=receiver.device)
        tokens = torch.tensor([token for _, token in row], dtype=torch.long, device=receiver.device)
        total[i].index_add_(0, slots, receiver.embed(tokens).detach().float())
        count[i].index_add_(0, slots, torch.ones(len(row), device=receiver.device))
    return total, count > 0
