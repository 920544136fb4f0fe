"""Run an evaluation: every condition on the same examples, as one JSON document."""

import platform
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from latentwire.bridge import engine
from latentwire.bridge.evaluation.conditions import CONDITIONS, TRAINED, Condition, soft_tokens
from latentwire.bridge.evaluation.context import EvaluationContext, Reading
from latentwire.bridge.evaluation.gated import gated
from latentwire.bridge.evaluation.leaks import check_answers, check_inputs, looked_at
from latentwire.bridge.evaluation.metrics import metrics_of
from latentwire.bridge.evaluation.slots import pictures
from latentwire.bridge.evaluation.statistics import compared, interval, ratio, ratio_interval, resampled, share_of_gain
from latentwire.bridge.reader import text_ids
from latentwire.bridge.sampling import SamplingParams

Progress = Callable[[str | None, int, int], None]
"""Called with (condition, examples done, examples in all); the condition is None while the sender reads for all."""

BATCH_ROWS = 32
TIMED_EXAMPLES = 12
VERSIONS = ("latentwire", "torch", "transformers", "numpy", "scipy")
TEXTS = ("direct", "direct_tuned")
"""Conditions in which the receiver reads the source: the headline holds the bridge against the better of them."""


@dataclass(frozen=True)
class _Read:
    """What one condition gives its model: for every example, and again for those timed, one by one, in seconds."""

    context: EvaluationContext
    condition: Condition
    readings: list[Any]
    timed: list[tuple[Any, float]]


def measure(
    context: EvaluationContext,
    *,
    conditions: Collection[str] | None = None,
    trained: Mapping[str, EvaluationContext] | None = None,
    progress: Progress = lambda *_: None,
    partial: Callable[[dict[str, Any]], None] = lambda _: None,
    keep_examples: bool = False,
    command: str | None = None,
) -> dict[str, Any]:
    """Measure conditions on the context's examples.

    Every pass of the sender comes before any of the receiver, for models that must take turns in memory.

    Args:
        context: The bridge measured, its models and the examples.
        conditions: Names out of ``CONDITIONS``; None for all of them.
        trained: What the conditions in ``TRAINED`` run on, on the same examples.
        progress: Told how far each condition is.
        partial: Given the report as far as it goes, after each condition.
        keep_examples: Keep every example, with what was said to it under each condition.
        command: What a user types to have the same report again.

    Returns:
        The report:
        ``checkpoint``, ``bridge_id``, ``task``, ``n`` and ``dropped`` (test examples left out, by why);
        ``left_out``: why a condition that was asked for cannot be had, by its name;
        ``conditions``: metric, value, 95 % interval (null below ``statistics.FEWEST`` examples), token F1 of a
        generation, median milliseconds to first token for one request alone, everything that condition needs included
        (null where no model speaks);
        ``bytes`` and ``source_`` and ``receiver_tokens_per_soft_token`` (means over the examples), ``truncated``
        (sources the bridge read only the start of);
        ``headline``: ``ratio`` of the bridge to the better of ``TEXTS`` with its interval, which one that is
        (``against``), and which of them are ``missing``; null without the bridge or both of them;
        ``comparisons``: ``statistics.compared`` to the bridge;
        ``content_share``: the part of the bridge's gain over ``none`` that another example's latent does not give, 0 to
        1, null where there is no gain, no other source or one of the three was not
        asked for; ``sender_share``: the same against the bridge of an untrained sender; each with its interval;
        ``gate``: what the checkpoint's gate reaches on these examples (``gated.gated``), null without one;
        ``checks``: on how many examples ``leaks`` looked; ``about``: versions, models, data and recipe;
        ``examples``, where they are kept, and ``slots.pictures`` of the bridge's latents.

    Raises:
        LeakFound: An answer reaches the receiver around the bridge.
    """
    asked, left_out = _asked(context, CONDITIONS if conditions is None else conditions, trained or {})
    read = _read_all(asked, progress)
    # While the sender is still there; the others ask a receiver.
    by_sender = {name: _measure(name, r, progress) for name, r in read.items() if r.context.receiver is context.sender}
    pictured = pictures(context) if keep_examples and "bridge" in read else {}
    measured: dict[str, dict[str, Any]] = {}
    scores: dict[str, list[float]] = {}
    examples: list[dict[str, Any]] = [
        {
            "source": e.source,
            "prompt": e.prompt,
            "wanted": e.answer,
            **({"also": list(e.also)} if e.also else {}),
            "said": {},
            "scores": {},
        }
        for e in context.examples
    ]
    report: dict[str, Any] = {
        "checkpoint": context.checkpoint,
        "bridge_id": context.bridge_id,
        "task": context.task.name,
        "n": len(context.examples),
        "dropped": dict(context.dropped),
        "left_out": left_out,
        "conditions": measured,
        **_sizes(context),
        **_summary(scores),
        "gate": None,
        "checks": {},
        "about": _about(context, command),
    }
    for name, readings in read.items():
        measured[name], said, scores[name] = by_sender.get(name) or _measure(name, readings, progress)
        if name == "bridge":
            looked = looked_at(len(said))
            report["checks"] = {
                "inputs": check_inputs(context, looked, readings.readings[:: looked.step]),
                "answers": check_answers(context, readings.condition, readings.readings, said),
            }
        for example, text, score in zip(examples, said, scores[name], strict=True):
            example["said"][name], example["scores"][name] = text, score
        report |= _summary(scores)
        partial({**report, "conditions": dict(measured)})
    if context.gate and {"bridge", "direct"} <= set(scores):
        report["gate"] = gated(context, context.gate, read["bridge"].readings, scores["bridge"], scores["direct"])
    return {**report, "examples": examples, **pictured} if keep_examples else report


