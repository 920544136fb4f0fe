"""What a receiver says at the columns of the answers, without ever holding all of its logits.

At 32 rows of 512 tokens over a vocabulary of 128,000, logits alone take 8 GB in float32, and a cross-entropy with its
gradient several times that. So the last layer's states are kept instead, and logits are made of ``COLUMNS`` columns at
a time. Since the receiver is frozen, the gradient of a column's loss in its own state is all that the backward pass
needs: it is taken at once, while the column's logits are there, and nothing is computed twice.

Source: the fused linear cross-entropy of Liger Kernel, arXiv:2410.10989 §3.2, here for any loss of single columns and
any output layer.

Dimensions used in this file:
    B batch    A answer columns    N those that foretell another, A - 1    P columns made at a time    D receiver width
    V vocabulary    K slots
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from latentwire.bridge.engine import answer_columns, cross_entropy, following, inputs_of
from latentwire.bridge.models import FrozenLM
from latentwire.bridge.prompt import Batch

COLUMNS = 32  # of all rows: enough to fill a device with 8 rows, and 0.5 GB of float32 logits with 32 rows × 128,000

Output = Callable[[Float[Tensor, "B P D"]], Float[Tensor, "B P V"]]
Loss = Callable[[Float[Tensor, "B P V"], slice], Float[Tensor, "B P"]]
"""Losses of some columns, each of its own logits alone, from those logits and which columns they are."""


@dataclass(frozen=True)
class Said:
    """What a receiver says at the columns of the answers.

    Attributes:
        states: Of its last layer, after the final norm; differentiable.
        labels: Unshifted.
        output: Logits of states.
    """

    states: Float[Tensor, "B A D"]
    labels: Int[Tensor, "B A"]
    output: Output

    def last(self, columns: int) -> "Said":
        """The same at the last columns only."""
        return replace(self, states=self.states[:, -columns:], labels=self.labels[:, -columns:])

    def each(self, loss: Loss) -> Float[Tensor, "B A"]:
        """A loss of every column, differentiable in the states."""
        found: Tensor = _ByColumns.apply(self.states, self.output, loss)  # type: ignore[no-untyped-call]
        return found

    @property
    def logits(self) -> Float[Tensor, "B A V"]:
        """Of all columns at once: for a short answer only."""
        return self.output(self.states)

    @cached_property
    def losses(self) -> Float[Tensor, "B N"]:
        """``engine.token_losses`` of the logits."""
        wanted = following(self.labels)
        return self.each(lambda logits, at: cross_entropy(logits, wanted[:, at]))[:, :-1]

    @torch.no_grad()
    def likeliest(self) -> Int[Tensor, "B N"]:
        """The likeliest token of each column that foretells another."""
        parts = torch.split(self.states[:, :-1], COLUMNS, dim=1)
        return torch.cat([self.output(part).argmax(dim=-1) for part in parts], dim=1)


class _ByColumns(torch.autograd.Function):
    """Losses column by column; the gradient of each in its own state is made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, output: Output, loss: Loss) -> Tensor:
        losses: list[Tensor] = []
        slopes: list[Tensor] = []
        for start in range(0, states.shape[1], COLUMNS):
            at = slice(start, start + COLUMNS)
            part = states[:, at].detach().requires_grad_(ctx.needs_input_grad[0])
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                found = loss(output(part), at)
                losses.append(found.detach())
                if ctx.needs_input_grad[0]:
                    torch.autograd.backward(found.sum())
                    slopes.append(cast(Tensor, part.grad))
            del found  # and its logits, before the next are made
        if slopes:
            ctx.save_for_backward(torch.cat(slopes, dim=1))
        return torch.cat(losses, dim=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (slopes,), (gradient,) = ctx.saved_tensors, gradients
        return (slopes * gradient[..., None]).to(slopes.dtype), None, None


def say(receiver: FrozenLM, batch: Batch, soft_tokens: Float[Tensor, "B K D"] | None, *, multiple: int = 1) -> Said:
    """``engine.answer_logits`` without the logits: what the receiver says to a batch, at the answers' columns."""
    keep = answer_columns(batch, multiple)
    outputs = cast(Any, receiver.model).base_model(**inputs_of(receiver, batch, soft_tokens))
    states = outputs.last_hidden_state[:, -keep:]
    outputs.last_hidden_state = None
    return Said(states, batch.labels[:, -keep:], _output_of(receiver, outputs))


def _output_of(receiver: FrozenLM, outputs: Any) -> Output:
    """What the receiver makes of its last layer's states: its own forward pass, with the states in place of its base.

    So whatever a family does there is done, be it a bias, a scale or a soft cap.
    """
    model = cast(Any, copy.copy(receiver.model))  # shares all weights and modules
    for name in ("forward", "_old_forward"):  # put there by the library for a model that is spread over devices
        vars(model).pop(name, None)
    model._modules = {**model._modules, model.base_model_prefix: (given := _Given(outputs))}

    def output(states: Tensor) -> Tensor:
        given.states = states
        logits: Tensor = model.forward(inputs_embeds=states, use_cache=False).logits
        given.states = None
        return logits

    return output


class _Given(nn.Module):
    """Stands for a model's base, and gives out the states it was given."""

    def __init__(self, outputs: Any) -> None:
        super().__init__()
        self.outputs, self.states = outputs, cast(Tensor | None, None)

    @property
    def decoder(self) -> "_Given":
        """OPT calls its base's decoder by its name."""
        return self

    def forward(self, *_: Any, **__: Any) -> Any:
        """What the base gave, with these states."""
        made = copy.copy(self.outputs)
        made.last_hidden_state = self.states
        return made
