"""What replicas count, as one text for Prometheus."""

from collections.abc import Iterator, Mapping

from prometheus_client import Metric, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

READY = "latentwire_ready"


class ReplicaCollector(Collector):
    """Tells whether a replica of each deployment is ready, and what each counts, by its label ``replica``."""

    def __init__(self, ready: bool, texts: Mapping[str, str]) -> None:
        """Of replicas {id: its metrics in the text format}."""
        self._ready, self._texts = ready, texts

    def collect(self) -> Iterator[Metric]:
        """Every family once, with the samples of all replicas: the format wants them together."""
        families: dict[str, Metric] = {}
        for replica, text in self._texts.items():
            for family in text_string_to_metric_families(text):
                all_of_it = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                all_of_it.samples += [one._replace(labels={**one.labels, "replica": replica}) for one in family.samples]
        families.pop(READY, None)  # each replica is, or Ray would not show it
        yield GaugeMetricFamily(READY, "1 once warmed up.", value=float(self._ready))
        yield from families.values()


def merged(ready: bool, texts: Mapping[str, str]) -> bytes:
    """The text of all: of replicas {id: text}, and whether there are such as answer.

    >>> print(merged(True, {"a1": "# HELP rows Rows.\\n# TYPE rows gauge\\nrows 2.0\\n"}).decode())
    # HELP latentwire_ready 1 once warmed up.
    # TYPE latentwire_ready gauge
    latentwire_ready 1.0
    # HELP rows Rows.
    # TYPE rows gauge
    rows{replica="a1"} 2.0
    <BLANKLINE>
    """
    return generate_latest(ReplicaCollector(ready, texts))
