"""What replicas count, as one text for Prometheus."""

from collections.abc import Iterator, Mapping

from prometheus_client import Metric, generate_latest
from prometheus_client.core import GaugeMetricFamily

from latentwire.service.measures import Texts

READY = "latentwire_ready"


class ReplicaCollector(Texts):
    """Tells whether a replica of each deployment is ready, and what each counts, by its label ``replica``."""

    def __init__(self, ready: bool, texts: Mapping[str, str]) -> None:
        """Of replicas {id: its metrics in the text format}."""
        super().__init__("replica", texts)
        self._ready = ready

    def collect(self) -> Iterator[Metric]:
        """The families; that a replica is ready says that Ray shows it."""
        yield GaugeMetricFamily(READY, "1 once warmed up.", value=float(self._ready))
        yield from (family for family in super().collect() if family.name != READY)


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
