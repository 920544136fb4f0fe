"""Scores of single examples, and the interval of their mean."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentwire.bridge.evaluation.metrics import bootstrap, exact_match, normalise, token_f1


@pytest.mark.parametrize(
    "text, plain",
    [("The  Cat!", "cat"), ("a man, an apple", "man apple"), ("Theatre", "theatre"), ("U.S.", "us"), ("", "")],
)
def test_case_articles_punctuation_and_spaces_do_not_count(text: str, plain: str) -> None:
    assert normalise(text) == plain


def test_exact_match_wants_the_whole_answer() -> None:
    assert exact_match(" Mara lives in Rome.", "mara lives in rome") == 1.0
    assert exact_match("Mara lives in Rome today", "Mara lives in Rome") == 0.0


@pytest.mark.parametrize(
    "said, wanted, score",
    [
        ("Mara lives in Rome", "Mara lives in Paris", 0.75),
        ("Rome", "Mara lives in Rome", 0.4),  # precision 1, recall 1/4
        ("rome rome", "Rome", 2 / 3),  # a repeated word is matched once
        ("Oslo", "Rome", 0.0),
        ("", "", 1.0),
        ("", "Rome", 0.0),
        ("Rome", "the", 0.0),  # an answer of articles only is empty once normalised
    ],
)
def test_f1_is_the_harmonic_mean_of_word_precision_and_recall(said: str, wanted: str, score: float) -> None:
    assert token_f1(said, wanted) == pytest.approx(score)
    assert token_f1(wanted, said) == pytest.approx(score)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=30))
def test_the_interval_holds_the_mean(scores: list[float]) -> None:
    low, high = bootstrap(scores, resamples=300)
    assert 0 <= low <= sum(scores) / len(scores) <= high <= 1


def test_fewer_examples_give_a_wider_interval() -> None:
    widths = [high - low for low, high in (bootstrap([0.0, 1.0] * n) for n in (4, 64))]
    assert widths[0] > 2 * widths[1] > 0


def test_the_interval_is_that_of_the_normal_approximation_when_examples_are_many() -> None:
    low, high = bootstrap([0.0, 1.0] * 200)
    assert (low, high) == pytest.approx((0.5 - 1.96 * 0.025, 0.5 + 1.96 * 0.025), abs=0.006)


def test_an_interval_is_the_same_each_time() -> None:
    scores = [0.0, 1.0, 1.0, 0.0, 1.0]
    assert bootstrap(scores) == bootstrap(scores)
