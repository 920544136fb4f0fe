"""A collapsed generator must look collapsed, whichever number it hides from."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentwire.bridge.diversity import diversity


def test_the_same_answer_to_everything_is_seen_although_its_words_are_many() -> None:
    collapsed = diversity(["the cat sat on a mat"] * 4)
    assert (collapsed.outputs, collapsed.distinct_ratio, collapsed.top_output_ratio) == (4, 0.25, 1.0)
    assert collapsed.entropy_nats == pytest.approx(math.log(6))  # entropy alone sees nothing wrong


def test_different_answers_count_as_different() -> None:
    free = diversity(["a b", "a c", "a b"])
    assert free.distinct_ratio == pytest.approx(2 / 3)
    assert free.top_output_ratio == pytest.approx(2 / 3)
    assert free.distinct_1 == pytest.approx(3 / 6)
    assert free.distinct_2 == pytest.approx(2 / 3)


def test_pairs_do_not_cross_from_one_output_to_the_next() -> None:
    assert diversity(["a b", "c d"]).distinct_2 == 1.0
    assert diversity(["a", "b"]).distinct_2 == 0.0


@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_saying_nothing_gives_zeros_and_never_fails(texts: list[str]) -> None:
    measured = diversity(texts)
    assert (measured.distinct_1, measured.distinct_2, measured.entropy_nats) == (0.0, 0.0, 0.0)
    assert str(measured.entropy_nats) == "0.0"  # not -0.0


@given(st.lists(st.text(alphabet="ab ", max_size=8), min_size=1, max_size=8))
def test_every_share_lies_between_zero_and_one(texts: list[str]) -> None:
    measured = diversity(texts)
    shares = (measured.distinct_ratio, measured.top_output_ratio, measured.distinct_1, measured.distinct_2)
    assert all(0 <= share <= 1 for share in shares) and measured.entropy_nats >= 0