def _summary(scores: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """What the scores say together."""
    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in scores.items()}
    made: dict[str, Any] = {"headline": None, "comparisons": compared(scores, "bridge")}
    texts = [name for name in TEXTS if name in scores]
    if "bridge" in scores and texts:
        best = max(texts, key=lambda name: float(arrays[name].mean()))
        value = float(ratio(arrays["bridge"], arrays[best]))
        low, high = ratio_interval(arrays["bridge"], arrays[best]) or (None, None)
        missing = [name for name in TEXTS if name not in scores]
        known = None if np.isnan(value) else value
        made["headline"] = {"against": best, "ratio": known, "low": low, "high": high, "missing": missing}
    for share, rival in (("content_share", "mismatched"), ("sender_share", "random_sender")):
        made[share], made[f"{share}_interval"] = None, None
        if {"bridge", "none", rival} <= set(scores):
            of = (arrays["bridge"], arrays["none"], arrays[rival])
            value = float(share_of_gain(*of))
            if not np.isnan(value):
                found = resampled(of, share_of_gain)
                made[share], made[f"{share}_interval"] = value, None if found is None else list(found)
    return made


def _about(context: EvaluationContext, command: str | None) -> dict[str, Any]:
    """What it takes to have the same report again, and to know what it is of."""
    config = context.bridge.config
    return {
        "command": command,
        "versions": {"python": platform.python_version(), **{package: version(package) for package in VERSIONS}},
        "data_sha256": context.task.data_sha256,
        "dtype": context.dtype,
        "sender": {"name": config.sender.name, "fingerprint": str(config.sender.fingerprint)},
        "receiver": {
            "name": context.receiver_name,
            "fingerprint": str(config.heads[context.receiver_name].receiver.fingerprint),
        },
        "encoder": {**asdict(config.encoder), "lora": config.encoder.lora.rank if config.encoder.lora else None},
        "provenance": asdict(config.provenance),
    }


def _asked(
    context: EvaluationContext, wanted: Collection[str], trained: Mapping[str, EvaluationContext]
) -> tuple[list[tuple[EvaluationContext, Condition]], dict[str, str]]:
    """The conditions that can be had, each with what it runs on, and why the others cannot."""
    asked = [(condition.asked(context), condition) for name, condition in CONDITIONS.items() if name in wanted]
    asked += [(control, TRAINED[name]) for name, control in trained.items()]
    whys = {condition.name: condition.missing(made) for made, condition in asked}
    had = [(made, condition) for made, condition in asked if whys[condition.name] is None]
    return had, {name: why for name, why in whys.items() if why is not None}


