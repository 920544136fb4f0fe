"""Does a latent cross better where its soft tokens enter every layer of the receiver, and not the first alone?

Keys and values of a deep prefix are made by the receiver's own layers here, of hidden states that the head adds to at
the soft tokens' places: before each layer, a vector of its own for each slot (prefix tuning, Li & Liang 2021,
arXiv:2101.00190; deep prompts, Liu et al. 2022, arXiv:2110.07602). ``bounded`` additions have the embeddings' RMS times
one learned number for each layer; both kinds begin at zero, as the base does without them. Measured on the world with
the recipe of ``benchmarks.ablation``.
"""

import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch
from weakref import WeakSet

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from benchmarks.ablation import BASE, WORLD, Warm, run_once
from benchmarks.record import record
from latentwire.bridge import checkpoint, engine, prompt
from latentwire.bridge.config import Head
from latentwire.bridge.heads import SoftTokenHead
from latentwire.bridge.models import FrozenLM
from latentwire.bridge.prompt import TEXT, Batch
from latentwire.training import objectives


class DeepHead(SoftTokenHead):
    """Soft tokens, and beside each of them what is added to it before every layer of the receiver."""

    bounded = True

    def __init__(self, latent_dim: int, head: Head) -> None:
        super().__init__(latent_dim, head)
        self.width = head.receiver.width
        hidden = head.hidden_dim or 2 * self.width
        self.deep = nn.ModuleList(nn.Linear(hidden, self.width) for _ in range(head.receiver.layers))
        self.scale = nn.Parameter(torch.zeros(head.receiver.layers)) if self.bounded else None
        if not self.bounded:
            for parameter in self.deep.parameters():
                nn.init.zeros_(parameter)

    def forward(self, latent: Tensor) -> Tensor:
        inner = self.widen[1](self.widen[0](latent))
        added = [layer(inner) for layer in self.deep]
        if self.scale is not None:
            added = [
                F.rms_norm(one, (self.width,)) * self.embedding_rms * scale
                for one, scale in zip(added, self.scale, strict=True)
            ]
        return torch.cat([super().forward(latent), *added], dim=-1)


class Unbounded(DeepHead):
    """What is added may have any norm."""

    bounded = False


HEADS = {"base": SoftTokenHead, "unbounded": Unbounded, "bounded": DeepHead}


class Deep:
    """Puts the first width of soft tokens in place, as ever, and the others before the layers of the pass to come."""

    def __init__(self) -> None:
        self.hooked: WeakSet[nn.Module] = WeakSet()
        self.added: Tensor | None = None

    def embed(self, lm: FrozenLM, batch: Batch, soft_tokens: Tensor | None) -> Tensor:
        """Instead of ``bridge.prompt.embed``."""
        if lm.model not in self.hooked:
            self.hooked.add(lm.model)
            for number, layer in enumerate(lm.model.model.layers, start=1):
                layer.register_forward_pre_hook(partial(self._add, number), with_kwargs=True)
        self.added = None
        if soft_tokens is None or soft_tokens.shape[-1] == lm.width:  # those of the base
            return prompt.embed(lm, batch, soft_tokens)
        at = batch.slots.clamp(min=0)[..., None].expand(-1, -1, soft_tokens.shape[-1])
        self.added = soft_tokens.gather(1, at) * (batch.slots != TEXT)[..., None]
        return prompt.embed(lm, batch, soft_tokens[..., : lm.width])

    def _add(
        self, number: int, _layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        states, *others = args
        if self.added is None or states.shape[:2] != self.added.shape[:2]:  # a later step of the same generation
            return args, kwargs
        width = states.shape[-1]
        return (states + self.added[..., number * width : (number + 1) * width], *others), kwargs


@contextmanager
def heads(kind: type[SoftTokenHead]) -> Iterator[None]:
    """Bridges that are made, trained and asked inside have heads of this kind."""
    align: Callable[..., Tensor] = objectives.alignment_loss
    changes: dict[tuple[Any, str], Any] = {
        (checkpoint, "SoftTokenHead"): kind,
        (engine, "embed"): Deep().embed,
        (objectives, "alignment_loss"): lambda soft, words, *rest: align(soft[..., : words.shape[-1]], words, *rest),
    }
    with ExitStack() as stack:
        for (module, name), new in changes.items():
            stack.enter_context(patch.object(module, name, new))
        yield


def main(seeds: int = 2, limit: int = 400) -> None:
    """Train and measure every variant with SEEDS seeds on LIMIT held-out examples."""
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in HEADS}
    for seed in range(seeds):
        for name in HEADS:
            with heads(HEADS[name]):
                found[name].append(run_once({**WORLD, **BASE, "seed": seed}, limit, Warm()))
            means = {name: statistics.fmean(one["value"] for one in made) for name, made in found.items() if made}
            figures = {"metric": "em", "examples": limit, "max_steps": WORLD["max_steps"], "mean": means, "runs": found}
            record("deep", f"python -m benchmarks.deep --seeds {seeds} --limit {limit}", figures)


if __name__ == "__main__":
    typer.run(main)
