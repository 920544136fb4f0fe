"""Soft tokens under ids of their own, below zero, for engines that take ids and no embeddings.

They are rows of a table of their own, and the sign says which table an id is of: the vocabulary's begin at 0 and go up
(a tokenizer has no other), the soft tokens' begin at -1 and go down. So no text can name one, whatever its tokenizer.

An engine that shares cached blocks between requests finds them by their ids. So ids are handed out in order and not
again, lest a block be found for another soft token. A latent asked again keeps its ids, and so shares its blocks.

Dimensions used in this file:
    K soft tokens    D model width    T tokens
"""

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

ROWS = 1 << 31  # engines keep ids in 32 bits


@dataclass(eq=False)
class _Held:
    first: int  # row in the table
    soft: Float[Tensor, "K D"]
    users: int


class SoftIds:
    """Gives soft tokens ids that ``embedding`` then understands; transparent to everybody else's ids.

    Soft tokens nobody uses are kept, least recently used first out, up to ``kept_tokens`` of them.
    """

    def __init__(self, embedding: nn.Module, *, kept_tokens: int) -> None:
        self._kept_tokens = kept_tokens
        self._embedding, self._embed = embedding, embedding.forward
        self.tokens = 0  # soft tokens held
        self._next = 0
        self._held: OrderedDict[Hashable, _Held] = OrderedDict()
        self._table: list[_Held] = []  # in ascending order
        self._lock = threading.Lock()
        embedding.forward = self._forward

    def close(self) -> None:
        """Leave the embedding as it was found."""
        del self._embedding.forward

    def hold(self, key: Hashable, make: Callable[[], Float[Tensor, "K D"]]) -> range | None:
        """The ids of the soft tokens of ``key``, made where they are not there yet; they stay until released.

        None when no ids are left: see ``renumber``.
        """
        with self._lock:
            held = self._held.get(key)
        soft = make() if held is None else held.soft
        with self._lock:
            held = self._held.get(key)
            if held is None:
                if self._next + len(soft) > ROWS:
                    return None
                held = self._held[key] = self._number(soft)
            held.users += 1
            self._held.move_to_end(key)
            return _ids(held)

    def ids(self, key: Hashable) -> range:
        """The ids now of soft tokens that are held."""
        with self._lock:
            return _ids(self._held[key])

    def release(self, key: Hashable) -> None:
        """One user less; what nobody uses may be dropped from now on."""
        with self._lock:
            self._held[key].users -= 1
            if self.tokens > self._kept_tokens:
                for idle in [key for key, held in self._held.items() if held.users == 0]:
                    if self.tokens > self._kept_tokens:
                        self._drop(idle)

    def renumber(self) -> None:
        """Begin again with the first id; only when no block made with the old ids is left anywhere."""
        with self._lock:
            for key in [key for key, held in self._held.items() if held.users == 0]:
                self._drop(key)
            self._table, self._next, self.tokens = [], 0, 0
            for key, held in self._held.items():
                self._held[key] = self._number(held.soft, held.users)

    def _number(self, soft: Float[Tensor, "K D"], users: int = 0) -> _Held:
        held = _Held(self._next, soft, users)
        self._next += len(soft)
        self.tokens += len(soft)
        self._table.append(held)
        return held

    def _drop(self, key: Hashable) -> None:
        held = self._held.pop(key)
        self.tokens -= len(held.soft)
        self._table.remove(held)

    def _forward(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape D"]:
        soft = ids < 0
        if not bool(soft.any()):
            plain: Tensor = self._embed(ids)
            return plain
        embeds: Tensor = self._embed(ids.masked_fill(soft, 0)).clone()
        embeds[soft] = self._rows((-1 - ids[soft]).tolist(), embeds)
        return embeds

    def _rows(self, rows: list[int], like: Float[Tensor, "*shape D"]) -> Float[Tensor, "T D"]:
        """Soft tokens by their rows in the table, run by run."""
        runs: list[Tensor] = []
        at = 0
        with self._lock:
            while at < len(rows):
                place = bisect_right(self._table, rows[at], key=lambda held: held.first) - 1
                held = self._table[place] if place >= 0 else None
                start = rows[at] - held.first if held else 0
                if held is None or start >= len(held.soft):
                    # Dropped between a request's end and the step that was already under way: nobody reads the result.
                    runs.append(like.new_zeros(1, like.shape[-1]))
                    at += 1
                    continue
                most, count = min(len(held.soft) - start, len(rows) - at), 1
                while count < most and rows[at + count] == rows[at] + count:
                    count += 1
                runs.append(held.soft[start : start + count].to(like.dtype))
                at += count
        return torch.cat(runs)


def _ids(held: _Held) -> range:
    """Row n of the table has the id -1 - n."""
    return range(-1 - held.first, -1 - held.first - len(held.soft), -1)
