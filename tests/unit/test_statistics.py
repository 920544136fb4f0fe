"""Intervals and tests, on cases whose answer is known and on cases in which there is nothing to find."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from latentwire.bridge.evaluation.statistics import (
    FEWEST,
    compared,
    difference_interval,
    holm,
    interval,
    over_seeds,
    p_value,
    ratio,
    ratio_interval,
    resampled,
    share_of_gain,
)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=FEWEST, max_size=30))
def test_the_interval_holds_the_mean(scores: list[float]) -> None:
    found = interval(scores)
    assert found is not None and 0 <= found[0] <= sum(scores) / len(scores) <= found[1] <= 1


def test_fewer_examples_give_a_wider_interval() -> None:
    few, many = interval([0.0, 1.0] * 4), interval([0.0, 1.0] * 64)
    assert few is not None and many is not None
    assert few[1] - few[0] > 2 * (many[1] - many[0]) > 0


def test_the_interval_is_that_of_the_normal_approximation_when_examples_are_many() -> None:
    assert interval([0.0, 1.0] * 200) == pytest.approx((0.5 - 1.96 * 0.025, 0.5 + 1.96 * 0.025), abs=0.006)


def test_a_skewed_score_gets_a_skewed_interval() -> None:
    rng = np.random.default_rng(0)
    scores = np.clip(rng.exponential(0.1, 40), 0, 1)
    found = interval(scores.tolist())
    assert found is not None and found[1] - scores.mean() > 1.2 * (scores.mean() - found[0])


def test_an_interval_is_the_same_each_time() -> None:
    scores = [0.0, 1.0, 1.0, 0.0, 1.0]
    assert interval(scores) == interval(scores) != None  # noqa: E711


def test_too_few_examples_have_no_interval() -> None:
    assert interval([1.0] * (FEWEST - 1)) is None and resampled((np.ones(FEWEST - 1),), np.mean) is None


@pytest.mark.parametrize("right, low, high", [(1.0, 0.6915, 1.0), (0.0, 0.0, 0.3085)])
def test_scores_that_are_all_right_or_all_wrong_are_not_taken_for_certain(
    right: float, low: float, high: float
) -> None:
    # Clopper and Pearson: (0.025)^(1/10) of ten
    assert interval([right] * 10) == pytest.approx((low, high), abs=1e-4)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    drawn = [(rng.random(60) < 0.8).astype(float).tolist() for _ in range(200)]
    found = [interval(scores) for scores in drawn]
    assert 0.88 <= np.mean([low <= 0.8 <= high for low, high in found if low is not None]) <= 0.99  # type: ignore[misc]


def test_a_ratio_is_resampled_with_its_examples_together() -> None:
    rng = np.random.default_rng(2)
    direct = (rng.random(300) < 0.5).astype(float)
    together = resampled((direct * 0.9, direct), ratio)
    apart = resampled((rng.permutation(direct) * 0.9, direct), ratio)
    assert together == pytest.approx((0.9, 0.9)) and apart is not None and apart[1] - apart[0] > 0.1


def test_conditions_that_agree_on_every_example_are_not_taken_to_be_the_same() -> None:
    ones, zeros = np.ones(40), np.zeros(40)
    rest = 0.025 ** (1 / 40)  # nothing was met 40 times: it may still be 1 - rest of all
    assert difference_interval(ones, ones) == pytest.approx((rest - 1, 1 - rest))
    assert difference_interval(ones, zeros) == pytest.approx((rest, 1.0))
    assert ratio_interval(ones, ones) == pytest.approx((rest, 2 - rest))
    half = np.tile([0.0, 1.0], 20)
    assert ratio_interval(half, half) == pytest.approx((1 - 2 * (1 - rest), 1 + 2 * (1 - rest)))
    assert ratio_interval(ones[:4], ones[:4]) is None and ratio_interval(zeros, zeros) is None


def test_a_share_is_known_and_is_none_without_a_gain() -> None:
    bridge, none, rival = np.array([1, 1, 1, 0.0]), np.array([0, 0, 0, 0.0]), np.array([1, 0, 0, 0.0])
    assert float(share_of_gain(bridge, none, rival)) == pytest.approx(2 / 3)
    assert np.isnan(share_of_gain(none, bridge, rival)) and np.isnan(ratio(bridge, none))
    assert resampled((np.zeros(9), np.zeros(9)), ratio) is None


def test_mcnemar_counts_the_examples_that_one_alone_got_right() -> None:
    one, other = np.zeros(40), np.zeros(40)
    one[:10], other[10:12] = 1, 1
    assert p_value(one, other) == pytest.approx(stats.binomtest(10, 12).pvalue)
    assert p_value(one, one) == 1.0


def test_scores_between_0_and_1_are_compared_by_the_paired_bootstrap() -> None:
    rng = np.random.default_rng(3)
    f1 = rng.random(80)
    assert p_value(f1, np.clip(f1 - 0.05, 0, 1)) < 0.01 < 0.05 < p_value(f1, rng.permutation(f1)) <= 1
    assert p_value(f1, f1) == 1.0


def test_holm_multiplies_by_the_number_of_tests_left() -> None:
    assert holm({"a": 0.04, "b": 0.01, "c": 0.5}) == pytest.approx({"a": 0.08, "b": 0.03, "c": 0.5})
    assert holm({"a": 0.6, "b": 0.5}) == {"a": 1.0, "b": 1.0} and holm({}) == {}


def test_among_many_null_conditions_hardly_any_evaluation_finds_a_difference() -> None:
    rng = np.random.default_rng(4)
    found = 0
    for _ in range(100):
        scores = {name: (rng.random(60) < 0.7).astype(float) for name in ("bridge", *"abcdef")}
        adjusted = holm({name: p_value(scores["bridge"], scores[name]) for name in "abcdef"})
        found += any(p < 0.05 for p in adjusted.values())
    assert found <= 10


def test_conditions_are_held_against_one_of_them() -> None:
    made = compared({"bridge": [1.0] * 30, "none": [0.0] * 29 + [1.0], "direct": [1.0] * 30}, "bridge")
    assert set(made) == {"none", "direct"} and made["direct"]["p"] == 1.0
    assert made["none"]["difference"] == pytest.approx(29 / 30) and made["none"]["p"] < 1e-6
    assert 0.8 < made["none"]["low"] < made["none"]["high"] <= 1 and compared({"none": [1.0]}, "bridge") == {}


def test_seeds_have_an_interval_from_three_on() -> None:
    assert over_seeds([0.8, 0.9]) == (pytest.approx(0.85), None)
    mean, found = over_seeds([0.8, 0.85, 0.9])
    assert mean == pytest.approx(0.85) and found == pytest.approx(
        (0.85 - 4.3027 * 0.05 / 3**0.5, 0.85 + 0.1242), abs=1e-3
    )
