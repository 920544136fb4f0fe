"""Scores of single examples."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces (SQuAD, Rajpurkar et al. 2016, arXiv:1606.05250 §6.1)."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(text: str, wanted: str) -> float:
    """1 if both are the same text once normalised, else 0."""
    return float(normalise(text) == normalise(wanted))


def token_f1(text: str, wanted: str) -> float:
    """Harmonic mean of word precision and recall once normalised, 0 to 1 (SQuAD, as ``normalise``)."""
    have, want = normalise(text).split(), normalise(wanted).split()
    if not have or not want:
        return float(have == want)
    common = (Counter(have) & Counter(want)).total()
    return 2 * common / (len(have) + len(want))


@dataclass(frozen=True)
class Metric:
    """One way to say how good answers are.

    Attributes:
        name: In configurations, reports and logs.
        title: On pages and in tables; ``short`` where a column is narrow.
        score: Of an answer and the wanted one, 0 to 1; None where no answer is read: the loss.
        tasks: Kinds of task whose reports show it.
        smaller_is_better: As a loss is.
    """

    name: str
    title: str
    short: str
    score: Callable[[str, str], float] | None
    tasks: tuple[str, ...] = ()
    smaller_is_better: bool = False

    def scores(self, texts: Sequence[str], right: Sequence[Sequence[str]]) -> list[float]:
        """The score of each text: of several right answers the one that it is nearest to (SQuAD, as ``normalise``)."""
        assert self.score is not None, f"{self.name} is no score of a text"
        return [max(self.score(have, want) for want in wanted) for have, wanted in zip(texts, right, strict=True)]

    def is_better(self, value: float, than: float) -> bool:
        """Whether ``value`` beats ``than``."""
        return value < than if self.smaller_is_better else value > than


METRICS = {
    metric.name: metric
    for metric in (
        Metric("em", "exact match", "EM", exact_match, ("generation",)),
        Metric("accuracy", "accuracy", "accuracy", lambda text, wanted: float(text == wanted), ("classification",)),
        Metric("token_f1", "token F1", "token F1", token_f1, ("generation",)),
        Metric("loss", "loss", "loss", None, smaller_is_better=True),
    )
}


def metrics_of(task_kind: str) -> list[Metric]:
    """Those that reports of such a task show; the first is what it is measured in."""
    return [metric for metric in METRICS.values() if task_kind in metric.tasks]
