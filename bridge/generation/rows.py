"""Attention on a CPU: each row of a step over its own keys, where they stand in the cache.

With ``sdpa`` a step multiplies the tokens of all its rows with the keys of all its rows, under a mask that leaves each
its own, which the host writes row by row. Here rows that read one token are taken together where they are of like
length, padded to the longest, and prompts one by one.

Dimensions used in this file:
    T tokens of a step    N rows of a group    S keys of its longest row    Q tokens that each reads
    D width of a head
"""

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

SHORT = 127
"""Rows of up to so many keys are of one group; beyond, the longest of a group has up to four times the keys of the
shortest. A call takes as long as some hundred keys that are read in vain."""
Caches = tuple[Float[Tensor, "_ _ D"], Float[Tensor, "_ _ D"]]
"""Of keys and of values, in one layer."""


class Group:
    """Rows that attend together.

    Args:
        tokens: Which of the step they read; None is all, one a row.
        places: Where their keys stand in the cache, the newest included.
        seen: Which keys each token attends to; None is all.
    """

    def __init__(
        self, tokens: Int[Tensor, "N Q"] | None, places: Int[Tensor, "N S"], seen: Bool[Tensor, "N 1 Q S"] | None
    ) -> None:
        self.tokens, self._places, self._shape, self._seen = tokens, places.flatten(), places.shape, seen
        self._read: list[Tensor] = []

    def attend(
        self,
        queries: Float[Tensor, "T _ D"],
        caches: Caches,
        scale: float | None,
    ) -> Float[Tensor, "N _ Q D"]:
        """Attend to what is in a layer's caches; layer after layer is read into the same memory."""
        if not self._read:
            self._read = [cache.new_empty(len(self._places), *cache.shape[1:]) for cache in caches]
        for cache, read in zip(caches, self._read, strict=True):
            torch.index_select(cache, 0, self._places, out=read)
        own = queries[:, :, None] if self.tokens is None else queries[self.tokens].transpose(1, 2)
        keys, values = (read.view(*self._shape, *read.shape[1:]).transpose(1, 2) for read in self._read)
        return F.scaled_dot_product_attention(
            own, keys, values, attn_mask=self._seen, scale=scale, enable_gqa=own.shape[1] != keys.shape[1]
        )


@dataclass(frozen=True, eq=False)
class Rows:
    """How the tokens of a step attend, the same in every layer; ``new`` is where their own keys go."""

    new: Int[Tensor, " T"]
    groups: list[Group]

    @classmethod
    def of(cls, step: dict[str, Any], size: int) -> "Rows":
        """Of the library's inputs, whose blocks have ``size`` tokens."""
        starts, ends = step["cu_seq_lens_q"].tolist(), next(iter(step["cu_seq_lens_k"].values())).tolist()
        read, used = ([end - start for start, end in pairwise(at)] for at in (starts, ends))
        table, most = step["block_table"], np.arange(max(used))
        own = np.minimum(most, np.array(used)[:, None] - 1)  # padded with a key of the row, whatever others left
        if table is not None:  # each row reads one token
            blocks = table[0, :, : -(-len(most) // size)].numpy().astype(np.int64)
            places = np.take_along_axis(blocks, own // size, axis=1) * size + own % size
            new = torch.from_numpy(places[:, -1].copy())
        else:
            new, before = step["write_index"][0], step["read_index"][0]
            stands = (before if len(before) else new).numpy()  # empty where no row has older keys
            places = stands[np.array(ends[:-1])[:, None] + own]
        alike: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        for row, tokens in enumerate(read):
            alike[tokens, max(used[row], SHORT).bit_length() // 2 if tokens == 1 else -row].append(row)
        groups = []
        for (tokens, _), rows in alike.items():
            lengths, offsets = np.array([used[row] for row in rows]), np.arange(tokens)
            keys, is_all = int(lengths.max()), len(rows) == len(new)
            seen = np.arange(keys) <= (lengths[:, None] - tokens + offsets)[..., None]  # a token's own key is its last
            reads = None if is_all else torch.from_numpy(np.array([starts[row] for row in rows])[:, None] + offsets)
            there = torch.from_numpy(places[:, :keys] if is_all else places[rows, :keys])
            groups.append(Group(reads, there, None if seen.all() else torch.from_numpy(seen[:, None])))
        return cls(new, groups)

    def attend(
        self,
        queries: Float[Tensor, "T _ D"],
        keys: Float[Tensor, "T _ D"],
        values: Float[Tensor, "T _ D"],
        caches: Caches,
        scale: float | None,
    ) -> Float[Tensor, "T _ D"]:
        """Put the new keys and values of a layer to those in its caches, and attend."""
        for cache, new in zip(caches, (keys, values), strict=True):
            cache.index_copy_(0, self.new, new)
        made = torch.empty_like(queries)
        for group in self.groups:
            found = group.attend(queries, caches, scale)
            if group.tokens is None:
                return found[:, :, 0]
            made[group.tokens] = found.transpose(1, 2)
        return made
