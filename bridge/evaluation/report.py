"""Run an evaluation, and show it: one JSON document, one table."""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from bridge import engine, wire
from bridge.checkpoint import replace_file
from bridge.errors import InvalidRequest
from bridge.evaluation.conditions import CONDITIONS, Condition, Setting, answer
from bridge.evaluation.metrics import bootstrap, exact_match, token_f1
from bridge.models import text_ids
from bridge.sampling import SamplingParams

Progress = Callable[[str, int, int], None]
"""Called with (condition, examples done, examples in all)."""

BATCH_ROWS = 32
TIMED_EXAMPLES = 12
MEANING = {
    "bridge": "soft tokens from the sender's reading",
    "direct": "the receiver reads the source",
    "relay": "the receiver reads what the sender wrote about it",
    "same_budget": "the source cut to as many receiver tokens",
    "none": "the prompt alone",
    "mismatched": "another example's latent",
    "noise": "random latents with the same moments",
    "prompt": "learned soft tokens, no sender",
    "random_sender": "the same bridge trained on an untrained sender",
}


def evaluate(
    setting: Setting, *, trained: Mapping[str, Setting] | None = None, progress: Progress = lambda *_: None
) -> dict[str, Any]:
    """Measure every condition on the setting's examples.

    Args:
        setting: The bridge measured, its models and the examples.
        trained: Settings of the control bridges ``prompt`` and ``random_sender``, on the same examples.
        progress: Told how far each condition is.

    Returns:
        The report: what was measured (``checkpoint``, ``bridge_id``, ``task``, ``n``), ``conditions`` (metric, value,
        95 % interval, token F1 of a generation, median milliseconds to first token for one request alone, everything
        that condition needs included), ``bytes`` and ``source_`` and ``receiver_tokens_per_soft_token`` (means over
        the examples), ``truncated`` (sources the bridge read only the start of) and ``content_share``:
        the part of the bridge's gain over ``none`` that another example's latent does not give, 0 to 1, null where
        there is no gain or no other source; ``mismatched`` is then left out.
    """
    conditions: dict[str, dict[str, Any]] = {}
    one_source = len({example.source for example in setting.examples}) < 2
    for name, condition in CONDITIONS.items():
        if not (name == "mismatched" and one_source):  # there is no other example whose latent could stand in
            conditions[name] = _measure(setting, name, condition, progress)
    for name, control in (trained or {}).items():
        conditions[name] = _measure(control, name, CONDITIONS["bridge"], progress)
    value = {name: row["value"] for name, row in conditions.items()}
    gain = value["bridge"] - value["none"]
    share = (value["bridge"] - value["mismatched"]) / gain if gain > 0 and "mismatched" in value else None
    return {
        "checkpoint": setting.checkpoint,
        "bridge_id": setting.bridge_id,
        "task": setting.task.name,
        "n": len(setting.examples),
        "conditions": conditions,
        **_sizes(setting),
        "content_share": None if share is None else min(max(share, 0.0), 1.0),
    }


def _measure(setting: Setting, name: str, condition: Condition, progress: Progress) -> dict[str, Any]:
    said: list[str] = []
    count = len(setting.examples)
    for start in range(0, count, BATCH_ROWS):
        chosen = range(start, min(start + BATCH_ROWS, count))
        said += answer(setting, chosen, condition(setting, chosen))
        progress(name, len(said), count)
    wanted = [example.answer for example in setting.examples]
    same = exact_match if setting.task.kind == "generation" else lambda have, want: float(have == want)
    exact = [same(have, want) for have, want in zip(said, wanted, strict=True)]
    low, high = bootstrap(exact)
    row = {
        "metric": "accuracy" if setting.task.kind == "classification" else "em",
        "value": statistics.fmean(exact),
        "low": low,
        "high": high,
        "ttft_ms": _first_token_ms(setting, condition),
    }
    if setting.task.kind == "generation":
        row["token_f1"] = statistics.fmean(token_f1(have, want) for have, want in zip(said, wanted, strict=True))
    return row


def _first_token_ms(setting: Setting, condition: Condition) -> float:
    """Median over single requests, from the source in hand to the first token; one token on every side."""
    times = []
    for i in range(min(TIMED_EXAMPLES, len(setting.examples))):
        started = time.perf_counter()
        readings = condition(setting, [i])
        soft = engine.soften(
            setting.bridge, setting.receiver_name, setting.receiver,
            [None if isinstance(reading, str) else reading for reading in readings],
        )  # fmt: skip
        engine.generate(setting.receiver, setting.rows([i], readings, [None]), soft, [SamplingParams(max_tokens=1)])
        times.append((time.perf_counter() - started) * 1000)
    return statistics.median(times[1:] or times)  # the first one warms up


def _sizes(setting: Setting) -> dict[str, Any]:
    everything = range(len(setting.examples))
    sources = setting.sources(everything)
    slots = [len(latent) for latent in setting.recall(everything)]
    read = [len(text_ids(setting.receiver, example.source)) for example in setting.examples]
    dim = setting.bridge.config.encoder.latent_dim
    return {
        "bytes": {
            "latent": statistics.fmean(wire.message_bytes(k, dim, setting.dtype) for k in slots),
            "source": statistics.fmean(len(example.source.encode()) for example in setting.examples),
            "receiver_kv": statistics.fmean(setting.receiver.kv_bytes(n) for n in read),
        },
        "source_tokens_per_soft_token": sum(len(source.ids) for source in sources) / sum(slots),
        "receiver_tokens_per_soft_token": sum(read) / sum(slots),
        "truncated": sum(source.full_length > len(source.ids) for source in sources),
    }


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write the report as JSON, whole or not at all.

    Raises:
        InvalidRequest: The path cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, (json.dumps(report, indent=2) + "\n").encode())
    except OSError as error:
        raise InvalidRequest(f"--out {path}: {error.strerror}", param="out") from None


def table(report: Mapping[str, Any], *, explained: bool = True) -> Table:
    """The report as people read it; ``explained`` adds what the receiver gets in each condition."""
    conditions: Mapping[str, Mapping[str, Any]] = report["conditions"]
    metric = next(iter(conditions.values()))["metric"]
    f1 = any("token_f1" in row for row in conditions.values())
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
    headings: Sequence[str] = [metric.upper() if metric == "em" else metric, "95 % interval"]
    for heading in [*headings, *(["token F1"] if f1 else []), "first token"]:
        out.add_column(heading, justify="right")
    for name, row in conditions.items():
        cells = [f"{row['value']:.3f}", f"{row['low']:.3f} – {row['high']:.3f}"]
        cells += [f"{row['token_f1']:.3f}"] if f1 else []
        cells += [f"{row['ttft_ms']:.1f} ms"]
        out.add_row(name, *([MEANING[name]] if explained else []), *cells, style="bold" if name == "bridge" else None)
    return out