def _read_all(asked: Sequence[tuple[EvaluationContext, Condition]], progress: Progress) -> dict[str, _Read]:
    read: dict[str, _Read] = {}
    for made, condition in asked:
        count = len(made.examples)
        readings: list[Any] = []
        for chosen in _batches(made):
            readings += condition.read(made, chosen)
            progress(None, len(read) * count + len(readings), len(asked) * count)
        timed = [_timed_reading(made, condition, i) for i in range(min(TIMED_EXAMPLES, count))]
        read[condition.name] = _Read(made, condition, readings, timed if condition.speaks else [])
    return read


def _batches(context: EvaluationContext) -> Iterator[range]:
    rows, count = context.lender.batch_rows or BATCH_ROWS, len(context.examples)
    return (range(start, min(start + rows, count)) for start in range(0, count, rows))


def _measure(name: str, read: _Read, progress: Progress) -> tuple[dict[str, Any], list[str], list[float]]:
    context, texts = read.context, []
    for chosen in _batches(context):
        texts += read.condition.answer(context, chosen, read.readings[chosen.start : chosen.stop])
        progress(name, len(texts), len(context.examples))
    right = [example.right for example in context.examples]
    metric, *others = metrics_of(context.task.kind)
    scores = metric.scores(texts, right)
    low, high = interval(scores) or (None, None)
    row = {
        "metric": metric.name,
        "value": statistics.fmean(scores),
        "low": low,
        "high": high,
        "ttft_ms": _first_token_ms(context, read.timed) if read.timed else None,
        **{other.name: statistics.fmean(other.scores(texts, right)) for other in others},
    }
    return row, texts, scores


def _first_token_ms(context: EvaluationContext, timed: Sequence[tuple[Reading, float]]) -> float:
    """Median over single requests, from the source in hand to the first token; one token on every side."""
    seconds = [took + _first_token_seconds(context, i, reading) for i, (reading, took) in enumerate(timed)]
    return statistics.median(seconds[1:] or seconds) * 1000  # the first one warms up


def _first_token_seconds(context: EvaluationContext, example: int, reading: Reading) -> float:
    with _timing(context) as took:
        row, params = context.rows([example], [reading], [None]), [SamplingParams(max_tokens=1)]
        with context.lender.lend(context.receiver) as receiver:
            engine.generate(receiver, row, soft_tokens(context, receiver, [reading]), params)
    return took()


def _timed_reading(context: EvaluationContext, condition: Condition, example: int) -> tuple[Reading, float]:
    with _timing(context) as took:
        (reading,) = condition.read(context, [example])
    return reading, took()


@contextmanager
def _timing(context: EvaluationContext) -> Iterator[Callable[[], float]]:
    """Seconds that the block takes, without those it waits for a model to be lent."""
    started, waited = time.perf_counter(), context.lender.waited_seconds
    ended: list[float] = []
    yield lambda: ended[0]
    ended.append(time.perf_counter() - started - (context.lender.waited_seconds - waited))


def _sizes(context: EvaluationContext) -> dict[str, Any]:
    everything = range(len(context.examples))
    sources = context.sources(everything)
    slots = [len(latent) for latent in context.recall(everything)]
    read = [len(text_ids(context.receiver, example.source)) for example in context.examples]
    with context.lender.lend(context.receiver) as receiver:
        kv_bytes = statistics.fmean(receiver.kv_bytes(n) for n in read)
    return {
        "bytes": {
            "latent": statistics.fmean(context.message_bytes(k) for k in slots),
            "source": statistics.fmean(len(example.source.encode()) for example in context.examples),
            "receiver_kv": kv_bytes,
        },
        "source_tokens_per_soft_token": sum(len(source.ids) for source in sources) / sum(slots),
        "receiver_tokens_per_soft_token": sum(read) / sum(slots),
        "truncated": sum(source.full_length > len(source.ids) for source in sources),
    }
