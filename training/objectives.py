"""What a bridge is trained for. Small pure functions; each row's loss is its own, whatever its batch.

Dimensions used in this file:
    B batch    A answer columns    V vocabulary
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridge.engine import token_losses
from bridge.prompt import IGNORE


def answer_loss(
    logits: Float[Tensor, "B A V"], labels: Int[Tensor, "B A"], *, first_token_weight: float = 1.0
) -> Float[Tensor, " B"]:
    """Cross-entropy of each row's answer in nats per token, its first token weighted.

    The first token is where a bridge is needed most: later ones lean on the answer so far, and a bridge that
    fails there leaves the receiver guessing. 8 to 11 worked in one published system, 12 and above collapsed.
    A row without labels has loss 0.

    Args:
        logits: From ``engine.answer_logits``.
        labels: Unshifted; ``token_losses`` shifts them.
        first_token_weight: The other tokens have 1.
    """
    losses = token_losses(logits, labels)
    weights = (labels[:, 1:] != IGNORE).to(losses.dtype)
    first = (weights.cumsum(dim=1) == 1) & (weights > 0)
    weights = torch.where(first, first_token_weight, weights)
    return (losses * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-8)


def answers_right(logits: Float[Tensor, "B A V"], labels: Int[Tensor, "B A"]) -> Float[Tensor, " B"]:
    """1 for each row whose every labelled token is the likeliest one, else 0; a measure, not an objective."""
    wanted = labels[:, 1:]
    wrong = (logits[:, :-1].argmax(dim=-1) != wanted) & (wanted != IGNORE)
    return (~wrong.any(dim=1)).float()
