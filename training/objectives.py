"""What a bridge is trained for. Small pure functions; each row's loss is its own, whatever its batch.

Dimensions used in this file:
    B batch    K slots    D receiver width    A answer columns    V vocabulary
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
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


def alignment_loss(
    soft_tokens: Float[Tensor, "B K D"], words: Float[Tensor, "B K D"], covered: Bool[Tensor, "B K"]
) -> Float[Tensor, " B"]:
    """1 - cosine between each soft token and the words its window covers, averaged over a row's windows.

    A warm start. A frozen receiver answers to random soft tokens with noise, and the gradient that comes back
    through it is nearly useless: on the world task 200 steps of answering alone stay at the base rate, while 150
    steps of this first and 150 of answering reach 0.8. It needs no pass of the receiver. Source: ours.
    """
    far = 1 - F.cosine_similarity(soft_tokens, words, dim=-1)
    return (far * covered).sum(dim=1) / covered.sum(dim=1).clamp(min=1)


def answers_right(logits: Float[Tensor, "B A V"], labels: Int[Tensor, "B A"]) -> Float[Tensor, " B"]:
    """1 for each row whose every labelled token is the likeliest one, else 0; a measure, not an objective."""
    wanted = labels[:, 1:]
    wrong = (logits[:, :-1].argmax(dim=-1) != wanted) & (wanted != IGNORE)
    return (~wrong.any(dim=1)).float()
