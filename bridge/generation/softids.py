"""Soft tokens under ids of their own, below zero, for engines that take ids and no embeddings.

They are rows of a table of their own on the model's device, and the sign says which table an id is of: the vocabulary's
begin at 0 and go up (a tokenizer has no other), the soft tokens' begin at -1 and go down. So no text can name one,
whatever its tokenizer. Which row it is is arithmetic on the device: a step runs no Python for it and waits for nothing.

An engine that shares cached blocks between requests finds them by their ids. So an id is never given to a second soft
token, lest a block be found for it: a row that is used again has the next of its ids. A latent asked again keeps its
ids, and so shares its blocks.

Dimensions used in this file:
    K soft tokens    D model width    R rows of the table
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from latentwire.bridge.errors import Overloaded

IDS = 1 << 31  # engines keep ids in 32 bits
LOOK_SECONDS = 0.1  # how often one that waits for room looks whether it still should


@dataclass(eq=False)
class _Held:
    rows: list[int]
    users: int = 1


class SoftIds:
    """Gives soft tokens ids that ``embedding`` then understands; transparent to everybody else's ids.

    Soft tokens nobody uses stay while their rows are not needed; least recently used, first out.
    """

    def __init__(self, embedding: nn.Module, *, rows: int) -> None:
        self._embedding, self._embed = embedding, embedding.forward
        weight = cast(Tensor, embedding.weight)
        self._table: Float[Tensor, "R D"] = weight.new_zeros(rows, weight.shape[1])
        self._free = list(range(rows - 1, -1, -1))
        self._uses = [0] * rows  # how often each row was given away since ids began
        self._held: OrderedDict[Hashable, _Held] = OrderedDict()
        self._changed = threading.Condition()
        embedding.forward = self._forward

    @property
    def tokens(self) -> int:
        """Soft tokens in the table, used or not."""
        return len(self._table) - len(self._free)

    @property
    def users(self) -> int:
        """How often soft tokens are held."""
        with self._changed:
            return sum(held.users for held in self._held.values())

    def close(self) -> None:
        """Leave the embedding as it was found."""
        del self._embedding.forward

    def hold(
        self, key: Hashable, make: Callable[[], Float[Tensor, "K D"]], waits: Callable[[], bool] = lambda: False
    ) -> bool:
        """Have the soft tokens of ``key`` in the table, made where they are not there, until they are released.

        False when a row has no id left: see ``renumber``.

        Raises:
            Overloaded: Others' soft tokens took the rows, and ``waits`` said no.
        """
        with self._changed:
            if self._use(key):
                return True
        soft = make()
        with self._changed:
            while key not in self._held and not self._make_room(len(soft)):
                if not waits():
                    message = f"the engine has room for {len(self._table)} soft tokens, and others' took it"
                    raise Overloaded(message, retry_after_seconds=1.0)
                self._changed.wait(LOOK_SECONDS)
            if self._use(key):  # made by another meanwhile
                return True
            first = len(self._free) - len(soft)
            rows = self._free[first:]
            if any(self._id(row) < -IDS for row in rows):
                return False
            self._table[rows] = soft.to(self._table)
            if self._table.is_cuda:  # steps run on a stream that does not wait for this one
                torch.cuda.current_stream(self._table.device).synchronize()
            del self._free[first:]
            self._held[key] = _Held(rows)
            return True

    def ids(self, key: Hashable) -> list[int]:
        """The ids now of soft tokens that are held."""
        with self._changed:
            return [self._id(row) for row in self._held[key].rows]

    def release(self, key: Hashable) -> None:
        """One user less; what nobody uses may be dropped from now on."""
        with self._changed:
            self._held[key].users -= 1
            self._changed.notify_all()

    def renumber(self) -> None:
        """Begin again with the first ids; only when no block made with the old ones is left anywhere."""
        with self._changed:
            self._uses = [0] * len(self._uses)
            self._changed.notify_all()

    def _id(self, row: int) -> int:
        return -1 - row - len(self._table) * self._uses[row]

    def _use(self, key: Hashable) -> bool:
        held = self._held.get(key)
        if held is None:
            return False
        held.users += 1
        self._held.move_to_end(key)
        return True

    def _make_room(self, count: int) -> bool:
        """Whether ``count`` rows are free, once what nobody uses was dropped as far as needed."""
        while len(self._free) < count:
            idle = next((key for key, held in self._held.items() if held.users == 0), None)
            if idle is None:
                return False
            # A step under way may still read them for a request that has ended: nobody reads its result.
            rows = self._held.pop(idle).rows
            for row in rows:
                self._uses[row] += 1
            self._free += rows
        return True

    def _forward(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape D"]:
        plain: Tensor = self._embed(ids.clamp(min=0))
        soft = self._table[(-1 - ids) % len(self._table)].to(plain)
        return torch.where((ids < 0)[..., None], soft, plain)
