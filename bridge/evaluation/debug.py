"""What a receiver really says: the first generations of an evaluation, and how sure of its first token it was."""

from collections.abc import Iterator, Sequence

import torch

from latentwire.bridge.detokenise import decode
from latentwire.bridge.evaluation.conditions import PredictionContext, Reading, predict, soft_tokens
from latentwire.bridge.prompt import collate, embed


def shown(context: PredictionContext, readings: Sequence[Reading], first: int, topk: int) -> Iterator[str]:
    """The first answers, then the ``topk`` likeliest first tokens of as many examples; 0 leaves either out."""
    if first:
        yield from generations(context, readings, first)
    if topk:
        yield from first_tokens(context, readings, max(first, 1), topk)


def generations(context: PredictionContext, readings: Sequence[Reading], count: int) -> Iterator[str]:
    """Lines with the wanted and the given answer of the first ``count`` examples, as ``repr``: blanks matter."""
    chosen = range(min(count, len(readings)))
    texts = predict(context, chosen, readings[: len(chosen)])
    for i, text in zip(chosen, texts, strict=True):
        yield f"example {i + 1}: wanted {context.examples[i].answer!r}, said {text!r}"


@torch.inference_mode()
def first_tokens(context: PredictionContext, readings: Sequence[Reading], count: int, topk: int) -> Iterator[str]:
    """Lines with the ``topk`` likeliest first answer tokens of the first ``count`` examples, with probabilities."""
    chosen = range(min(count, len(readings)))
    rows = context.rows(chosen, readings[: len(chosen)], [None] * len(chosen))
    with context.lender.lend(context.receiver) as receiver:
        batch = collate(rows, side="left").to(receiver.device)
        logits = receiver.model(
            inputs_embeds=embed(receiver, batch, soft_tokens(context, receiver, readings[: len(chosen)])),
            attention_mask=batch.mask.long(),
            position_ids=batch.positions,
            use_cache=False,
            logits_to_keep=1,
        ).logits[:, -1]
    best = logits.float().softmax(dim=-1).topk(min(topk, logits.shape[-1]), dim=-1)
    for i, tokens, shares in zip(chosen, best.indices.tolist(), best.values.tolist(), strict=True):
        shown = (
            f"{decode(context.receiver, [token], special=True)!r} {share:.3f}"
            for token, share in zip(tokens, shares, strict=True)
        )
        yield f"example {i + 1}: first token {', '.join(shown)}"
