"""What latents look like from inside: which tokens of a source each slot reads, and how examples lie apart.

Dimensions used in this file:
    S sender tokens    N sender width (all layers read)    K slots    C latent width
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from latentwire.bridge.detokenise import decode
from latentwire.bridge.encoder import slots_of
from latentwire.bridge.evaluation.context import EvaluationContext
from latentwire.bridge.models import hidden_states, pad_sources

SHOWN_EXAMPLES = 4
SHOWN_TOKENS, SHOWN_SLOTS = 64, 24  # of a source, from its start: more cannot be read
TOKENS_AT_ONCE = 16_384  # of the copies of a source that are encoded together
FEWEST_POINTS = 3  # that span a plane


def pictures(context: EvaluationContext) -> dict[str, Any]:
    """What a report shows of the latents themselves.

    Returns:
        ``slots``: ``reads`` of the first examples; ``latents``: ``components`` of them all.
    """
    count = len(context.examples)
    return {
        "slots": [reads(context, example) for example in range(min(SHOWN_EXAMPLES, count))],
        "latents": components(context.recall(range(count))),
    }


@torch.inference_mode()
def reads(context: EvaluationContext, example: int) -> dict[str, Any]:
    """How far each slot of an example's latent depends on each token of its source, whatever kind the encoder is.

    The state of one token at a time is replaced by zeros. A slot's share of a token is the squared distance by which
    it moves, over the sum of those of all tokens shown. Gradients of a slot's norm would say nothing: it is fixed.

    Source: occlusion, Zeiler and Fergus 2013, arXiv:1311.2901 §4.2; of states instead of pixels: ours.

    Returns:
        ``example`` (its place), ``tokens`` (the first of S, as text), ``reads`` (slots × tokens, 0 to 1; all 0 for a
        slot that reads nothing), ``source_tokens`` (S) and ``slots`` (K).
    """
    config, encoder = context.bridge.config, context.bridge.encoder
    (source,) = context.sources([example])
    shown = min(SHOWN_TOKENS, len(source.ids))
    with context.lender.lend(context.sender) as sender:
        ids, mask = pad_sources(sender, [source])
        states = hidden_states(sender, ids, mask, config.layers, encoder.lora)
        whole = encoder(states, mask)[0]
        parts = []
        for part in torch.split(torch.arange(shown, device=states.device), max(1, TOKENS_AT_ONCE // len(source.ids))):
            changed = states.repeat(len(part), 1, 1)
            changed[part - part[0], part] = 0.0
            latents, _ = encoder(changed, mask.expand(len(part), -1))
            parts.append((latents - whole).float().square().sum(dim=-1))
    moved = torch.cat(parts).T[: min(SHOWN_SLOTS, slots_of(config.encoder, shown))].cpu().double().numpy()
    shares = moved / np.maximum(moved.sum(axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return {
        "example": example,
        "tokens": [decode(context.sender, [token], special=True) for token in source.ids[:shown]],
        "reads": shares.round(3).tolist(),
        "source_tokens": len(source.ids),
        "slots": whole.shape[1],
    }


def components(latents: Sequence[NDArray[np.float32]]) -> dict[str, Any] | None:
    """The plane in which the examples' latents, each the mean of its slots, lie furthest apart.

    Returns:
        ``pca``: two coordinates for each example; ``explained``: the share of the variance along each of the two.
        None where there is no such plane: below ``FEWEST_POINTS`` examples, or all are alike.
    """
    from sklearn.decomposition import PCA  # late: it takes a second

    means = np.stack([latent.mean(axis=0) for latent in latents]).astype(np.float64)
    if min(len(means), means.shape[1] + 1) < FEWEST_POINTS or np.ptp(means, axis=0).max() < 1e-6:
        return None
    pca = PCA(2, svd_solver="full")
    points = pca.fit_transform(means)
    return {"pca": points.round(4).tolist(), "explained": pca.explained_variance_ratio_.round(4).tolist()}
