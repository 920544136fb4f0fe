"""Weights of models that gave way to others on a device, kept in the host's memory: they return at a copy's speed.

Frozen weights never change. So they are copied to the host once, when they first leave, and the copy stays while they
are on the device: to leave again then costs nothing. In pinned memory a GPU reads them itself.
"""

import logging
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from latentwire.bridge.config import Fingerprint
from latentwire.bridge.errors import first_line
from latentwire.bridge.memory import free_bytes
from latentwire.bridge.models import FrozenLM

log = logging.getLogger(__name__)

SHARE = 0.5  # of the host's free memory, where nobody says how much
HOST = torch.device("cpu")


@dataclass(eq=False)
class _Parked:
    lm: FrozenLM
    tensors: list[Tensor]

    @property
    def bytes(self) -> int:
        return sum(map(_held, self.tensors))

    def leave(self) -> None:
        """Give back what the model holds on its device."""
        for tensor, copy in zip(_tensors(self.lm.model), self.tensors, strict=True):
            tensor.data = copy


@dataclass(eq=False)
class HostCopies:
    """Keeps models whose weights left their device; those that left longest ago are forgotten first.

    Attributes:
        most_bytes: Of all copies; None for ``SHARE`` of what the host has free, 0 for none.
    """

    most_bytes: int | None = None
    _parked: "OrderedDict[Fingerprint, _Parked]" = field(default_factory=OrderedDict)

    @classmethod
    def beside(cls, device: torch.device, most_bytes: int | None = None) -> "HostCopies | None":
        """Copies for models of a device; None on one that has no memory of its own, or whose copies are not faster."""
        return cls(most_bytes) if device.type == "cuda" else None

    @property
    def bytes(self) -> int:
        """Of all copies now."""
        return sum(parked.bytes for parked in self._parked.values())

    def park(self, lm: FrozenLM) -> bool:
        """Take a model that nobody uses off its device; False where there is no room for it, and it is to be dropped.

        Whoever still holds the model finds its weights on the host.
        """
        if (parked := self._parked.get(lm.fingerprint)) is None:
            parked = self._copied(lm)
            if parked is None:
                return False
            self._parked[lm.fingerprint] = parked
        self._parked.move_to_end(lm.fingerprint)
        parked.leave()
        return True

    def bring(self, name: str, fingerprint: Fingerprint, device: torch.device) -> FrozenLM | None:
        """A parked model under a name, with its weights on the device; None where it is not here."""
        if (parked := self._parked.get(fingerprint)) is None:
            return None
        try:
            for tensor, copy in zip(_tensors(parked.lm.model), parked.tensors, strict=True):
                tensor.data = copy.to(device, non_blocking=True, copy=True)
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # whoever reads them does so on another stream
        except BaseException:  # no room for all of them
            parked.leave()
            raise
        return replace(parked.lm, name=name)

    def forget(self, lm: FrozenLM) -> None:
        """Keep a model no longer."""
        self._parked.pop(lm.fingerprint, None)
        _give_back()

    def _copied(self, lm: FrozenLM) -> _Parked | None:
        need = sum(map(_held, _tensors(lm.model)))
        most = self.most_bytes if self.most_bytes is not None else int(SHARE * (free_bytes(HOST) + self.bytes))
        if need > most:
            return None
        while self.bytes + need > most:
            self._parked.popitem(last=False)
        _give_back()
        try:
            return _Parked(lm, [_copy(tensor) for tensor in _tensors(lm.model)])
        except RuntimeError as error:  # there is less to pin than there is free
            log.warning("the weights of %s could not be kept on the host: %s", lm.name, first_line(error))
            return None


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Weights and buffers, each once, in an order that stays."""
    yield from model.parameters()
    yield from model.buffers()


def _held(tensor: Tensor) -> int:
    """Bytes that a copy takes: torch pins blocks whose sizes are powers of two."""
    return 1 << (tensor.nbytes - 1).bit_length() if tensor.nbytes else 0


def _give_back() -> None:
    """To the system, what torch would keep of copies that were forgotten."""
    if torch.cuda.is_available():
        torch.accelerator.empty_host_cache()


def _copy(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device=HOST, pin_memory=tensor.is_cuda).copy_(tensor)
