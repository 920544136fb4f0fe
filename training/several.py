"""Several sources in one prompt: an example's own among others of its pass, each marked by its place.

The sender reads those others anyway, so they cost it nothing. Which they are, how many, and in what order, depends on
the example, the pass and the seed alone. Source: ours.

Dimensions used in this file:
    B batch    K slots    N slots of all sources of a prompt    D receiver width
"""

import re
import zlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from torch import Tensor, cat

from latentwire.bridge.engine import pad_rows
from latentwire.bridge.errors import InvalidRequest
from latentwire.bridge.prompt import Row
from latentwire.training.tokens import Tokeniser, Tokens

WORD = re.compile(r"\w+")
COMMON = 0.5  # of the sources of a pass: a word that more of them have tells none apart


def mix(
    tokeniser: Tokeniser, rows: Sequence[Tokens], soft: Float[Tensor, "B K D"], slots: Sequence[int]
) -> tuple[list[Row], Float[Tensor, "B N D"]]:
    """Rows that are answered from several sources, and the soft tokens of each, in order.

    An example has from one source, unmarked, to ``--sources-per-example``: fewer where the pass has no more, or the
    receiver no room.
    """
    orders = chosen(rows, most=tokeniser.config.sources_per_example, seed=tokeniser.config.seed)
    composed = [_composed(tokeniser, rows, slots, i, order) for i, order in enumerate(orders)]
    mixed = pad_rows([cat([soft[j, : slots[j]] for j in order]) for _, order in composed])
    assert mixed is not None
    return [row for row, _ in composed], mixed


def chosen(rows: Sequence[Tokens], *, most: int, seed: int) -> list[list[int]]:
    """For each row of a pass, the rows whose sources its prompt has, in order; its own is one of them.

    A source that has a word of the question which the own source has too is left out, unless most sources have it: the
    question would no longer be about one of them.
    """
    words = [set(WORD.findall(row.text.lower())) for row in rows]
    counts = Counter(word for each in words for word in each)
    common = {word for word, count in counts.items() if count > COMMON * len(rows)}
    orders = []
    for i, row in enumerate(rows):
        drawn = np.random.default_rng((seed, zlib.crc32(f"{row.text}\0{row.prompt}".encode())))
        asked = set(WORD.findall(row.prompt.lower())) & words[i] - common
        others = [int(j) for j in drawn.permutation(len(rows)) if j != i and not asked & words[j]]
        order = [i, *others[: int(drawn.integers(most))]] if row.prompt else [i]
        orders.append([order[at] for at in drawn.permutation(len(order))])
    return orders


def _composed(
    tokeniser: Tokeniser, rows: Sequence[Tokens], slots: Sequence[int], own: int, order: list[int]
) -> tuple[Row, list[int]]:
    while len(order) > 1:
        try:
            return tokeniser.several(rows[own], [slots[j] for j in order]), order
        except InvalidRequest:  # no room
            other = next(j for j in order if j != own)
            order = [j for j in order if j != other]
    return rows[own].answer, order
