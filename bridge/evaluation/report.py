"""A report as people read it at a terminal, and as a file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from latentwire.bridge.errors import InvalidRequest
from latentwire.bridge.evaluation.compare import Comparison, Entry
from latentwire.bridge.evaluation.conditions import meaning_of
from latentwire.bridge.evaluation.heldout import WHY
from latentwire.bridge.evaluation.metrics import METRICS, Metric
from latentwire.bridge.evaluation.statistics import FEWEST, LEVEL
from latentwire.bridge.files import replace_file


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


LATER: dict[str, Any] = {
    "headline": None,
    "comparisons": {},
    "content_share_interval": None,
    "sender_share": None,
    "sender_share_interval": None,
    "gate": None,
    "dropped": {},
    "left_out": {},
    "about": None,
    "examples": None,
    "slots": None,
    "latents": None,
    "latency": None,
}
"""What a report may lack: one without examples, or an older one that a service still keeps."""


def completed(report: Mapping[str, Any]) -> dict[str, Any]:
    """A report that has all of ``LATER``."""
    return {**LATER, **report}


def others_in(report: Mapping[str, Any]) -> list[Metric]:
    """The metrics that a report shows beside the task's own."""
    return [metric for name, metric in METRICS.items() if any(name in row for row in report["conditions"].values())]


def table(report: Mapping[str, Any], *, explained: bool = True) -> Table:
    """The report as people read it; ``explained`` adds what the receiver gets in each condition."""
    conditions: Mapping[str, Mapping[str, Any]] = report["conditions"]
    metric = next(iter(conditions.values()))["metric"]
    others, compared = others_in(report), report["comparisons"]
    out = Table(
        title=escape(f"{report['task']}, {report['n']} held-out examples"),
        caption=escape("\n".join(notes(report))),
        caption_justify="left",
    )
    out.add_column("condition", no_wrap=True)
    if explained:
        out.add_column("the receiver gets", no_wrap=True)
    short = METRICS[metric].short if metric in METRICS else metric
    headings = [short, "95 % interval", *(other.short for other in others), *(["bridge ahead"] if compared else [])]
    for heading in [*headings, "first token"]:
        out.add_column(heading, justify="right", no_wrap=True)
    for name, row in conditions.items():
        cells = [f"{row['value']:.3f}", spread(row["low"], row["high"])]
        cells += [f"{row[other.name]:.3f}" for other in others]
        if compared:
            cells.append(ahead(compared[name]) if name in compared else "")
        cells.append("–" if row["ttft_ms"] is None else f"{row['ttft_ms']:.1f} ms")
        shown = [name, meaning_of(name), *cells] if explained else [name, *cells]
        out.add_row(*shown, style="bold" if name == "bridge" else None)
    return out


SIDES = {
    "bridge": "the sender reads, the receiver answers",
    "stored": "the latent is at hand",
    "direct": "the receiver reads the source",
    "prefix_cached": "its keys and values are at hand",
    "relay": "the sender writes, the receiver reads that",
}
"""What is timed of each side of ``latency``, in a few words."""


def latency_table(found: Mapping[str, Any], *, explained: bool = True) -> Table:
    """What ``latency.latency`` gave, as people read it; ``explained`` adds what is counted of each side."""
    out = Table(
        title=f"milliseconds until {found['tokens']} tokens are written: median (95th percentile)",
        caption=escape("\n".join(f"no {name!r}: {why}" for name, why in found["missing"].items())),
    )
    out.add_column("side", no_wrap=True)
    if explained:
        out.add_column("what is counted", no_wrap=True)
    for size in found["batches"]:
        for what in ("first token", "all"):
            out.add_column(f"{size} at once, {what}", justify="right")
    for name, meaning in SIDES.items():
        rows = [batch[name] for batch in found["batches"].values() if name in batch]
        cells = [milliseconds(row[what]) for row in rows for what in ("first_ms", "total_ms")]
        if cells:
            out.add_row(*([name, meaning] if explained else [name]), *cells)
    return out


def milliseconds(row: Mapping[str, float]) -> str:
    """The median, and what one in twenty exceeds."""
    return f"{row['p50']:.1f} ({row['p95']:.1f})"


def spread(low: float | None, high: float | None) -> str:
    """An interval in figures, or a dash where there is none."""
    return "–" if low is None or high is None else f"{low:.3f} – {high:.3f}"


def ahead(row: Mapping[str, Any]) -> str:
    """By how much the bridge is ahead of a condition; a star where chance would hardly do it (adjusted p < .05)."""
    return f"{row['difference'] + 0.0:+.3f}{'*' if row['p'] < 1 - LEVEL else ' '}"


