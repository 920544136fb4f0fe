"""The report as one page that needs nothing else: no script, no font, no network."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from latentwire.bridge.evaluation.compare import (
    Comparison,
    Entry,
    against_bytes,
    against_compression,
)
from latentwire.bridge.evaluation.conditions import meaning_of
from latentwire.bridge.evaluation.metrics import METRICS, metrics_of
from latentwire.bridge.evaluation.plots import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    SHAPES,
    TOP,
    WIDTH,
    Plot,
    Point,
    kept,
    scattered,
)
from latentwire.bridge.evaluation.report import (
    SIDES,
    ahead,
    caveats,
    completed,
    facts_of,
    milliseconds,
    others_in,
    shares,
    spread,
    write_report,
    write_text,
)

TEMPLATES = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
TEMPLATES.globals.update(
    meaning_of=meaning_of,
    spread=spread,
    ahead=ahead,
    milliseconds=milliseconds,
    sides=SIDES,
    SHAPES=SHAPES,
    SIZE=(WIDTH, HEIGHT),
    EDGES=(LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM),
)
PAGES = (".html", ".htm")
SHOWN_EXAMPLES = 10  # that differ, of each kind
SHOWN_SOURCE = 400  # characters


def save(path: Path, report: Mapping[str, Any]) -> None:
    """Write a report: as a page where the name ends in .html or .htm, else as JSON (errors as ``write_text``)."""
    if path.suffix.lower() not in PAGES:
        write_report(path, report)
        return
    title = f"{report['checkpoint']} on {report['task']}"
    write_text(path, page(report, title=title, facts={}))


def page(report: Mapping[str, Any] | None, *, title: str, facts: Mapping[str, str]) -> str:
    """A report, finished or not, as an HTML document (``report.html``); whatever its texts hold, they stay texts.

    Args:
        report: What ``evaluate`` gave so far, with or without what older ones lack; None before anything was measured.
        title: What was measured on what.
        facts: Shown above the table, by name.
    """
    if report is None:
        return TEMPLATES.get_template("report.html").render(report=None, title=title, facts=facts)
    whole = completed(report)
    about = whole["about"]
    return TEMPLATES.get_template("report.html").render(
        report=whole,
        title=title,
        facts=facts,
        notes=caveats(whole),
        shares=shares(whole),
        metric=_metric(whole),
        others=others_in(whole),
        plots=_plots([Entry("bridge", [whole])]) + _gate(whole),
        plane=_plane(whole),
        apart=_apart(whole),
        about=_about(about) if about else {},
        recipe=about["provenance"]["recipe"] if about else {},
    )


def comparison_page(comparison: Comparison, *, title: str) -> str:
    """Evaluations beside each other as an HTML document (``compare.html``)."""
    documents = [document for entry in comparison.entries for document in entry.documents]
    return TEMPLATES.get_template("compare.html").render(
        title=title,
        comparison=comparison,
        metric=_metric(documents[0]),
        facts=facts_of(comparison),
        plots=_plots(comparison.entries),
        commands=list(dict.fromkeys(document["about"]["command"] for document in documents)),
    )


def _metric(report: Mapping[str, Any]) -> str:
    name = next((str(row["metric"]) for row in report["conditions"].values()), "value")
    return METRICS[name].title if name in METRICS else name


def _plots(entries: Sequence[Entry]) -> list[Plot]:
    return [plot for plot in (against_compression(entries), against_bytes(entries)) if plot is not None]


def _gate(report: Mapping[str, Any]) -> list[Plot]:
    """What is kept of the text's score against how many answers are from latents, as the gate's trust has them."""
    if report["gate"] is None:
        return []
    points = [
        Point(f"trust {one['trust']:.3f}", 1, one["coverage"], one["retention"]) for one in report["gate"]["curve"]
    ]
    at = report["gate"]["reached"]
    chosen = Point("the gate", 0, at["coverage"], at["retention"], at["low"], at["high"])
    return [kept("Latents where they are trusted, else texts", points, chosen)]


def _plane(report: Mapping[str, Any]) -> Plot | None:
    """The examples by their latents, and what they are: their labels, or whether the bridge got them right."""
    if not report["latents"]:
        return None
    metric, *_ = metrics_of("classification")
    if report["conditions"]["bridge"]["metric"] == metric.name:
        groups = [example["wanted"].strip() for example in report["examples"]]
    else:
        groups = ["right" if example["scores"]["bridge"] >= 1 else "wrong" for example in report["examples"]]
    titles = [
        f"component {i + 1}: {share:.0%} of the variance" for i, share in enumerate(report["latents"]["explained"])
    ]
    return scattered("Examples by their latents", (titles[0], titles[1]), report["latents"]["pca"], groups)


def _apart(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Examples on which the bridge and the receiver that reads the text differ, those of either side."""
    text = "direct" if "direct" in report["conditions"] else (report["headline"] or {}).get("against")
    if not report["examples"] or text is None or "bridge" not in report["conditions"]:
        return None
    sides = []
    for better, worse in (("bridge", text), (text, "bridge")):
        found = [e for e in report["examples"] if e["scores"][better] > e["scores"][worse]]
        shown = [{**e, "source": shorten(e["source"], SHOWN_SOURCE, placeholder=" …")} for e in found[:SHOWN_EXAMPLES]]
        if found:
            sides.append({"better": better, "count": len(found), "examples": shown})
    return {"text": text, "sides": sides}


def _about(about: Mapping[str, Any]) -> dict[str, str]:
    made = about["provenance"]
    return {
        "versions": ", ".join(f"{name} {version}" for name, version in about["versions"].items()),
        "data": f"SHA-256 {about['data_sha256']}",
        "sender": f"{about['sender']['name']} ({about['sender']['fingerprint']})",
        "receiver": f"{about['receiver']['name']} ({about['receiver']['fingerprint']})",
        "latents travel in": about["dtype"],
        "encoder": ", ".join(f"{name} {value}" for name, value in about["encoder"].items()),
        "trained": f"on {made['task']}, {made['steps']:,} steps, seed {made['seed']}, version {made['code_version']}",
    }
