"""Writes deploy/METRICS.md from the registries of a service: ``python -m deploy.metrics_md``."""

from collections.abc import Iterator
from pathlib import Path

from prometheus_client.core import CollectorRegistry, Metric

from latentwire.service.app import create_app
from latentwire.service.settings import Settings

COMMITTED = Path(__file__).parent / "METRICS.md"
HEAD = """# Metrics

Made by `python -m deploy.metrics_md` from what a service registers; a test compares it with what a running one exposes.
`half` is `encode`, `generate` or `score`. `bridge`, `model` and `route` are those that are served, and no caller makes
up others: where no bridge was found it is `bridge=""`. Histograms end in `_bucket`, `_sum` and `_count`; those of
seconds have the bounds of `LW_LATENCY_BUCKETS`. On Ray what models count has a label `replica` besides, and what
HTTP counts a label `front` where several processes answer it (`LW_FRONTENDS`).
"""


def exposed_name(family: Metric) -> str:
    """The name that a query uses."""
    return f"{family.name}_total" if family.type == "counter" else family.name


def _labels(family: Metric) -> list[str]:
    said = list(getattr(family, "_labelnames", ()))
    return said or sorted({label for sample in family.samples for label in sample.labels} - {"le"})


def rows(registry: CollectorRegistry) -> Iterator[str]:
    """Lines of the table, one for each family."""
    for family in sorted(registry.collect(), key=exposed_name):
        labels = ", ".join(f"`{label}`" for label in _labels(family))
        yield f"| `{exposed_name(family)}` | {family.type} | {labels} | {family.documentation} |"


def rendered() -> str:
    """The whole file."""
    runtime = create_app(Settings(), {"builtin": "builtin"}).state.runtime
    parts = [HEAD]
    for title, registry in (
        ("Requests: of the process that answers HTTP", runtime.metrics.registry),
        ("Models: of the process that holds them, on the same page", runtime.local.measures.registry),
    ):
        parts += [
            f"## {title}\n",
            "| Name | Type | Labels | Meaning |\n|---|---|---|---|\n" + "\n".join(rows(registry)) + "\n",
        ]
    return "\n".join(parts)


if __name__ == "__main__":
    COMMITTED.write_text(rendered())
