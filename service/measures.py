"""What several processes count, as one text for Prometheus."""

from collections.abc import Iterator, Mapping

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector


class Texts(Collector):
    """Every family of several texts once, with the samples of all: the format wants them together.

    >>> from prometheus_client import generate_latest
    >>> print(generate_latest(Texts("front", {"0": "# HELP rows Rows.\\n# TYPE rows gauge\\nrows 2.0\\n"})).decode())
    # HELP rows Rows.
    # TYPE rows gauge
    rows{front="0"} 2.0
    <BLANKLINE>
    """

    def __init__(self, label: str, texts: Mapping[str, str]) -> None:
        """Of processes {id: what it counts, in the text format}; the ``label`` tells them apart."""
        self._label, self._texts = label, texts

    def collect(self) -> Iterator[Metric]:
        """The families."""
        families: dict[str, Metric] = {}
        for id, text in self._texts.items():
            for family in text_string_to_metric_families(text):
                all_of_it = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                all_of_it.samples += [one._replace(labels={**one.labels, self._label: id}) for one in family.samples]
        yield from families.values()
