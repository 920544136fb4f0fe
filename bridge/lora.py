"""Low-rank additions to the linear layers of a frozen sender, part of the encoder that was trained with them.

Dimensions used in this file:
    I inputs and O outputs of a linear layer    r rank
"""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from latentwire.bridge.config import LoraShape


class Lora(nn.Module):
    """Adds ``up(down(x))`` to the output of each adapted layer, while ``applied`` and in this thread alone.

    The sender is never changed: its weights are shared with every other bridge and use. ``up`` begins as zero, and so
    does what is added. There is no further scale: Muon moves the product by the same spectral norm at every rank.

    Source: Hu et al. 2021, arXiv:2106.09685 §4.1.
    """

    def __init__(self, shape: LoraShape) -> None:
        super().__init__()
        # A generator of its own: an encoder with one and one without begin with the same other weights.
        own = torch.Generator().manual_seed(torch.initial_seed())
        self.names = {_key(name): name for name in shape.layers}
        sizes = {_key(name): size for name, size in shape.layers.items()}
        self.down = nn.ParameterDict(
            {k: nn.Parameter(torch.randn(shape.rank, i, generator=own) * i**-0.5) for k, (_, i) in sizes.items()}
        )
        self.up = nn.ParameterDict({k: nn.Parameter(torch.zeros(o, shape.rank)) for k, (o, _) in sizes.items()})

    @contextmanager
    def applied(self, blocks: nn.ModuleList) -> Iterator[None]:
        """Passes of a model's ``blocks`` by this thread have the additions until the block ends, however it ends."""
        mine = threading.get_ident()

        def adding(key: str) -> Any:
            def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
                if threading.get_ident() != mine:
                    return output  # another thread's pass of the same model
                down, up = self.down[key], self.up[key]
                return output + F.linear(F.linear(args[0].to(down), down), up).to(output)

            return hook

        with ExitStack() as hooks:
            for key, name in self.names.items():
                hooks.callback(blocks.get_submodule(name).register_forward_hook(adding(key)).remove)
            yield


def lora_shape(blocks: nn.ModuleList, rank: int, highest: int) -> LoraShape | None:
    """LoRA of all linear layers up to block ``highest``, counted from 1; None without a rank or a layer."""
    found: dict[str, tuple[int, int]] = {}
    for name, layer in blocks.named_modules():
        if isinstance(layer, nn.Linear | Conv1D) and int(name.partition(".")[0]) < highest:
            size = layer.weight.shape if isinstance(layer, nn.Linear) else layer.weight.shape[::-1]
            found[name] = (size[0], size[1])
    return LoraShape(rank, found) if rank and found else None


def _key(name: str) -> str:
    """A parameter's name for a layer's, which holds dots."""
    return name.replace(".", "·")
