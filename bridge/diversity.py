"""What "collapse" means, in numbers.

A generator has collapsed when it says the same thing whatever it is told. Entropy alone misses that (one
system kept an entropy near 8 with the same argmax everywhere), so distinct outputs are counted as well.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Diversity:
    """Diversity of several outputs.

    Attributes:
        outputs: How many texts were compared.
        distinct_ratio: Different texts / texts; 1 when no two agree.
        top_output_ratio: Share of the commonest text; 1 means one answer to everything.
        distinct_1: Different words / words over all texts (distinct-n of Li et al. 2016, arXiv:1510.03055).
        distinct_2: The same for pairs of words.
        entropy_nats: Entropy of the word distribution over all texts.
    """

    outputs: int
    distinct_ratio: float
    top_output_ratio: float
    distinct_1: float
    distinct_2: float
    entropy_nats: float


def diversity(texts: Sequence[str]) -> Diversity:
    """Measure ``texts``; an empty list gives zeros."""
    counts, words = Counter(texts), [text.split() for text in texts]
    tokens = Counter(word for line in words for word in line)
    return Diversity(
        outputs=len(texts),
        distinct_ratio=len(counts) / max(len(texts), 1),
        top_output_ratio=max(counts.values(), default=0) / max(len(texts), 1),
        distinct_1=_distinct(words, 1),
        distinct_2=_distinct(words, 2),
        entropy_nats=entropy_nats(tokens.values()),
    )


def entropy_nats(counts: Iterable[int]) -> float:
    """Entropy of what was counted; 0 of nothing."""
    found = list(counts)
    total = sum(found)
    return -sum(n / total * math.log(n / total) for n in found) + 0.0


def repetition(texts: Sequence[str], n: int = 4) -> float:
    """How much of a text has been said in it before, mean over texts: 1 - distinct-n of each (rep-4 of Welleck et al.
    2020, arXiv:1908.04319); 0 of a text of fewer than ``n`` words."""
    lines = [text.split() for text in texts]
    return sum(1 - _distinct([line], n) for line in lines if len(line) >= n) / max(len(lines), 1)


def similarity(vectors: Sequence[NDArray[np.float32]]) -> float:
    """Mean cosine of all pairs of vectors (C,), from their sum; 0 where there is no pair.

    |Σ uᵢ|² = n + 2 Σ uᵢ·uⱼ for vectors of length 1 (ours): as many additions as numbers, not as pairs.
    """
    count = len(vectors)
    if count < 2:
        return 0.0
    stacked = np.stack(vectors)
    units = stacked / np.maximum(np.linalg.norm(stacked, axis=1, keepdims=True), 1e-12)
    return float((np.square(units.sum(axis=0)).sum() - count) / (count * (count - 1)))


def _distinct(lines: Sequence[Sequence[str]], n: int) -> float:
    grams = [tuple(line[i : i + n]) for line in lines for i in range(len(line) - n + 1)]
    return len(set(grams)) / max(len(grams), 1)
