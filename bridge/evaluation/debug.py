"""What a receiver really says: the first generations of an evaluation, and how sure of its first token it was."""

from collections.abc import Iterator, Sequence

import torch

from latentwire.bridge.detokenise import decode
from latentwire.bridge.evaluation.conditions import predict, soft_tokens
from latentwire.bridge.evaluation.context import PredictionContext, Reading
from latentwire.bridge.prompt import collate, embed


def shown(context: PredictionContext, readings: Sequence[Reading], first: int, topk: int) -> Iterator[str]:
    """The first answers, then the ``topk`` likeliest first tokens of as many examples; 0 leaves either out."""
    read = readings[: max(first, 1)]
    if first:
        for i, text in enumerate(predict(context, range(len(read)), read)):
            yield f"example {i + 1}: wanted {context.examples[i].answer!r}, said {text!r}"  # blanks matter
    if topk:
        yield from first_tokens(context, read, topk)


@torch.inference_mode()
def first_tokens(context: PredictionContext, readings: Sequence[Reading], topk: int) -> Iterator[str]:
    """Lines with the ``topk`` likeliest first answer tokens of the first examples, with probabilities."""
    rows = context.rows(range(len(readings)), readings, [None] * len(readings))
    with context.lender.lend(context.receiver) as receiver:
        batch = collate(rows, side="left").to(receiver.device)
        logits = receiver.model(
            inputs_embeds=embed(receiver, batch, soft_tokens(context, receiver, readings)),
            attention_mask=batch.mask.long(),
            position_ids=batch.positions,
            use_cache=False,
            logits_to_keep=1,
        ).logits[:, -1]
    best = logits.float().softmax(dim=-1).topk(min(topk, logits.shape[-1]), dim=-1)
    for i, (tokens, shares) in enumerate(zip(best.indices.tolist(), best.values.tolist(), strict=True)):
        likeliest = zip(tokens, shares, strict=True)
        words = (f"{decode(context.receiver, [token], special=True)!r} {share:.3f}" for token, share in likeliest)
        yield f"example {i + 1}: first token {', '.join(words)}"
