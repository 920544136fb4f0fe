"""The report as one page that needs nothing else: no script, no font, no network."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from latentwire.bridge.evaluation.conditions import meaning_of
from latentwire.bridge.evaluation.metrics import METRICS
from latentwire.bridge.evaluation.report import others_in, spread

TEMPLATES = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)


def page(report: Mapping[str, Any] | None, *, title: str, facts: Mapping[str, str]) -> str:
    """A report, finished or not, as an HTML document (``report.html``); whatever its texts hold, they stay texts.

    Args:
        report: What ``evaluate`` gave so far; None before anything was measured.
        title: What was measured on what.
        facts: Shown above the table, by name.
    """
    metric = next((row["metric"] for row in report["conditions"].values()), "value") if report else ""
    return TEMPLATES.get_template("report.html").render(
        report=report,
        title=title,
        facts=facts,
        metric=METRICS[metric].title if metric in METRICS else metric,
        others=others_in(report) if report else [],
        meaning_of=meaning_of,
        spread=spread,
    )
