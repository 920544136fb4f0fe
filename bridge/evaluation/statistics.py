"""How sure a figure is, and whether two conditions differ: intervals and tests over the same examples.

scipy is imported where it is used: it takes a second, and most services measure nothing.

Dimensions used in this file:
    N examples
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]
Interval = tuple[float, float]
FEWEST = 5  # examples that an interval needs
RESAMPLES = 4000
LEVEL = 0.95


def interval(scores: Sequence[float]) -> Interval | None:
    """95 % interval of the mean of ``scores`` (N, each from 0 to 1); None where N is below ``FEWEST``.

    BCa bootstrap (Efron 1987, "Better bootstrap confidence intervals" §2). Scores that are all 0 or all 1 resample to
    themselves: they get the exact binomial interval (Clopper and Pearson 1934) instead of one without width.
    """
    from scipy import stats

    values = np.asarray(scores, dtype=np.float64)
    if len(values) < FEWEST:
        return None
    if values.min() == values.max() and values[0] in (0.0, 1.0):
        exact = stats.binomtest(int(values.sum()), len(values)).proportion_ci(LEVEL)
        return float(exact.low), float(exact.high)
    return resampled((values,), np.mean)


def resampled(samples: Sequence[Scores], statistic: Callable[..., Any]) -> Interval | None:
    """95 % interval of a statistic of scores on the same N examples, which are resampled together.

    BCa where it can be had; percentiles where it cannot, as where a score hardly varies or some resample has no value
    (a ratio over zero). None where N is below ``FEWEST``, or no resample has a value.
    """
    from scipy import stats

    if len(samples[0]) < FEWEST:
        return None
    with np.errstate(all="ignore"), warnings.catch_warnings(action="ignore", category=stats.DegenerateDataWarning):
        found = stats.bootstrap(
            samples, statistic, paired=True, vectorized=True, n_resamples=RESAMPLES, confidence_level=LEVEL,
            method="percentile", rng=0,
        )  # fmt: skip
        values = found.bootstrap_distribution
        finite = values[np.isfinite(values)]
        if not len(finite):
            return None
        if len(finite) == len(values) and finite.min() < finite.max():
            better = stats.bootstrap(
                samples, statistic, paired=True, vectorized=True, n_resamples=0, confidence_level=LEVEL,
                method="BCa", bootstrap_result=found,
            ).confidence_interval  # fmt: skip
            if np.isfinite([better.low, better.high]).all():
                return float(better.low), float(better.high)
    low, high = np.percentile(finite, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(low), float(high)


def difference_interval(one: Scores, other: Scores) -> Interval | None:
    """95 % interval of a mean difference over the same examples (errors as ``resampled``).

    Where every example differs by the same, resampling would give no width: an example of another kind may then still
    be as frequent as the exact binomial interval of "none of N" says.
    """
    apart = one - other
    if len(apart) < FEWEST or apart.min() < apart.max():
        return resampled((one, other), _difference)
    unseen, met = _unseen(len(apart)), float(apart[0])
    return max(met - unseen, -1.0), min(met + unseen, 1.0)


def ratio_interval(one: Scores, other: Scores) -> Interval | None:
    """95 % interval of the ratio of two means over the same examples; as ``difference_interval`` where all agree."""
    below = float(np.mean(other))
    if len(one) < FEWEST or below == 0 or (one != other).any():
        return resampled((one, other), ratio)
    unseen = _unseen(len(one)) / below
    return 1 - unseen, 1 + unseen


def _unseen(count: int) -> float:
    """The share that something may have of which there was none among so many (upper end at 97.5 %)."""
    return float(1 - ((1 - LEVEL) / 2) ** (1 / count))


def ratio(one: Scores, other: Scores, axis: int = -1) -> Any:
    """Mean over mean; NaN where the second is 0."""
    below = np.mean(other, axis=axis)
    return np.mean(one, axis=axis) / np.where(below == 0, np.nan, below)


def share_of_gain(bridge: Scores, none: Scores, rival: Scores, axis: int = -1) -> Any:
    """Part of the gain of ``bridge`` over ``none`` that ``rival`` does not give, 0 to 1; NaN without a gain."""
    top, base, other = (np.mean(scores, axis=axis) for scores in (bridge, none, rival))
    gain = np.where(top - base > 0, top - base, np.nan)
    return np.clip((top - other) / gain, 0.0, 1.0)


def p_value(one: Scores, other: Scores) -> float:
    """Two-sided p of the mean difference of two conditions over the same examples.

    Exact McNemar test where scores are 0 or 1 (McNemar 1947): whether the examples that only one got right are split
    evenly. Else the paired bootstrap: twice the smaller share of resampled differences on either side of zero.
    """
    from scipy import stats

    apart = one - other
    if set(np.unique(np.concatenate([one, other]))) <= {0.0, 1.0}:
        won, lost = int((apart > 0).sum()), int((apart < 0).sum())
        return float(stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0
    if not apart.any():
        return 1.0
    rng = np.random.default_rng(0)
    means = np.array([rng.choice(apart, len(apart)).mean() for _ in range(RESAMPLES)])
    below, above = (1 + (means <= 0).sum()) / (1 + RESAMPLES), (1 + (means >= 0).sum()) / (1 + RESAMPLES)
    return float(min(1.0, 2 * min(below, above)))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """The same p values adjusted for being several (Holm 1979): reject where one is below the level, and no more
    than that share of evaluations without any difference rejects even one."""
    adjusted: dict[str, float] = {}
    highest = 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}


def compared(scores: Mapping[str, Sequence[float]], to: str) -> dict[str, dict[str, Any]]:
    """Every condition held against the condition ``to``, over the same examples.

    Returns:
        By condition: ``difference`` of the means (``to`` minus it), its 95 % interval ``low`` and ``high`` (None where
        there are too few examples), and ``p``, adjusted for their number by ``holm``.
    """
    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in scores.items()}
    if to not in arrays:
        return {}
    base = arrays.pop(to)
    adjusted = holm({name: p_value(base, other) for name, other in arrays.items()})
    made = {}
    for name, other in arrays.items():
        low, high = difference_interval(base, other) or (None, None)
        made[name] = {"difference": float(_difference(base, other)), "low": low, "high": high, "p": adjusted[name]}
    return made


def _difference(one: Scores, other: Scores, axis: int = -1) -> Any:
    return np.mean(one, axis=axis) - np.mean(other, axis=axis)


def over_seeds(values: Sequence[float]) -> tuple[float, Interval | None]:
    """Mean of one figure over bridges that differ in their seed, and its 95 % interval by Student's t; None below 3."""
    from scipy import stats

    mean = float(np.mean(values))
    if len(values) < 3:
        return mean, None
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return mean, (mean - half, mean + half)
