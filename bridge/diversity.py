"""What "collapse" means, in numbers.

A generator has collapsed when it says the same thing whatever it is told. Entropy alone misses that (one
system kept an entropy near 8 with the same argmax everywhere), so distinct outputs are counted as well.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


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
    total = tokens.total()
    return Diversity(
        outputs=len(texts),
        distinct_ratio=len(counts) / max(len(texts), 1),
        top_output_ratio=max(counts.values(), default=0) / max(len(texts), 1),
        distinct_1=_distinct(words, 1),
        distinct_2=_distinct(words, 2),
        entropy_nats=-sum(n / total * math.log(n / total) for n in tokens.values()) + 0.0,
    )


def _distinct(lines: Sequence[Sequence[str]], n: int) -> float:
    grams = [tuple(line[i : i + n]) for line in lines for i in range(len(line) - n + 1)]
    return len(set(grams)) / max(len(grams), 1)
