"""The report as one page that needs nothing else: no script, no font, no network."""

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from latentwire.bridge.evaluation.conditions import meaning_of
from latentwire.bridge.evaluation.metrics import METRICS
from latentwire.bridge.evaluation.report import others_in

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #667085; --line: #d9dee5; --back: #fff; --band: #9db8e8;
  --mark: #1d4fa3; --own: #f2c879; --own-mark: #a35a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaee; --soft: #98a2b3; --line: #343b45; --back: #14171b;
  --band: #2f4d80; --mark: #9cc0ff; --own: #6b4a17; --own-mark: #ffc46b; } }
body { font: 16px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--back); max-width: 60rem;
  margin: 0 auto; padding: 1.5rem 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.35rem; margin: 0 0 .5rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 0 0 1.5rem; }
dt, .soft { color: var(--soft); }
dd { margin: 0; }
table { border-collapse: collapse; width: 100%; margin: 0 0 1.5rem; }
th, td { text-align: left; padding: .5rem .6rem .5rem 0; border-bottom: 1px solid var(--line); vertical-align: middle; }
th[scope=row] { font-weight: 600; }
th small { display: block; font-weight: 400; color: var(--soft); max-width: 17rem; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.wide { width: 40%; }
.bar { position: relative; height: 1.1rem; background: linear-gradient(90deg, var(--line) 1px, transparent 1px) 0 / 25%,
  linear-gradient(var(--line), var(--line)) 0 50% / 100% 1px no-repeat; border-right: 1px solid var(--line); }
.bar i, .bar b { position: absolute; top: 0; bottom: 0; }
.bar i { background: var(--band); border-radius: 3px; min-width: 2px; }
.bar b { width: 3px; margin-left: -1.5px; background: var(--mark); }
.own .bar i { background: var(--own); }
.own .bar b { background: var(--own-mark); }
@media (max-width: 40rem) {
  thead { display: none; }
  tr { display: block; border-bottom: 1px solid var(--line); padding: .6rem 0; }
  th[scope=row], td { display: block; border: 0; padding: .15rem 0; }
  .wide { width: auto; }
  .number { text-align: left; }
  .number::before { content: attr(data-name) " "; color: var(--soft); }
}
"""


def page(report: Mapping[str, Any] | None, *, title: str, facts: Mapping[str, str]) -> str:
    """A report, finished or not, as an HTML document; whatever its texts hold, they stay texts.

    Args:
        report: What ``evaluate`` gave so far; None before anything was measured.
        title: What was measured on what.
        facts: Shown above the table, by name.
    """
    about = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts.items())
    body = "<p>Nothing has been measured yet.</p>" if report is None else "".join(_measured(report))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1><dl>{about}</dl>{body}</body></html>\n"
    )


def _measured(report: Mapping[str, Any]) -> Iterator[str]:
    conditions: Mapping[str, Mapping[str, Any]] = report["conditions"]
    metric = next((str(row["metric"]) for row in conditions.values()), "value")
    metric = METRICS[metric].title if metric in METRICS else metric
    others = others_in(report)
    headings = [("condition", ""), ("0 to 1, with the 95 % interval", "wide"), (metric, "number")]
    headings += [*((other.title, "number") for other in others), ("first token", "number")]
    yield f"<p>{escape(str(report['task']))}: {report['n']} held-out examples.</p>"
    yield "<table><thead><tr>"
    yield from (f'<th scope="col" class="{kind}">{escape(name)}</th>' for name, kind in headings)
    yield "</tr></thead><tbody>"
    for name, row in conditions.items():
        yield f'<tr class="{"own" if name == "bridge" else "other"}"><th scope="row">{escape(name)}'
        yield f'<small>{escape(meaning_of(name))}</small></th><td class="wide">{_bar(row)}</td>'
        yield _number(metric, f"{row['value']:.3f}", f"{row['low']:.3f} – {row['high']:.3f}")
        yield from (_number(other.title, f"{row[other.name]:.3f}") for other in others if other.name in row)
        yield _number("first token", f"{row['ttft_ms']:.1f} ms") + "</tr>"
    yield "</tbody></table>"
    yield f"<dl>{''.join(f'<dt>{escape(k)}</dt><dd>{escape(v)}</dd>' for k, v in _sizes(report).items())}</dl>"
    yield '<p class="soft">Times to the first token were taken one request at a time; on a service that others use '
    yield "meanwhile they are longer than on an idle one.</p>"


def _bar(row: Mapping[str, Any]) -> str:
    value, low, high = (100 * min(max(float(row[name]), 0.0), 1.0) for name in ("value", "low", "high"))
    label = f"{row['value']:.3f}, interval {row['low']:.3f} to {row['high']:.3f}"
    return (
        f'<div class="bar" role="img" aria-label="{escape(label)}">'
        f'<i style="left:{low:.2f}%;width:{high - low:.2f}%"></i><b style="left:{value:.2f}%"></b></div>'
    )


def _number(name: str, text: str, more: str = "") -> str:
    small = f' <span class="soft">{escape(more)}</span>' if more else ""
    return f'<td class="number" data-name="{escape(name)}">{escape(text)}{small}</td>'


def _sizes(report: Mapping[str, Any]) -> dict[str, str]:
    share, sizes = report["content_share"], report["bytes"]
    return {
        "content share of the gain": "none" if share is None else f"{share:.2f}",
        "tokens per soft token": f"{report['source_tokens_per_soft_token']:.1f} of the sender, "
        f"{report['receiver_tokens_per_soft_token']:.1f} of the receiver",
        "bytes": f"latent {sizes['latent']:.0f}, source {sizes['source']:.0f}, receiver KV {sizes['receiver_kv']:.0f}",
        "sources cut": str(report["truncated"]),
        "bridge id": str(report["bridge_id"]),
    }
