"""Scores of single examples, and how sure a mean of them is.

Dimensions used in this file:
    N examples
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

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


def bootstrap(scores: Sequence[float], *, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of ``scores`` (N): percentiles over resampled means.

    Source: Efron 1979, percentile method. Few examples give a wide interval, which is the point of showing it.
    """
    values: NDArray[np.float64] = np.asarray(scores, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = [rng.choice(values, size=len(values)).mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
