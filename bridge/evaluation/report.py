"""Run an evaluation, and show it: one JSON document, one table."""

import json
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from latentwire.bridge import engine, wire
from latentwire.bridge.errors import InvalidRequest
from latentwire.bridge.evaluation.conditions import (
    CONDITIONS,
    Condition,
    EvaluationContext,
    Reading,
    meaning_of,
    predict,
    soft_tokens,
)
from latentwire.bridge.evaluation.metrics import METRICS, Metric, bootstrap, metrics_of
from latentwire.bridge.files import replace_file
from latentwire.bridge.reader import text_ids
from latentwire.bridge.sampling import SamplingParams

Progress = Callable[[str | None, int, int], None]
"""Called with (condition, examples done, examples in all); the condition is None while the sender reads for all."""

BATCH_ROWS = 32
TIMED_EXAMPLES = 12


@dataclass(frozen=True)
class _Read:
    """What one condition gives the receiver: for every example, and again for those timed, one by one, in seconds."""

    context: EvaluationContext
    readings: list[Reading]
    timed: list[tuple[Reading, float]]


def evaluate(
    context: EvaluationContext,
    *,
    conditions: Collection[str] | None = None,
    trained: Mapping[str, EvaluationContext] | None = None,
    progress: Progress = lambda *_: None,
    partial: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure conditions on the context's examples.

    Every pass of the sender comes before any of the receiver, for models that must take turns in memory.

    Args:
        context: The bridge measured, its models and the examples.
        conditions: Names out of ``CONDITIONS``; None for all of them.
        trained: Settings of the control bridges ``prompt`` and ``random_sender``, on the same examples.
        progress: Told how far each condition is.
        partial: Given the report as far as it goes, after each condition.

    Returns:
        The report: what was measured (``checkpoint``, ``bridge_id``, ``task``, ``n``), ``conditions`` (metric, value,
        95 % interval, token F1 of a generation, median milliseconds to first token for one request alone, everything
        that condition needs included), ``bytes`` and ``source_`` and ``receiver_tokens_per_soft_token`` (means over
        the examples), ``truncated`` (sources the bridge read only the start of) and ``content_share``:
        the part of the bridge's gain over ``none`` that another example's latent does not give, 0 to 1, null where
        there is no gain, no other source (``mismatched`` is then left out) or one of the three was not asked for.
    """
    read = _read_all(context, CONDITIONS if conditions is None else conditions, trained or {}, progress)
    measured: dict[str, dict[str, Any]] = {}
    report = {
        "checkpoint": context.checkpoint,
        "bridge_id": context.bridge_id,
        "task": context.task.name,
        "n": len(context.examples),
        "conditions": measured,
        **_sizes(context),
        "content_share": None,
    }
    for name, readings in read.items():
        measured[name] = _measure(readings.context, name, readings, progress)
        report["content_share"] = _content_share({name: row["value"] for name, row in measured.items()})
        partial({**report, "conditions": dict(measured)})
    return report


def _content_share(value: Mapping[str, float]) -> float | None:
    if not {"bridge", "none", "mismatched"} <= set(value):
        return None
    gain = value["bridge"] - value["none"]
    return min(max((value["bridge"] - value["mismatched"]) / gain, 0.0), 1.0) if gain > 0 else None


def _read_all(
    context: EvaluationContext, wanted: Collection[str], trained: Mapping[str, EvaluationContext], progress: Progress
) -> dict[str, _Read]:
    asked = {name: (context, condition) for name, condition in CONDITIONS.items() if name in wanted}
    if len({example.source for example in context.examples}) < 2:  # no other example's latent could stand in
        asked.pop("mismatched", None)
    asked |= {name: (control, CONDITIONS["bridge"]) for name, control in trained.items()}
    read: dict[str, _Read] = {}
    count = len(context.examples)
    for name, (made, condition) in asked.items():
        readings: list[Reading] = []
        for chosen in _batches(made):
            readings += condition.read(made, chosen)
            progress(None, len(read) * count + len(readings), len(asked) * count)
        timed = [_timed_reading(made, condition, i) for i in range(min(TIMED_EXAMPLES, count))]
        read[name] = _Read(made, readings, timed)
    return read


def _batches(context: EvaluationContext) -> Iterator[range]:
    rows, count = context.lender.batch_rows or BATCH_ROWS, len(context.examples)
    return (range(start, min(start + rows, count)) for start in range(0, count, rows))


def _measure(context: EvaluationContext, name: str, read: _Read, progress: Progress) -> dict[str, Any]:
    texts: list[str] = []
    for chosen in _batches(context):
        texts += predict(context, chosen, read.readings[chosen.start : chosen.stop])
        progress(name, len(texts), len(context.examples))
    wanted = [example.answer for example in context.examples]
    metric, *others = metrics_of(context.task.kind)
    scores = metric.scores(texts, wanted)
    low, high = bootstrap(scores)
    return {
        "metric": metric.name,
        "value": statistics.fmean(scores),
        "low": low,
        "high": high,
        "ttft_ms": _first_token_ms(context, read.timed),
        **{other.name: statistics.fmean(other.scores(texts, wanted)) for other in others},
    }


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
    dim = context.bridge.config.encoder.latent_dim
    return {
        "bytes": {
            "latent": statistics.fmean(wire.message_bytes(k, dim, context.dtype) for k in slots),
            "source": statistics.fmean(len(example.source.encode()) for example in context.examples),
            "receiver_kv": kv_bytes,
        },
        "source_tokens_per_soft_token": sum(len(source.ids) for source in sources) / sum(slots),
        "receiver_tokens_per_soft_token": sum(read) / sum(slots),
        "truncated": sum(source.full_length > len(source.ids) for source in sources),
    }


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write the report as JSON (errors as ``write_text``)."""
    write_text(path, json.dumps(report, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all.

    Raises:
        InvalidRequest: The path cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text.encode())
    except OSError as error:
        raise InvalidRequest(f"the report {str(path)!r} cannot be written: {error.strerror}", param="out") from None


def others_in(report: Mapping[str, Any]) -> list[Metric]:
    """The metrics that a report shows beside the task's own."""
    return [metric for name, metric in METRICS.items() if any(name in row for row in report["conditions"].values())]


def table(report: Mapping[str, Any], *, explained: bool = True) -> Table:
    """The report as people read it; ``explained`` adds what the receiver gets in each condition."""
    conditions: Mapping[str, Mapping[str, Any]] = report["conditions"]
    metric = next(iter(conditions.values()))["metric"]
    others = others_in(report)
    share = report["content_share"]
    sizes = report["bytes"]
    out = Table(
        title=escape(f"{report['task']}, {report['n']} held-out examples"),
        caption=(
            f"{report['source_tokens_per_soft_token']:.1f} sender tokens "
            f"({report['receiver_tokens_per_soft_token']:.1f} receiver tokens) per soft token · "
            f"bytes: latent {sizes['latent']:.0f}, source {sizes['source']:.0f}, "
            f"receiver KV {sizes['receiver_kv']:.0f} · "
            f"content share of the gain: {'none' if share is None else f'{share:.2f}'}"
            + (f" · {report['truncated']} sources cut" if report["truncated"] else "")
        ),
    )
    out.add_column("condition")
    if explained:
        out.add_column("the receiver gets", no_wrap=True)
    short = METRICS[metric].short if metric in METRICS else metric
    for heading in [short, "95 % interval", *(other.short for other in others), "first token"]:
        out.add_column(heading, justify="right")
    for name, row in conditions.items():
        cells = [f"{row['value']:.3f}", f"{row['low']:.3f} – {row['high']:.3f}"]
        cells += [f"{row[other.name]:.3f}" for other in others]
        cells += [f"{row['ttft_ms']:.1f} ms"]
        shown = [name, meaning_of(name), *cells] if explained else [name, *cells]
        out.add_row(*shown, style="bold" if name == "bridge" else None)
    return out
