"""How long an answer takes from a latent, and from its rivals: fair, warm, and in turns.

Every side writes the same number of tokens, greedily, with the same loop; an end does not end it. Sides take turns
within each repeat, so that whatever else the machine does hits all of them, on the same examples.

| side | what is counted |
|---|---|
| ``bridge`` | the sender reads the source; the latent crosses the wire; head and receiver |
| ``stored`` | head and receiver: the latent is at hand |
| ``direct`` | the receiver reads source and prompt |
| ``prefix_cached`` | keys and values of all up to the source's end are at hand: they are copied, the rest is read |
| ``relay`` | the sender writes about the source, the receiver reads that |
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from latentwire.bridge.errors import InvalidRequest
from latentwire.bridge.evaluation.conditions import soft_tokens
from latentwire.bridge.evaluation.context import EvaluationContext, Reading, check_room
from latentwire.bridge.prompt import IGNORE, LATENT, TEXT, Batch, Row, collate, compose
from latentwire.bridge.reader import text_ids
from latentwire.bridge.scoring import WarmRows, is_copied


@dataclass(frozen=True)
class Timed:
    """What was written for each row (token ids), and the seconds to the first token and to the last."""

    ids: list[list[int]]
    first_seconds: float
    total_seconds: float


Side = Callable[[EvaluationContext, Sequence[int], int], Callable[[], Timed]]
"""Makes ready all that is at hand before the question comes; what it gives back answers, and times that."""


def latency(
    context: EvaluationContext,
    *,
    batch_sizes: Sequence[int] = (1, 8),
    tokens: int = 16,
    repeats: int = 20,
    progress: Callable[[str | None, int, int], object] = lambda side, done, total: None,
) -> dict[str, Any]:
    """Measure every side of ``SIDES``, and report it as plain JSON.

    Args:
        context: The bridge, its models and the examples; each batch takes the next ones.
        batch_sizes: Rows that are answered at once.
        tokens: What every side writes for every row.
        repeats: Measurements of each side at each batch size; one before them is not counted.
        progress: Told the side, and how many of all measurements are done.

    Returns:
        ``tokens``, ``repeats``, ``device``, ``threads``; ``receiver_tokens`` and ``soft_tokens``: means over the
        examples measured, of the source; ``batches``: by batch size, then side, ``first_ms`` and ``total_ms`` with
        ``p50`` and ``p95``; ``missing``: sides that were left out, and why.

    Raises:
        InvalidRequest: A number is below 1, or the receiver has no room for the tokens.
    """
    for name, value in (("tokens", tokens), ("repeats", repeats), ("batch_sizes", min(batch_sizes, default=0))):
        if value < 1:
            raise InvalidRequest(f"{name} is {value}; expected 1 or more", param=name)
    task = replace(context.task, max_answer_tokens=tokens)
    check_room(task, context.receiver)
    context = replace(context, task=task)
    with context.lender.lend(context.receiver) as receiver:
        device, copied = receiver.device, is_copied(receiver)
    sides = {name: side for name, side in SIDES.items() if copied or name != "prefix_cached"}
    seen: set[int] = set()
    batches: dict[str, dict[str, Any]] = {}
    total, done = len(batch_sizes) * (repeats + 1) * len(sides), 0
    for size in batch_sizes:
        times: dict[str, list[Timed]] = {name: [] for name in sides}
        for repeat in range(repeats + 1):
            chosen = [(repeat * size + row) % len(context.examples) for row in range(size)]
            seen |= set(chosen)
            turn = repeat % len(sides)  # nobody is always the one after the slowest
            for name in [*sides][turn:] + [*sides][:turn]:
                times[name].append(sides[name](context, chosen, tokens)())
                done += 1
                progress(name, done, total)
        batches[str(size)] = {
            name: {
                "first_ms": _percentiles([timed.first_seconds for timed in measured[1:]]),
                "total_ms": _percentiles([timed.total_seconds for timed in measured[1:]]),
            }
            for name, measured in times.items()
        }
    examples = sorted(seen)
    return {
        "tokens": tokens,
        "repeats": repeats,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "receiver_tokens": float(
            np.mean([len(text_ids(context.receiver, context.examples[i].source)) for i in examples])
        ),
        "soft_tokens": float(np.mean([len(latent) for latent in context.recall(examples)])),
        "batches": batches,
        "missing": {} if copied else {"prefix_cached": "what this receiver has read cannot be copied"},
    }


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    p50, p95 = np.percentile(np.asarray(seconds) * 1000, [50, 95])
    return {"p50": round(float(p50), 3), "p95": round(float(p95), 3)}


def _bridge(context: EvaluationContext, chosen: Sequence[int], tokens: int) -> Callable[[], Timed]:
    return lambda: _answered(context, chosen, tokens, lambda: context.latents(chosen))


def _stored(context: EvaluationContext, chosen: Sequence[int], tokens: int) -> Callable[[], Timed]:
    latents = context.recall(chosen)
    return lambda: _answered(context, chosen, tokens, lambda: latents)


def _direct(context: EvaluationContext, chosen: Sequence[int], tokens: int) -> Callable[[], Timed]:
    sources = [context.examples[i].source for i in chosen]
    return lambda: _answered(context, chosen, tokens, lambda: sources)


def _relay(context: EvaluationContext, chosen: Sequence[int], tokens: int) -> Callable[[], Timed]:
    return lambda: _answered(context, chosen, tokens, lambda: context.relay(chosen))


def _prefix_cached(context: EvaluationContext, chosen: Sequence[int], tokens: int) -> Callable[[], Timed]:
    sources = [context.examples[i].source for i in chosen]

    def rows() -> list[Row]:
        return context.rows(chosen, sources, [None] * len(chosen))

    ready = rows()
    heads = [_head(context, i, row) for i, row in zip(chosen, ready, strict=True)]
    # The rests are of one length, as no padding may stand within a row: some begin a little before their source's end.
    rest = max(len(row) - head for row, head in zip(ready, heads, strict=True))
    rest = max(min(rest, min(map(len, ready)) - 1), 1)
    with context.lender.lend(context.receiver) as receiver:
        warm = WarmRows.none(receiver, len(chosen))
        if rest < max(map(len, ready)):
            warm.read(collate([row[:-rest] for row in ready], side="left").to(receiver.device))

    def run() -> Timed:
        started = time.perf_counter()
        asked = rows()
        with context.lender.lend(context.receiver):
            return _written(warm.copied(range(len(chosen))), [row[-rest:] for row in asked], None, tokens, started)

    return run


SIDES: dict[str, Side] = {
    "bridge": _bridge,
    "stored": _stored,
    "direct": _direct,
    "prefix_cached": _prefix_cached,
    "relay": _relay,
}


def _head(context: EvaluationContext, example: int, row: Row) -> int:
    """Tokens of a row that end with its source: those it has in common with the same row without what follows."""
    given = context.examples[example]
    before = given.prompt.partition(LATENT)[0] + LATENT
    cut = compose(context.receiver, context.layout, before, latent=given.source)
    pairs = zip(row.ids, cut.ids, strict=False)
    return next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(row), len(cut)))


def _answered(
    context: EvaluationContext, chosen: Sequence[int], tokens: int, read: Callable[[], Sequence[Reading]]
) -> Timed:
    started = time.perf_counter()
    readings = read()
    rows = context.rows(chosen, readings, [None] * len(chosen))
    with context.lender.lend(context.receiver) as receiver:
        soft = soft_tokens(context, receiver, readings)
        return _written(WarmRows.none(receiver, len(rows)), rows, soft, tokens, started)


@torch.inference_mode()
def _written(warm: WarmRows, rows: Sequence[Row], soft: Tensor | None, tokens: int, started: float) -> Timed:
    """Read rows, and write so many tokens after each, the likeliest one after the other."""
    device = warm.receiver.device
    chosen = warm.read(collate(rows, side="left").to(device), soft)[:, -1].argmax(dim=-1)
    written = [chosen]
    chosen.tolist()  # wait for the device: this is the moment a user sees a token
    first_seconds = time.perf_counter() - started
    for _ in range(tokens - 1):
        written.append(warm.read(_column(written[-1]))[:, -1].argmax(dim=-1))
    ids = torch.stack(written, dim=1).tolist()
    return Timed(ids, first_seconds, time.perf_counter() - started)


def _column(ids: Int[Tensor, " B"]) -> Batch:
    """A batch of one more token for each row."""
    column = ids[:, None]
    return Batch(
        column,
        torch.full_like(column, TEXT),
        torch.ones_like(column, dtype=torch.bool),
        torch.zeros_like(column),
        torch.full_like(column, IGNORE),
    )