def notes(report: Mapping[str, Any]) -> list[str]:
    """What the figures come to, and what has to be known to read them; one line each."""
    sizes, headline = report["bytes"], report["headline"]
    lines = []
    if headline is not None and headline["ratio"] is not None:
        found = spread(headline["low"], headline["high"])
        lines.append(f"bridge / {headline['against']}: {headline['ratio']:.3f} ({found})")
    lines += [f"{name}: {text}" for name, text in shares(report).items()]
    lines.append(
        f"{report['source_tokens_per_soft_token']:.1f} sender tokens ({report['receiver_tokens_per_soft_token']:.1f} "
        f"receiver tokens) per soft token; bytes: latent {sizes['latent']:.0f}, source {sizes['source']:.0f}, "
        f"receiver KV {sizes['receiver_kv']:.0f}"
        + (f"; {report['truncated']} sources cut" if report["truncated"] else "")
    )
    return lines + caveats(report)


def shares(report: Mapping[str, Any]) -> dict[str, str]:
    """Which part of the gain over ``none`` the latent's content gives, and the sender's understanding, by name; and
    what the checkpoint's gate reaches."""
    made = {}
    for share, rival in (("content_share", "another example's latent"), ("sender_share", "an untrained sender")):
        if report[share] is not None:
            found = spread(*(report[f"{share}_interval"] or (None, None)))
            made[f"share of the gain over 'none' that {rival} does not give"] = f"{report[share]:.2f} ({found})"
    if gate := report.get("gate"):
        reached = gate["reached"]
        made[f"kept of the text's score where the gate trusts {reached['coverage']:.1%} of the latents"] = (
            f"{reached['retention']:.3f} ({spread(reached['low'], reached['high'])}), calibrated on {gate['task']} for "
            f"{gate['target_retention']:g}"
        )
    return made


def caveats(report: Mapping[str, Any]) -> list[str]:
    """What has to be known to read the figures; one line each."""
    lines = []
    for name in report["headline"]["missing"] if report["headline"] is not None else ():
        lines.append(f"no {name!r} in this table, which may be the better of the two")
    lines += [f"no {name!r}: {why}" for name, why in report.get("left_out", {}).items()]
    if report["n"] < FEWEST:
        lines.append(f"{report['n']} held-out examples are too few for intervals; {FEWEST} are needed")
    if (looked := report.get("checks", {}).get("inputs", report["n"])) < report["n"]:
        lines.append(f"the receiver's input was held against that of 'none' for {looked} of {report['n']} examples")
    for why, count in report["dropped"].items():
        lines.append(f"{count} test examples left out: {WHY.get(why, why)}")
    if any(row["p"] < 1 - LEVEL for row in report["comparisons"].values()):
        lines.append("* p < .05, adjusted for the number of conditions (Holm)")
    return lines


def comparison_table(comparison: Comparison) -> Table:
    """Evaluations beside each other, a column each."""
    out = Table(
        title=escape(f"{comparison.task}, {comparison.n} held-out examples, the same for all"),
        caption=escape("\n".join(comparison.notes)),
        caption_justify="left",
        min_width=72,
    )
    out.add_column("condition", no_wrap=True)
    for entry in comparison.entries:
        out.add_column(escape(entry.name), justify="right")
    for name in comparison.conditions:
        cells = [_cell(entry, name) for entry in comparison.entries]
        out.add_row(name, *cells, style="bold" if name == "bridge" else None)
    out.add_section()
    for name, texts in facts_of(comparison).items():
        out.add_row(name, *map(escape, texts))
    return out


def _cell(entry: Entry, condition: str) -> str:
    found = entry.estimate(condition)
    if found is None:
        return ""
    return f"{found.value:.3f}" + ("" if found.low is None else f"\n[dim]{spread(found.low, found.high)}[/dim]")


def facts_of(comparison: Comparison) -> dict[str, list[str]]:
    """What a comparison says of each entry beside its scores, by what it is."""
    entries = comparison.entries
    rows = {
        "bridge / text": [_headline(entry) for entry in entries],
        "ahead of the first": [
            ahead(comparison.ahead[entry.name]).strip() if entry.name in comparison.ahead else "–" for entry in entries
        ],
        "tokens per soft token": [f"{entry.mean('receiver_tokens_per_soft_token'):.1f}" for entry in entries],
        "latent bytes": [f"{entry.mean('bytes', 'latent'):,.0f}" for entry in entries],
        "source bytes": [f"{entry.mean('bytes', 'source'):,.0f}" for entry in entries],
        "seeds": [", ".join(map(str, entry.seeds)) for entry in entries],
    }
    return {name: cells for name, cells in rows.items() if len(entries) > 1 or name != "ahead of the first"}


def _headline(entry: Entry) -> str:
    ratios = [document["headline"]["ratio"] for document in entry.documents if document["headline"]]
    known = [ratio for ratio in ratios if ratio is not None]
    return f"{sum(known) / len(known):.3f} ({entry.text})" if known else "–"
